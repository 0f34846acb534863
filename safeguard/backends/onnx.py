"""onnxruntime backend: `.onnx` files on the CPU or on CUDA."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeguard.backends import Arrays, default_threads, parse_device
from safeguard.errors import BackendError, MissingExtra

try:
    import onnxruntime as ort
except ImportError as exc:
    raise MissingExtra("onnxruntime", "onnx") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TensorProto.external_data (field 13) holding the entry {key: "location", value: <file>}
_EXTERNAL = re.compile(rb"\x0a\x08location\x12(.)", re.DOTALL)


class OnnxBackend:
    """Runs a model with onnxruntime, on the device asked for or not at all."""

    def __init__(
        self,
        path: Path,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: str = "cpu",
        threads: int | None = None,
        external: Collection[str] = (),
    ) -> None:
        kind, index = parse_device(device)
        refuse_twin_installs(_installed())
        for name in external_files(path):
            if name not in external:
                raise BackendError(f"{path.name} keeps weights in {name!r}, which its pack does not list")
        self._session = _session(path, kind, index, threads)
        self._file = path.name
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        _agree(path.name, "inputs", self._inputs, [i.name for i in self._session.get_inputs()], exactly=True)
        _agree(path.name, "outputs", self._outputs, [o.name for o in self._session.get_outputs()])

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        """Runs the model once. Raises BackendError for missing inputs and when the run itself fails."""
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise BackendError(
                f"{self._file} needs inputs {', '.join(self._inputs)}; missing: {', '.join(missing)}"
            )
        try:
            values = self._session.run(list(self._outputs), {name: inputs[name] for name in self._inputs})
        except Exception as exc:  # onnxruntime's errors have no common base class of their own
            raise BackendError(f"{self._file} failed to run: {exc}") from exc
        return dict(zip(self._outputs, values, strict=True))


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
    data = path.read_bytes()
    names: list[str] = []
    for match in _EXTERNAL.finditer(data):
        size = match.group(1)[0]
        names.append(data[match.end() : match.end() + size].decode("utf-8", "replace"))
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


def _session(path: Path, kind: str, index: int, threads: int | None) -> Any:
    wanted = _PROVIDERS[kind]
    offered = ort.get_available_providers()
    if wanted not in offered:
        hint = "; run: pip install onnxruntime-gpu in its place" if kind == "cuda" else ""
        raise BackendError(f"onnxruntime has no {wanted}; it offers {', '.join(offered)}{hint}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: everything that matters is raised
    # Waiting threads sleep: spinning wins a third on an idle host (two threads, 3.6 for 5.4 ms) and loses
    # more where anything else runs (25 for 14 ms), as it does around a generator.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    provider = (wanted, {"device_id": str(index)}) if kind == "cuda" else wanted
    try:
        session = ort.InferenceSession(str(path), sess_options=options, providers=[provider])
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
