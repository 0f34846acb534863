"""Rectification: no token is likelier than the chance that the text stays harmless after it.

P'(token) <= 1 + Q(text, token) - epsilon, where Q in [-1, 0] is minus the probability that the finished text
is harmful. Source: Cao et al. 2023, Systematic Rectification of Language Models via Dead-end Analysis.
"""

from __future__ import annotations

import math
from typing import Any

from safeguard.decoding.contrastive import own_columns, told
from safeguard.decoding.prefix_cache import CachedModel, padding_mask
from safeguard.errors import CheckFailed, MissingExtra

try:
    import torch
    from torch import Tensor
    from transformers import LogitsProcessor
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc

_LEAST_CAP = 1e-7  # of the released code: no token is ruled out altogether


def rectified(scores: Tensor, values: Tensor, epsilon: float, *, passes: int = 2) -> Tensor:
    """Log-probabilities (row, token) under the caps.

    scores: logits (row, token). values: Q (row, token), in [-1, 0]. Each pass cuts the probabilities to the
    caps, which makes those below them a larger share; so the caps hold exactly only of what a pass was given.
    """
    caps = (1 + values - epsilon).clamp(_LEAST_CAP, 1).log()
    for _ in range(passes):
        scores = torch.minimum(scores, caps + scores.logsumexp(-1, keepdim=True))
    return scores.log_softmax(-1)


class RectificationProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers is not followed
    """Caps the probability of each token by a value model's opinion of where it leads.

    Same rows, same scores, as `ContrastiveProcessor`, whose attention_mask, pad_token_id and vocabulary it
    has. epsilon: taken off every cap. top_k: only the k likeliest tokens remain, so that what is taken from
    them does not go to the rest of the vocabulary; None for all. Raises ValueError for settings out of range,
    CheckFailed for values outside [-1, 0].
    """

    def __init__(
        self,
        value_model: Any,
        *,
        epsilon: float = 0.1,
        top_k: int | None = 50,
        passes: int = 2,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        vocabulary: int | None = None,
        use_cache: bool = True,
    ) -> None:
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1), got {epsilon}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {top_k}")
        if passes < 1:
            raise ValueError(f"passes must be 1 or more, got {passes}")
        self.epsilon, self.top_k, self.passes = epsilon, top_k, passes
        self._value = CachedModel(value_model, use_cache=use_cache)
        self._mask, self._pad, self._vocabulary = attention_mask, pad_token_id, vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities (row, token) in place of the scores. input_ids: (row, token)."""
        mask = padding_mask(input_ids, self._mask, self._pad)
        base = own_columns(scores.float(), self._vocabulary)
        values = told(self._value(input_ids, mask), scores, self._vocabulary, "value model")
        if bool((values < -1).any() or (values > 0).any()):
            raise CheckFailed("decoding", "got values outside [-1, 0]")
        if self.top_k is not None and self.top_k < base.shape[1]:
            kept = torch.zeros_like(base, dtype=torch.bool).scatter(-1, base.topk(self.top_k).indices, True)
            base = base.masked_fill(~kept, -math.inf)
        return rectified(base, values, self.epsilon, passes=self.passes).to(scores.dtype)
