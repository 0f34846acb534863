"""Losses of the text classifier: masked labels, and pairs of which one must score higher."""

from __future__ import annotations

from safeguard.errors import MissingExtra

try:
    from torch import Tensor, nn
except ImportError as exc:
    raise MissingExtra("torch", "train") from exc


def masked_loss(logits: Tensor, targets: Tensor, weights: Tensor, label_weights: Tensor) -> Tensor:
    """Binary cross-entropy over the known targets.

    logits, targets: (batch, label), targets in [0, 1], NaN where unknown. weights: (batch,).
    label_weights: (label,).
    Returns a scalar: the weighted sum over the batch, divided by the number of rows.
    """
    known = ~targets.isnan()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets.nan_to_num(0.0), reduction="none")
    return (loss * known * weights[:, None] * label_weights).sum() / logits.shape[0]


def pair_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """Mean of log(1 + exp(safe - unsafe)) over pairs; 0 without any.

    logits: (batch, label). pairs: (pair, 3) integers: row of the unsafe text, row of its twin, label.
    """
    if not len(pairs):
        return logits.new_zeros(())
    unsafe, safe, label = pairs.T
    return nn.functional.softplus(logits[safe, label] - logits[unsafe, label]).mean()
