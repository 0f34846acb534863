"""Contrastive decoding: scores moved away from an anti-expert, and towards an expert where there is one.

DExperts (Liu et al. 2021): z = z_base + a (z_expert - z_anti) within the nucleus of the base. UniDetox and
contrastive decoding (Li et al. 2023): (1 + b) z_base - b z_anti, or the pure difference z_base - z_anti,
among the tokens that the base finds plausible.
"""

from __future__ import annotations

import math
from typing import Any

from safeguard.decoding.prefix_cache import CachedModel, padding_mask
from safeguard.errors import CheckFailed, MissingExtra

try:
    import torch
    from torch import Tensor
    from transformers import LogitsProcessor
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc

_LIKELIEST = 1024  # tokens among which the nucleus is looked for first


def plausible(scores: Tensor, alpha: float) -> Tensor:
    """Tokens (row, token) at least alpha times as likely as the likeliest: adaptive plausibility.

    scores: (row, token), logits or log-probabilities. Source: Li et al. 2023, equation 2.
    """
    return scores >= scores.max(dim=-1, keepdim=True).values + math.log(alpha)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens (row, token) whose probabilities add up to top_p or more.

    scores: (row, token), logits or log-probabilities. Source: Holtzman et al. 2020.
    """
    size = scores.shape[-1]
    whole = scores.float().logsumexp(-1, keepdim=True)
    inside = torch.zeros_like(scores, dtype=torch.bool)
    rows = torch.arange(len(scores), device=scores.device)
    for count in (_LIKELIEST, size):  # sorting all of a large vocabulary takes far longer than reading it
        likeliest, tokens = scores[rows].topk(min(count, size), dim=-1)
        probability = (likeliest.float() - whole[rows]).exp()
        before = probability.cumsum(-1) - probability
        kept = before < top_p
        kept[..., 0] = True
        inside[rows] = torch.zeros_like(inside[rows]).scatter(-1, tokens, kept)
        rows = rows[kept[:, -1]]  # the nucleus may go on behind the last of them
        if not len(rows):
            break
    return inside


def contrasted(base: Tensor, anti: Tensor, expert: Tensor | None, strength: float) -> Tensor:
    """Scores of the base plus strength times (expert - anti); without an expert the base is it.

    All (row, token), logits. At infinite strength expert - anti alone. -inf in base stays.
    """
    pushed = (base if expert is None else expert) - anti
    scores = pushed if math.isinf(strength) else base + strength * pushed
    return scores.masked_fill(base == -math.inf, -math.inf)


class ContrastiveProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers is not followed
    """Moves the scores of the guided model away from those of a model that was trained on harmful text.

    Gives log-probabilities: the formula up to a constant per row, so that beams can be compared. It starts
    from the scores it is given; let it come after what bans tokens, and those stay banned. Same rows, same
    scores, however often and in whatever order it is asked: batches padded on the left, beams, several
    sequences per prompt, assisted generation.

    strength: alpha of DExperts, beta of UniDetox; math.inf for the pure difference. plausibility: only tokens
    at least that many times as likely as the base's likeliest, None for all. top_p: only the nucleus of the
    base, None for all. attention_mask: (prompt, width) of the one call that this is for; without it the
    leading run of pad_token_id in a row is not read. vocabulary: number of tokens of the tokenizer, needed
    where the models have tables of different sizes: columns behind it are padding and get -inf.

    Raises ValueError for settings out of range; when called, for vocabularies that do not fit. Raises
    CheckFailed when a model gives scores that are not numbers.
    """

    def __init__(
        self,
        anti_expert: Any,
        expert: Any = None,
        *,
        strength: float = 2.0,
        plausibility: float | None = 0.1,
        top_p: float | None = None,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        vocabulary: int | None = None,
        use_cache: bool = True,
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must be 0 or more, got {strength}")
        if plausibility is not None and not 0 < plausibility <= 1:
            raise ValueError(f"plausibility must be in (0, 1], got {plausibility}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.strength, self.plausibility, self.top_p = strength, plausibility, top_p
        self._anti = CachedModel(anti_expert, use_cache=use_cache)
        self._expert = None if expert is None else CachedModel(expert, use_cache=use_cache)
        self._mask, self._pad, self._vocabulary = attention_mask, pad_token_id, vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities (row, token) in place of the scores. input_ids: (row, token)."""
        mask = padding_mask(input_ids, self._mask, self._pad)
        base = own_columns(scores.float(), self._vocabulary)
        anti = told(self._anti(input_ids, mask), scores, self._vocabulary, "anti-expert")
        expert = None
        if self._expert is not None:
            expert = told(self._expert(input_ids, mask), scores, self._vocabulary, "expert")
        moved = contrasted(base, anti, expert, self.strength)
        if self.top_p is not None:
            moved = moved.masked_fill(~nucleus(base, self.top_p), -math.inf)
        if self.plausibility is not None:
            moved = moved.masked_fill(~plausible(base, self.plausibility), -math.inf)
        return moved.log_softmax(-1).to(scores.dtype)


def own_columns(scores: Tensor, vocabulary: int | None) -> Tensor:
    """Scores whose columns behind the vocabulary, which stand for no token, are -inf."""
    if vocabulary is None or scores.shape[1] == vocabulary:
        return scores
    if scores.shape[1] < vocabulary:
        raise ValueError(f"the guided model has {scores.shape[1]} tokens, fewer than vocabulary={vocabulary}")
    scores = scores.clone()
    scores[:, vocabulary:] = -math.inf
    return scores


def told(logits: Tensor, scores: Tensor, vocabulary: int | None, who: str) -> Tensor:
    """Another model's logits, fitted to the columns of the guided model's scores, on its device."""
    wide, has = scores.shape[1], logits.shape[1]
    if vocabulary is None and has != wide:
        raise ValueError(
            f"the {who} has {has} tokens and the guided model {wide}; if the first ones are the same "
            "and the rest is padding, give vocabulary=len(tokenizer)"
        )
    if vocabulary is not None and has < vocabulary:
        raise ValueError(f"the {who} has {has} tokens, fewer than vocabulary={vocabulary}")
    known = logits[:, :vocabulary].to(scores.device)
    if not bool(torch.isfinite(known).all()):
        raise CheckFailed("decoding", f"got scores of the {who} that are not finite numbers")
    return torch.nn.functional.pad(known, (0, wide - known.shape[1]))
