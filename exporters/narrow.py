"""Modules with smaller weights: half precision inside, int8 tables and layers with a scale per row."""

from __future__ import annotations

import copy
from typing import Any

from safeguard.errors import MissingExtra

try:
    import torch
    from torch import Tensor, nn
except ImportError as exc:
    raise MissingExtra("torch", "export") from exc

_LARGE_TABLE = 5000  # rows; a vocabulary, not positions or types


def row_scales(weight: Tensor) -> Tensor:
    """One int8 scale per row, (row, 1): the largest entry is 127 steps."""
    return weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127


class RowScaledEmbedding(nn.Module):  # type: ignore[misc]  # torch is not followed
    """An embedding table in int8 with one scale per row."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        scales = row_scales(table)
        self.register_buffer("weight", torch.round(table / scales).to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table for integer ids, float32."""
        rows: Tensor = self.weight[ids].to(torch.float32)
        return rows * self.scales[ids]


class RowScaledLinear(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A linear layer with weights in int8, one scale per output, and float32 activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = row_scales(weight)
        self.register_buffer("weight", torch.round(weight / scales).to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(x, self.weight.to(torch.float32) * self.scales, self.bias)


class Half(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A copy of a module in float16, with its float inputs cast on the way in.

    keep_io: what comes out is float32 again (token ids and masks are never cast).
    """

    def __init__(self, module: nn.Module, *, keep_io: bool = True) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()
        self._keep_io = keep_io

    def forward(self, **inputs: Tensor) -> Any:
        """As the module itself: a tensor, a tuple or a mapping."""
        found = self.module(**{n: t.half() if t.is_floating_point() else t for n, t in inputs.items()})
        if not self._keep_io:
            return found
        if isinstance(found, Tensor):
            return found.float()
        if hasattr(found, "items"):
            return {name: t.float() for name, t in found.items() if isinstance(t, Tensor)}
        return tuple(t.float() for t in found)


def narrow_tables(module: nn.Module, *, rows: int = _LARGE_TABLE) -> nn.Module:
    """A copy of a module whose embedding tables of at least `rows` rows are int8, one scale per row."""
    made = copy.deepcopy(module)
    for part in list(made.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Embedding) and child.num_embeddings >= rows:
                setattr(part, name, RowScaledEmbedding(child.weight.detach()))
    return made
