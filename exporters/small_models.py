"""Small modules that run beside a generation, such as value models of logits processors, as ONNX packs.

A pack of kind "module" says what goes in and out; `safeguard.backends.open_backend` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safeguard.backends import Arrays, Backend, open_backend
from safeguard.errors import MissingExtra
from safeguard.exporters.graph import Flavour, beside, choose_opset, device_of, evaluating, export_graph
from safeguard.exporters.narrow import Half
from safeguard.exporters.parity import FLOAT16, FLOAT32, SEED, Parity, compare
from safeguard.exporters.record import describe
from safeguard.exporters.writing import new_folder
from safeguard.manifest import Manifest
from safeguard.packs import seal

try:
    from torch import Tensor, nn

    from safeguard.backends.torch import ModuleBackend
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", extra="export") from exc

Dtype = Literal["float32", "float16"]
MODEL_NAME = "model.onnx"
_SIZES = (1, 5, 17)  # of every dynamic axis, one after the other
_TOLERANCES: Mapping[Dtype, float] = {"float32": FLOAT32, "float16": FLOAT16}
Say = Callable[[str], None]


def export_module(
    module: nn.Module,
    out: Path,
    *,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    dtype: Dtype = "float32",
    flavour: Flavour = "native",
    opset: int | None = None,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
    say: Say = lambda _: None,
) -> Manifest:
    """Writes any module that takes its inputs by name as a pack of kind "module", or nothing.

    inputs: an example of each, 2 or more along dynamic axes. dynamic: input -> axis -> name of the dimension;
    None makes axis 0 of every input the batch. Integer inputs are compared on the values of their example.
    fields: more for the manifest. say: told each step as it begins.
    Raises ExportError, ParityError and FileExistsError as every exporter does.
    """
    if dtype not in _TOLERANCES:
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    opset = choose_opset(flavour, opset)
    axes = dynamic if dynamic is not None else {name: {0: "batch"} for name in inputs}
    kind = type(module).__name__
    with new_folder(out, overwrite=overwrite) as folder:
        say(f"exporting {kind}, opset {opset}, {flavour}, {dtype}")
        path = folder / MODEL_NAME
        chosen = Half(module) if dtype == "float16" else module
        export_graph(chosen, path, inputs=inputs, outputs=outputs, dynamic=axes, flavour=flavour, opset=opset)
        say("comparing with the module")
        candidate = open_backend(path, inputs=tuple(inputs), outputs=outputs, external=beside(path))
        with evaluating(module):
            agreed = _compare(module, candidate, inputs, outputs, axes, _TOLERANCES[dtype])
        say("sealing the pack")
        return seal(
            folder,
            {
                "name": kind,
                "version": "1",
                "kind": "module",
                "model": {"file": MODEL_NAME, "inputs": list(inputs), "outputs": list(outputs)},
                "precision": dtype,
                "license": "unknown",
                "export": describe(module, opset=opset, flavour=flavour, dtype=dtype, parity=agreed),
                **(fields or {}),
            },
        )


def _compare(
    module: nn.Module,
    candidate: Backend,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    tolerance: float,
) -> list[Parity]:
    device = device_of(module)
    try:
        reference = ModuleBackend(module, inputs=tuple(inputs), outputs=outputs)
        return compare(reference, candidate, _batches(inputs, axes), tolerance=tolerance)
    finally:
        module.to(device)


def _batches(inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> list[Arrays]:
    """Seeded inputs at several sizes: normal numbers, and integers drawn from those of the example."""
    generator = np.random.default_rng(SEED)
    names = sorted({name for of in axes.values() for name in of.values()})
    batches: list[Arrays] = []
    for turn in range(len(_SIZES)):
        sizes = {name: _SIZES[(turn + place) % len(_SIZES)] for place, name in enumerate(names)}
        batch = {}
        for name, example in inputs.items():
            named = axes.get(name, {})
            shape = [sizes[named[a]] if a in named else n for a, n in enumerate(example.shape)]
            if example.is_floating_point():
                batch[name] = generator.standard_normal(shape).astype(np.float32)
            else:
                batch[name] = generator.choice(example.detach().cpu().numpy().ravel(), shape)
        batches.append(batch)
    return batches
