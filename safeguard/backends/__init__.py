"""One interface over onnxruntime, torch and TensorRT: named arrays in, named arrays out."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from safeguard.errors import BackendError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Arrays",
    "Backend",
    "Precision",
    "default_threads",
    "open_backend",
    "parse_device",
    "tensor_device",
]

Arrays = Mapping[str, "NDArray[Any]"]
"""Tensor name to array. Axis 0 is always the batch."""
Precision = Literal["float32", "float16", "bfloat16"]
"""Of a model that torch runs."""

_MOST_THREADS = 4
_ENGINES = (".engine", ".plan")


class Backend(Protocol):
    """Runs one model. Holds no request data; safe to call from several threads.

    One that takes torch tensors in GPU memory in the place of arrays says so with the attribute
    `tensor_device`: on which GPU, such as "cuda:0".
    """

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]: ...


def open_backend(
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    device: str = "cpu",
    threads: int | None = None,
    external: Collection[str] = (),
    content: bytes | None = None,
    dtype: Precision = "float32",
    compile_with: str | None = None,
) -> Backend:
    """The backend for a model file, chosen by its suffix, or for TensorRT by the device, and by nothing else.

    inputs, outputs: tensor names that the model must have. device: "cpu", "cuda" or "cuda:1"; "tensorrt" or
    "tensorrt_rtx" for the engine that was built of an ONNX file.
    threads: CPU threads of one run, at most 4 of those that the process may use by default.
    external: weight files beside an ONNX file that it may read; none by default.
    content: what an ONNX file holds, where it was read and proven already; the path then only names it.
    dtype, compile_with: of exported programs (`.pt2`), see `safeguard.backends.torch.ModuleBackend`; every
    other file has the precision that it was exported with, so asking another of it is a BackendError.
    Raises BackendError when the device is not there (nothing else is tried) or the file is not as described,
    MissingExtra when the runtime is not installed.
    """
    if path.suffix != ".pt2" and (dtype != "float32" or compile_with is not None):
        raise BackendError(
            f"dtype and compile_with are for models that torch runs (.pt2); {path.name} keeps its precision"
        )
    if path.suffix in _ENGINES or device.startswith("tensorrt"):
        from safeguard.backends.tensorrt import open_engine

        return open_engine(
            path, inputs=inputs, outputs=outputs, device=device, external=external, content=content
        )
    parse_device(device)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    match path.suffix:
        case ".onnx":
            from safeguard.backends.onnx import OnnxBackend

            return OnnxBackend(
                path,
                inputs=inputs,
                outputs=outputs,
                device=device,
                threads=threads,
                external=external,
                content=content,
            )
        case ".pt2":
            from safeguard.backends.torch import open_exported

            return open_exported(
                path, inputs=inputs, outputs=outputs, device=device, dtype=dtype, compile_with=compile_with
            )
        case suffix:
            raise BackendError(f"no backend reads {suffix!r} ({path.name}); known: .onnx, .pt2, .engine")


def tensor_device(backend: Backend) -> str | None:
    """The device whose tensors a backend takes as they are; None for one that takes arrays only."""
    return getattr(backend, "tensor_device", None)


def default_threads() -> int:
    """CPU threads of one run: those the process may use, at most 4 (small models gain nothing from more)."""
    return min(usable_cores(), _MOST_THREADS)


def usable_cores() -> int:
    """CPU cores that the process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def parse_device(device: str) -> tuple[str, int]:
    """("cpu", 0) or ("cuda", index) from "cpu", "cuda", "cuda:1"; BackendError for anything else."""
    kind, colon, number = device.partition(":")
    index_given = kind == "cuda" and bool(colon)
    if kind not in ("cpu", "cuda") or (colon and not index_given) or (index_given and not number.isdecimal()):
        raise BackendError(f"device must be cpu, cuda or cuda:<number>, got {device!r}")
    return kind, int(number) if index_given else 0
