"""Runs an onnxruntime session on values where they are: what is on the device is never copied to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.errors import BackendError, MissingExtra

try:
    import onnxruntime as ort
except ImportError as exc:
    raise MissingExtra("onnxruntime", "onnx") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DLPACK_DEVICES = {
    1: "cpu",
    2: "cuda",
    3: "cpu",
    13: "cuda",
}  # dlpack.h: CPU, CUDA, pinned host, CUDA managed


def run_bound(
    session: Any, inputs: Mapping[str, Any], outputs: Sequence[str], device: str, index: int = 0
) -> list[NDArray[Any]]:
    """Outputs as arrays on the host, which for a classifier are small.

    inputs: arrays, or tensors of any library that has DLPack or `__cuda_array_interface__`. What is on the
    session's device is used in place; arrays of the host are copied there once. Work that other libraries
    have queued on the device is waited for, so a tensor may be handed over before it is finished.
    Raises BackendError for a tensor on another device.
    """
    binding = session.io_binding()
    held = [_bind(binding, name, value, device, index) for name, value in inputs.items()]
    for name in outputs:
        binding.bind_output(name, "cpu")
    binding.synchronize_inputs()  # waits for the whole device: the tensors come from other streams than ours
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    del held  # alive until here: a binding keeps addresses only
    found: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
    return found


def place_of(value: Any) -> tuple[str, int]:
    """("cpu", 0) or ("cuda", index): where an array or tensor lies, without touching it."""
    if isinstance(value, np.ndarray):
        return "cpu", 0
    if hasattr(value, "__dlpack_device__"):
        kind, index = value.__dlpack_device__()
        return _DLPACK_DEVICES.get(int(kind), f"device type {int(kind)}"), int(index)
    if hasattr(value, "__cuda_array_interface__"):
        return "cuda", 0
    return "cpu", 0


def _bind(binding: Any, name: str, value: Any, device: str, index: int) -> Any:
    """Bind one input; returns what has to stay alive during the run."""
    kind, place = place_of(value)
    if kind == "cpu":
        array = np.ascontiguousarray(_on_host(value))
        found = ort.OrtValue.ortvalue_from_numpy(array, device, index)
        binding.bind_ortvalue_input(name, found)
        return found
    if (kind, place) != (device, index):
        raise BackendError(
            f"{name} is on {kind}:{place} and the model on {device}:{index}; move it there yourself"
        )
    if hasattr(value, "__dlpack__") and hasattr(ort.OrtValue, "from_dlpack"):
        value = _plain(value)
        found = ort.OrtValue.from_dlpack(value)
        binding.bind_ortvalue_input(name, found)
        return found, value
    return _bind_address(binding, name, _plain(value), device, index)


def _bind_address(binding: Any, name: str, value: Any, device: str, index: int) -> Any:
    """Bind what only tells its address (`__cuda_array_interface__`)."""
    told = value.__cuda_array_interface__
    if told.get("strides") is not None:
        raise BackendError(f"{name} must be contiguous on the device, got strides {told['strides']}")
    if told.get("mask") is not None:
        raise BackendError(f"{name} must have no mask")
    dtype = np.dtype(told["typestr"])
    binding.bind_input(name, device, index, dtype.type, tuple(told["shape"]), told["data"][0])
    return value


def _plain(value: Any) -> Any:
    """Without gradient and contiguous, where the library has such words; copies on the device at most."""
    for word in ("detach", "contiguous"):
        value = getattr(value, word, lambda value=value: value)()
    return value


def _on_host(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = value if isinstance(value, np.ndarray) else np.asarray(_plain(value))
    return array
