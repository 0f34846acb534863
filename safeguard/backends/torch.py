"""torch backend: modules in memory, and exported programs (`.pt2`), so that no model code is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from safeguard.backends import Arrays, parse_device
from safeguard.errors import BackendError, MissingExtra

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", "torch") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_loading = Lock()


class ModuleBackend:
    """Runs a module that takes its inputs by name, or, with `positional`, in the order of `inputs`.

    The module may return one tensor, a tuple in the order of `outputs`, or a mapping as transformers do.
    An input that already is a tensor stays on its device; outputs come back as float32 arrays.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: str = "cpu",
        positional: bool = False,
    ) -> None:
        self._device = torch_device(device)
        self._module = module.to(self._device)
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._positional = positional

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        """Runs the module once. Raises BackendError for missing inputs and for outputs that are not there."""
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise BackendError(
                f"the module needs inputs {', '.join(self._inputs)}; missing: {', '.join(missing)}"
            )
        tensors = {name: torch.as_tensor(inputs[name]).to(self._device) for name in self._inputs}
        with torch.inference_mode():
            values = self._module(*tensors.values()) if self._positional else self._module(**tensors)
            found = self._named(values)
        return {name: value.float().cpu().numpy() for name, value in found.items()}

    def _named(self, values: Any) -> dict[str, torch.Tensor]:
        if isinstance(values, Mapping):
            missing = [name for name in self._outputs if name not in values]
            if missing:
                raise BackendError(f"the module gave no {', '.join(missing)}; it gave {', '.join(values)}")
            return {name: values[name] for name in self._outputs}
        values = values if isinstance(values, tuple) else (values,)
        if len(values) != len(self._outputs):
            raise BackendError(f"the module gave {len(values)} outputs, expected {', '.join(self._outputs)}")
        return dict(zip(self._outputs, values, strict=True))


def open_exported(
    path: Path, *, inputs: Sequence[str], outputs: Sequence[str], device: str = "cpu"
) -> ModuleBackend:
    """An exported program (`torch.export.save`) as a backend.

    A program whose file holds a pickle that runs code is refused. Raises BackendError for that and any other
    file that cannot be opened, and when the device is not there.
    """
    torch_device(device)
    try:
        with _weights_only():
            program = torch.export.load(path)
        module = program.module()
        positional = not program.call_spec.in_spec.child(1).context  # (args, kwargs) as it was exported
    except Exception as exc:  # torch raises RuntimeError, UnpicklingError, AssertionError, zip errors ...
        raise BackendError(f"{path.name} cannot be opened as an exported program: {exc}") from exc
    return ModuleBackend(module, inputs=inputs, outputs=outputs, device=device, positional=positional)


def torch_device(device: str) -> torch.device:
    """The torch device of that name; BackendError when it is not there."""
    kind, index = parse_device(device)
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise BackendError(f"torch sees {torch.cuda.device_count()} CUDA devices, asked for {device!r}")
    return torch.device(kind, index) if kind == "cuda" else torch.device("cpu")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Makes torch refuse pickles that run code: `torch.export.load` falls back to them on its own."""
    with _loading:
        before = os.environ.get(_FORCE)
        os.environ[_FORCE] = "1"
        try:
            yield
        finally:
            os.environ.pop(_FORCE) if before is None else os.environ.__setitem__(_FORCE, before)
