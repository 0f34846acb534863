"""onnxruntime backend: `.onnx` files on the CPU or on CUDA."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.backends import Arrays, default_threads, parse_device, usable_cores
from safeguard.backends.onnx_binding import run_bound
from safeguard.errors import BackendError, MissingExtra
from safeguard.locks import ForkSlots

try:
    import onnxruntime as ort
except ImportError as exc:
    raise MissingExtra("onnxruntime", "onnx") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPES = {
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
# their fused kernels are slow on the CPU: 37 us for 19 x 384 numbers where Add and LayerNormalization take 9;
# and 24 us for 19 x 1536 where Add and Gelu take 21, in a model among others 81
_LEFT_OUT = ["SkipLayerNormFusion", "BiasGeluFusion"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TensorProto.external_data (field 13) holding the entry {key: "location", value: <file>}
_EXTERNAL = re.compile(rb"\x0a\x08location\x12([\x00-\x7f])")
# the key alone, however its length and its value are encoded
_LOCATION = re.compile(rb"\x0a(?:\x08|\x88\x80{0,8}\x00)location")


class OnnxBackend:
    """Runs a model with onnxruntime, on the device asked for or not at all.

    On CUDA inputs may be tensors on the device, of any library with DLPack or `__cuda_array_interface__`;
    they are used where they are. gpu_memory_bytes: most that onnxruntime may take there.
    """

    def __init__(
        self,
        path: Path,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: str = "cpu",
        threads: int | None = None,
        external: Collection[str] = (),
        content: bytes | None = None,
        gpu_memory_bytes: int | None = None,
    ) -> None:
        kind, index = self._device = parse_device(device)
        self.tensor_device = f"cuda:{index}" if kind == "cuda" else None
        refuse_twin_installs(_installed())
        if content is None:
            try:
                content = path.read_bytes()
            except OSError as exc:
                raise BackendError(f"{path.name} cannot be opened: {exc.strerror}") from exc
        self.external = _external(path.name, content)
        for name in self.external:
            if name not in external:
                raise BackendError(f"{path.name} keeps weights in {name!r}, which its pack does not list")
        threads = threads or default_threads()
        self._session = _session(path, content, _provider(kind, index, gpu_memory_bytes), threads)
        # onnxruntime keeps the memory of the most runs that ever went on at once: 32 callers held 32 MB more
        # for text-guard-s and were no faster. One above what the cores can do, so that no core waits.
        self._slots = ForkSlots(usable_cores() // threads + 1)
        self._file = path.name
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        _agree(path.name, "inputs", self._inputs, [i.name for i in self._session.get_inputs()], exactly=True)
        _agree(path.name, "outputs", self._outputs, [o.name for o in self._session.get_outputs()])

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        """Runs the model once.

        Raises BackendError for missing inputs, a tensor on another device, and when the run itself fails.
        """
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise BackendError(
                f"{self._file} needs inputs {', '.join(self._inputs)}; missing: {', '.join(missing)}"
            )
        try:
            values = self._values({name: inputs[name] for name in self._inputs})
        except BackendError:
            raise
        except Exception as exc:  # onnxruntime's errors have no common base class of their own
            raise BackendError(f"{self._file} failed to run: {exc}") from exc
        return dict(zip(self._outputs, values, strict=True))

    def warmup(self, examples: Sequence[Arrays] = ()) -> None:
        """Runs the examples, one smallest input without any, so that no caller waits for what comes first."""
        for example in examples or [_smallest(self._session.get_inputs())]:
            self(example)

    def _values(self, inputs: dict[str, Any]) -> Sequence[NDArray[Any]]:
        if self._device[0] == "cpu" and all(type(value) is np.ndarray for value in inputs.values()):
            with self._slots:
                values: Sequence[NDArray[Any]] = self._session.run(list(self._outputs), inputs)
            return values
        return run_bound(self._session, inputs, self._outputs, *self._device)


def refuse_twin_installs(installed: Collection[str]) -> None:
    """Raises BackendError when two distributions share the onnxruntime folder, so that neither is whole."""
    twins = sorted({"onnxruntime", "onnxruntime-gpu"} & set(installed))
    if len(twins) > 1:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one that you want"
        )


def external_files(path: Path) -> tuple[str, ...]:
    """Names of the files beside an ONNX file in which it keeps weights, each once."""
    return _external(path.name, path.read_bytes())


def _external(file: str, data: bytes) -> tuple[str, ...]:
    names: list[str] = []
    for match in _EXTERNAL.finditer(data):
        size = match.group(1)[0]
        names.append(data[match.end() : match.end() + size].decode("utf-8", "replace"))
    if sum(1 for _ in _LOCATION.finditer(data)) > len(names):
        raise BackendError(f"{file} names a file with weights in a form that cannot be checked")
    return tuple(dict.fromkeys(names))


def _installed() -> set[str]:
    found = set()
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


def _provider(kind: str, index: int, memory_bytes: int | None) -> tuple[str, dict[str, str]]:
    """The execution provider of a device, with its options."""
    if kind == "cpu":
        return _PROVIDERS[kind], {}
    options = {
        "device_id": str(index),
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it holds with each growth
        "cudnn_conv_algo_search": "HEURISTIC",  # the default times every kernel for each new shape
    }
    if memory_bytes is not None:
        options["gpu_mem_limit"] = str(memory_bytes)
    return _PROVIDERS[kind], options


def _smallest(inputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Ones for every input, with 1 where the batch is free and 8 where anything else is."""
    return {
        node.name: np.ones(
            [n if isinstance(n, int) else 8 if axis else 1 for axis, n in enumerate(node.shape)],
            _DTYPES.get(node.type, "float32"),
        )
        for node in inputs
    }


def _session(path: Path, content: bytes, provider: tuple[str, dict[str, str]], threads: int) -> Any:
    wanted = provider[0]
    offered = ort.get_available_providers()
    if wanted not in offered:
        hint = "; run: pip install onnxruntime-gpu in its place" if wanted != _PROVIDERS["cpu"] else ""
        raise BackendError(f"onnxruntime has no {wanted}; it offers {', '.join(offered)}{hint}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: everything that matters is raised
    # Waiting threads sleep: spinning wins a third on an idle host (two threads, 3.6 for 5.4 ms) and loses
    # more where anything else runs (25 for 14 ms), as it does around a generator.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = ort.InferenceSession(
            content,
            sess_options=options,
            providers=[provider],
            disabled_optimizers=_LEFT_OUT if wanted == _PROVIDERS["cpu"] else [],
        )
    except Exception as exc:  # onnxruntime's errors have no common base class of their own
        raise BackendError(f"{path.name} cannot be opened: {exc}") from exc
    if wanted not in session.get_providers():  # onnxruntime falls back to the CPU without an error
        raise BackendError(
            f"onnxruntime could not start {wanted} and fell back to {', '.join(session.get_providers())}; "
            "check the driver and the CUDA libraries, or ask for device cpu"
        )
    return session


def _agree(
    file: str, what: str, wanted: Sequence[str], found: Sequence[str], *, exactly: bool = False
) -> None:
    if set(wanted) - set(found) or (exactly and set(found) != set(wanted)):
        raise BackendError(f"{file} has {what} {', '.join(found)}; its pack says {', '.join(wanted)}")
