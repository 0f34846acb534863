"""One interface over onnxruntime and torch: named arrays in, named arrays out."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safeguard.errors import BackendError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Arrays", "Backend", "default_threads", "open_backend", "parse_device"]

Arrays = Mapping[str, "NDArray[Any]"]
"""Tensor name to array. Axis 0 is always the batch."""


_MOST_THREADS = 4


class Backend(Protocol):
    """Runs one model. Holds no request data; safe to call from several threads."""

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]: ...


def open_backend(
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    device: str = "cpu",
    threads: int | None = None,
    external: Collection[str] = (),
) -> Backend:
    """The backend for a model file, chosen by its suffix and nothing else.

    inputs, outputs: tensor names that the model must have. device: "cpu", "cuda" or "cuda:1".
    threads: CPU threads of one run, at most 4 of those that the process may use by default.
    external: weight files beside an ONNX file that it may read; none by default.
    Raises BackendError when the device is not there (nothing else is tried) or the file is not as described,
    MissingExtra when the runtime is not installed.
    """
    parse_device(device)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    match path.suffix:
        case ".onnx":
            from safeguard.backends.onnx import OnnxBackend

            return OnnxBackend(
                path, inputs=inputs, outputs=outputs, device=device, threads=threads, external=external
            )
        case ".pt2":
            from safeguard.backends.torch import open_exported

            return open_exported(path, inputs=inputs, outputs=outputs, device=device)
        case suffix:
            raise BackendError(f"no backend reads {suffix!r} ({path.name}); known: .onnx, .pt2")


def default_threads() -> int:
    """CPU threads of one run: those the process may use, at most 4 (small models gain nothing from more)."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(usable, _MOST_THREADS)


def parse_device(device: str) -> tuple[str, int]:
    """("cpu", 0) or ("cuda", index) from "cpu", "cuda", "cuda:1"; BackendError for anything else."""
    kind, colon, number = device.partition(":")
    index_given = kind == "cuda" and bool(colon)
    if kind not in ("cpu", "cuda") or (colon and not index_given) or (index_given and not number.isdecimal()):
        raise BackendError(f"device must be cpu, cuda or cuda:<number>, got {device!r}")
    return kind, int(number) if index_given else 0
