"""Model Surgery: a few rows of a language model's MLP gates are moved along the direction of a behaviour.

Source: Wang et al. 2024, Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing. An edit is a
small file of its own; it is applied to and taken back from the very weights that it was made for, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safeguard.errors import MissingExtra, PackError

try:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from torch import Tensor
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", extra="torch") from exc

_GATE = "mlp.gate_proj"
_FORMAT = "model-surgery-1"


def gates(model: Any) -> dict[str, Any]:
    """Name -> weight (row, hidden) of every MLP gate. Raises ValueError for a model without."""
    found = {name: module.weight for name, module in model.named_modules() if name.endswith(_GATE)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated MLP ({_GATE}); "
            "surgery is for models such as Llama, Mistral and Qwen"
        )
    return found


@dataclass(frozen=True)
class WeightEdit:
    """Rows of gates, moved by alpha times a direction.

    rows: gate -> row numbers, ascending. originals: gate -> those rows as they were, in the model's
    precision. direction: (hidden,), float32.
    """

    rows: dict[str, Tensor]
    originals: dict[str, Tensor]
    direction: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.direction).all()) or not torch.isfinite(torch.tensor(self.alpha)):
            raise ValueError("an edit must be made of finite numbers")

    @classmethod
    def select(cls, model: Any, direction: Tensor, count: int, *, alpha: float = 0.0) -> Self:
        """The edit of the `count` rows of all gates that point away most from the direction, by cosine."""
        weights = gates(model)
        total = sum(len(w) for w in weights.values())
        if not 1 <= count <= total:
            raise ValueError(f"count must be 1 to the {total} rows of the gates, got {count}")
        direction = direction.detach().float().cpu()
        size = next(iter(weights.values())).shape[1]
        if direction.shape != (size,):
            raise ValueError(f"direction must have shape ({size},), got {tuple(direction.shape)}")
        unit = direction / direction.norm().clamp(min=1e-12)
        likeness = torch.cat(
            [torch.nn.functional.normalize(w.detach().float().cpu(), dim=1) @ unit for w in weights.values()]
        )
        chosen = likeness.argsort(stable=True)[:count]
        rows: dict[str, Tensor] = {}
        start = 0
        for name, weight in weights.items():
            mine = chosen[(chosen >= start) & (chosen < start + len(weight))] - start
            if len(mine):
                rows[name] = mine.sort().values
            start += len(weight)
        originals = {name: weights[name].detach()[i].cpu().clone() for name, i in rows.items()}
        return cls(rows, originals, direction, alpha)

    def at(self, alpha: float) -> WeightEdit:
        """The same edit at another strength."""
        return WeightEdit(self.rows, self.originals, self.direction, alpha)

    @property
    def count(self) -> int:
        """How many rows it moves."""
        return sum(len(i) for i in self.rows.values())

    def apply(self, model: Any) -> Any:
        """Move the rows in place. Raises ValueError for other weights than it was made for."""
        self._swap(model, self.originals, self._moved(), "not the weights that this edit was made for")
        return model

    def revert(self, model: Any) -> Any:
        """Put the very bits back. Raises ValueError for weights that it was not applied to."""
        self._swap(model, self._moved(), self.originals, "not weights that this edit was applied to")
        return model

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """The model with the edit inside the block, and without it after."""
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    def _moved(self) -> dict[str, Tensor]:
        push = self.alpha * self.direction
        return {name: (rows.float() + push).to(rows.dtype) for name, rows in self.originals.items()}

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def _swap(self, model: Any, old: dict[str, Tensor], new: dict[str, Tensor], otherwise: str) -> None:
        weights = gates(model)
        for name, rows in self.rows.items():  # all are looked at before any is changed
            weight = weights.get(name)
            fits = weight is not None and int(rows.max()) < len(weight) and weight.dtype == old[name].dtype
            if weight is None or not fits or not torch.equal(weight[rows.to(weight.device)].cpu(), old[name]):
                raise ValueError(f"{otherwise}: {name} is different")
        for name, rows in self.rows.items():
            weight = weights[name]
            weight[rows.to(weight.device)] = new[name].to(weight.device)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {"direction": self.direction.contiguous()}
        for name, rows in self.rows.items():
            tensors |= {f"rows.{name}": rows, f"originals.{name}": self.originals[name].contiguous()}
        save_file(tensors, path, metadata={"format": _FORMAT, "alpha": json.dumps(self.alpha)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """The edit that `save` wrote. Raises PackError for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            if about.get("format") != _FORMAT:
                raise ValueError("another format")
            parts: dict[str, dict[str, Tensor]] = {"rows": {}, "originals": {}}
            for name, tensor in tensors.items():
                kind, _, gate = name.partition(".")
                if gate:
                    parts[kind][gate] = tensor
            if parts["rows"].keys() != parts["originals"].keys():
                raise ValueError("rows and originals differ")
            return cls(
                parts["rows"], parts["originals"], tensors["direction"], float(json.loads(about["alpha"]))
            )
        except Exception as exc:  # safetensors raises an error of its own
            raise PackError(f"{path.name!r} holds no weight edit ({type(exc).__name__})") from exc


def strongest(
    edit: WeightEdit, cost: Callable[[WeightEdit], float], budget: float, *, most: float, steps: int = 8
) -> float:
    """The largest alpha in [0, most] at which the cost stays within the budget, by bisection.

    cost: of the edit at a strength, such as the perplexity of the edited model on harmless text; taken to
    grow with it. Exact to most / 2**steps; never above the budget. Costs that are no numbers are above it.
    Raises ValueError when even alpha 0 is above the budget.
    """
    if not most > 0 or steps < 1:
        raise ValueError(f"most must be above 0 and steps 1 or more, got {most} and {steps}")
    if not cost(edit.at(0.0)) <= budget:
        raise ValueError(f"the model is above the budget of {budget:.4g} before any edit")
    if cost(edit.at(most)) <= budget:
        return most
    low, high = 0.0, most
    for _ in range(steps):
        middle = (low + high) / 2
        if cost(edit.at(middle)) <= budget:
            low = middle
        else:
            high = middle
    return low
