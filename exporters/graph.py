"""One torch module as one ONNX file, in the form that TensorRT reads or that onnxruntime runs fastest."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from safeguard.errors import ExportError, MissingExtra

try:
    import onnx
    import torch
    from torch import Tensor, nn
except ImportError as exc:
    raise MissingExtra(exc.name or "onnx", "export") from exc

Flavour = Literal["native", "decomposed"]
"""native: attention is one ONNX operator, `Attention`, which onnxruntime runs. decomposed: it is matrix
products and a softmax, which TensorRT parses (it refuses `Attention` with a dynamic mask)."""
OPSETS: Mapping[Flavour, int] = {"native": 23, "decomposed": 20}
"""The opset of each flavour unless another is asked for."""
LOWEST_OPSET = 18  # what torch's exporter writes without converting back
_HIGHEST_OPSET = 24
_LARGEST_FILE = 1_800_000_000  # bytes; protobuf ends at 2 GB, so weights go beside a larger graph
_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)'|target=torch\.ops\.([\w.]+)")
_exporting = Lock()  # the exporter changes process-wide state


def export_graph(
    module: nn.Module,
    path: Path,
    *,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    flavour: Flavour = "native",
    opset: int | None = None,
) -> None:
    """Writes a module as ONNX: float32 in, float32 out, weights as they are.

    inputs: an example of each argument of `forward`, by name. outputs: names for what it returns: a tensor, a
    tuple, or a mapping (then keys of it). dynamic: input -> axis -> name of the dimension; such an axis must
    be 2 or more in the example, since torch takes 0 and 1 for constants.

    Weights go into a file beside it (`path` + ".data") where one file cannot hold them.
    Raises ExportError naming the module's class, the operator and the reason; ValueError for an opset that
    the flavour cannot have and for examples that are too small.
    """
    opset = choose_opset(flavour, opset)
    _refuse_constants(inputs, dynamic)
    # copies: the same tensor given twice would become one input, and a wrong graph, without a word
    examples = {name: value.detach().clone() for name, value in inputs.items()}
    flat = _Flat(module, tuple(examples), tuple(outputs))
    try:
        with evaluating(module), _quiet():
            torch.onnx.export(
                flat,
                tuple(examples.values()),
                str(path),
                input_names=list(examples),
                output_names=list(outputs),
                dynamic_shapes=(tuple(dict(dynamic.get(name, {})) for name in examples),),
                opset_version=opset,
                dynamo=True,
                external_data=_weight_bytes(module) > _LARGEST_FILE,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as exc:
        raise _export_error(module, exc) from exc
    _finish(path, module, examples, outputs, dynamic)


def choose_opset(flavour: Flavour, opset: int | None) -> int:
    """The opset asked for, or the flavour's own. Raises ValueError where the two do not go together."""
    if flavour not in OPSETS:
        raise ValueError(f"flavour must be native or decomposed, got {flavour!r}")
    if opset is None:
        return OPSETS[flavour]
    lowest, highest = (23, _HIGHEST_OPSET) if flavour == "native" else (LOWEST_OPSET, 22)
    if not lowest <= opset <= highest:
        raise ValueError(f"a {flavour} graph needs an opset from {lowest} to {highest}, got {opset}")
    return opset


def operators(path: Path) -> dict[str, int]:
    """How often each operator occurs in an ONNX file."""
    counts: dict[str, int] = {}
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and afterwards each part of it in the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are; the CPU for a module without any."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def beside(path: Path) -> tuple[str, ...]:
    """Names of the files in the folder of an exported graph: those that it may keep weights in."""
    return tuple(sorted(file.name for file in path.parent.iterdir() if file.is_file()))


class _Flat(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The module with tensors in a fixed order, in and out."""

    def __init__(self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self._inputs, self._outputs = inputs, outputs
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found: Any = self.module(**dict(zip(self._inputs, tensors, strict=True)))
        if isinstance(found, Mapping):
            missing = [name for name in self._outputs if name not in found]
            if missing:
                raise ValueError(f"the module gives no {', '.join(missing)}; it gives {', '.join(found)}")
            return tuple(found[name] for name in self._outputs)
        values = (found,) if isinstance(found, Tensor) else tuple(found)
        if len(values) != len(self._outputs):
            raise ValueError(f"the module gives {len(values)} outputs, named: {', '.join(self._outputs)}")
        return values


def _refuse_constants(inputs: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]]) -> None:
    for name, axes in dynamic.items():
        if name not in inputs:
            raise ValueError(f"no input named {name!r} for a dynamic axis; inputs: {', '.join(inputs)}")
        for axis, dimension in axes.items():
            shape = tuple(inputs[name].shape)
            if axis >= len(shape) or shape[axis] < 2:
                raise ValueError(
                    f"the example of {name!r} must be 2 or more along axis {axis} ({dimension}), got {shape}"
                )


def _weight_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _finish(
    path: Path,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """Sees that the file is what was asked for, without source lines, with the module's own names."""
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    found = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    if list(found) != list(inputs) or [value.name for value in graph.output] != list(outputs):
        raise ExportError(
            type(module).__name__, f"inputs became {', '.join(found)} instead of {', '.join(inputs)}"
        )
    for name, axes in dynamic.items():
        for axis, dimension in axes.items():
            if not found[name][axis].dim_param:
                size = found[name][axis].dim_value
                raise ExportError(type(module).__name__, f"it fixes {dimension} of {name!r} at {size}")
    prefix = "module."  # of _Flat
    for node in graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        value.name = value.name.removeprefix(prefix)
        del value.metadata_props[:]
        value.doc_string = ""
    del graph.metadata_props[:], model.metadata_props[:]
    onnx.save(model, str(path))


def _export_error(module: nn.Module, error: BaseException) -> ExportError:
    """Names the operator and the innermost reason of what torch's exporter raised."""
    operator: str | None = None
    inner = error
    while True:
        match = _OPERATOR.search(str(inner))
        operator = next((g for g in match.groups() if g), operator) if match else operator
        if inner.__cause__ is None:
            break
        inner = inner.__cause__
    reason = next((line.strip() for line in str(inner).splitlines() if line.strip()), type(inner).__name__)
    if operator:
        reason = "ONNX has no form of it" if reason.startswith("No ONNX function") else reason
    return ExportError(type(module).__name__, reason, operator=operator)


@contextmanager
def _quiet() -> Iterator[None]:
    """One export at a time, without its deprecation warnings and its progress on stderr."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "torch.fx", "torch.export", "onnxscript", "onnx_ir")
    ]
    with _exporting:
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
