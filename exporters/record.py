"""What a manifest says of an export: by what it was made, from what, and how well it agrees."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from safeguard.exporters.parity import Parity
from safeguard.manifest import ExportRecord

_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum-onnx",
)


def describe(
    model: object | str,
    *,
    opset: int | None,
    flavour: str | None,
    dtype: str,
    parity: Sequence[Parity],
    exporter: str = "torch.onnx",
) -> dict[str, Any]:
    """The `export` part of a manifest. model: the one exported, or the name of its class."""
    record = ExportRecord.model_validate(
        {
            "exporter": exporter,
            "versions": versions(),
            "source": model if isinstance(model, str) else type(model).__name__,
            "opset": opset,
            "flavour": flavour,
            "dtype": dtype,
            "parity": [one.record() for one in parity],
        }
    )
    return record.model_dump(mode="json")


def versions() -> dict[str, str]:
    """Versions of what exports are made with, of those installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
