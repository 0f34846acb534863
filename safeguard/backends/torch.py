"""torch backend: modules in memory, and exported programs (`.pt2`), so that no model code is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from safeguard.backends import Arrays, Precision, parse_device
from safeguard.errors import BackendError, MissingExtra

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", "torch") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_loading = Lock()


class ModuleBackend:
    """Runs a module that takes its inputs by name, or, with `positional`, in the order of `inputs`.

    The module may return one tensor, a tuple in the order of `outputs`, or a mapping as transformers do.
    An input that already is a tensor stays on its device; outputs come back as float32 arrays.

    dtype: float16 and bfloat16 are for CUDA. compile_with: a backend of `torch.compile`, such as "inductor";
    each input shape is compiled once, when it first comes or by `warmup`, so give the callers length buckets.
    Not used unless asked for: compiling a BERT took 159 s on two CPU cores and gave nothing there. Compiled
    code is run by one thread at a time.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: str = "cpu",
        positional: bool = False,
        dtype: Precision = "float32",
        compile_with: str | None = None,
    ) -> None:
        self._device = torch_device(device)
        self.tensor_device = str(self._device) if self._device.type == "cuda" else None
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if dtype != "float32" and self._device.type != "cuda":
            raise BackendError(f"{dtype} is for cuda, the device asked for is {device}; use float32 there")
        self._dtype = _DTYPES[dtype]
        self._process = os.getpid()
        # left as it is in float32: a module with quantised or double parts has types of its own
        moved = module.to(self._device) if dtype == "float32" else module.to(self._device, self._dtype)
        self._half = dtype != "float32"
        self._module: Any = moved if compile_with is None else _compiled(moved, compile_with)
        self._turn: AbstractContextManager[Any] = nullcontext() if compile_with is None else Lock()
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._positional = positional

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        """Runs the module once.

        Raises BackendError for missing inputs, for outputs that are not there and in a forked process.
        """
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise BackendError(
                f"the module needs inputs {', '.join(self._inputs)}; missing: {', '.join(missing)}"
            )
        if os.getpid() != self._process:  # its threads, and any CUDA context, stayed in the other process
            raise BackendError(
                "the module was loaded before this process was forked, and torch hangs then; "
                "load it in the process that runs it"
            )
        tensors = {name: self._tensor(inputs[name]) for name in self._inputs}
        with self._turn, torch.inference_mode():
            values = self._module(*tensors.values()) if self._positional else self._module(**tensors)
            found = self._named(values)
        return {name: value.float().cpu().numpy() for name, value in found.items()}

    def warmup(self, examples: Sequence[Arrays] = ()) -> None:
        """Runs the examples, so that no caller waits for kernels, or for the compiler, of those shapes.

        Without any only the device is started: a module does not say what it takes.
        """
        torch.zeros(1, device=self._device)
        for example in examples:
            self(example)

    def _tensor(self, value: Any) -> torch.Tensor:
        tensor = torch.as_tensor(value).to(self._device)
        return tensor.to(self._dtype) if self._half and tensor.is_floating_point() else tensor

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


def _compiled(module: torch.nn.Module, backend: str) -> Any:
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"no torch.compile backend {backend!r}; known: {', '.join(sorted(known))}")
    return torch.compile(module, backend=backend, dynamic=False)


def open_exported(
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    device: str = "cpu",
    dtype: Precision = "float32",
    compile_with: str | None = None,
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
    return ModuleBackend(
        module,
        inputs=inputs,
        outputs=outputs,
        device=device,
        positional=positional,
        dtype=dtype,
        compile_with=compile_with,
    )


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
