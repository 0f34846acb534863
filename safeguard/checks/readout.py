"""From a model's logits to calibrated probabilities per label, shared by every classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.manifest import Manifest

Activation = Literal["sigmoid", "softmax", "none"]
_SLACK = 1e-3  # how far a graph's own probabilities may lie outside [0, 1] by rounding


class Readout:
    """Turns logits (row, column) into probabilities (row, label), leaving out ignored labels.

    probability = activation((logit + bias) / temperature). A softmax runs within each head, over all columns
    where there are no heads. With "none" the model's own output is the probability. Whatever is not finite,
    or no probability, comes out as NaN: closed, since callers treat NaN as a failure.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        ignored: Sequence[str] = (),
        activation: Activation = "sigmoid",
        temperatures: Mapping[str, float] | None = None,
        biases: Mapping[str, float] | None = None,
        heads: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not columns or len(set(columns)) != len(columns):
            raise ValueError(f"labels must be unique and at least one, got {list(columns)}")
        unknown = sorted(({*ignored, *(temperatures or {}), *(biases or {})}) - set(columns))
        if unknown:
            raise ValueError(f"no label named {', '.join(unknown)}; known: {', '.join(columns)}")
        self._columns = tuple(columns)
        self._kept = [i for i, label in enumerate(columns) if label not in set(ignored)]
        self.labels = tuple(columns[i] for i in self._kept)
        if not self.labels:
            raise ValueError("every label is ignored, so there is nothing to score")
        self._activation = activation
        self._bias = np.array([(biases or {}).get(c, 0.0) for c in columns])
        self._temperature = np.array([(temperatures or {}).get(c, 1.0) for c in columns])
        self._groups = _groups(self._columns, heads or {})

    @classmethod
    def of(cls, manifest: Manifest) -> Readout:
        """The readout that a manifest describes."""
        return cls(
            manifest.labels,
            ignored=manifest.ignored_labels,
            activation=manifest.activation,
            temperatures=manifest.temperatures,
            biases=manifest.biases,
            heads=manifest.heads,
        )

    def __call__(self, logits: NDArray[Any], rows: int) -> NDArray[np.float64]:
        """Probabilities (rows, labels). Raises ValueError when the model gave another shape."""
        wanted = (rows, len(self._columns))
        if logits.shape != wanted:
            raise ValueError(
                f"the model gave an array of shape {logits.shape}, expected {wanted} (items, labels)"
            )
        values = np.where(np.isfinite(logits), logits, np.nan).astype(np.float64)
        values = (values + self._bias) / self._temperature
        if self._activation == "sigmoid":
            values = 0.5 * (1.0 + np.tanh(0.5 * values))  # never overflows
        elif self._activation == "softmax":
            values = self._softmax(values)
        else:
            values = np.where((values >= -_SLACK) & (values <= 1 + _SLACK), np.clip(values, 0, 1), np.nan)
        return values[:, self._kept]

    def _softmax(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        out = np.empty_like(values)
        for group in self._groups:
            part = values[:, group]
            part = np.exp(part - part.max(axis=1, keepdims=True))
            out[:, group] = part / part.sum(axis=1, keepdims=True)
        return out


def _groups(columns: tuple[str, ...], heads: Mapping[str, Sequence[str]]) -> list[list[int]]:
    groups = [[columns.index(label) for label in labels] for labels in heads.values()]
    rest = sorted(set(range(len(columns))) - {i for group in groups for i in group})
    return [*groups, rest] if rest else groups
