"""Sampled continuations of prompts, many of each: every prompt is read once, and no vocabulary is sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from safeguard.decoding.contrastive import nucleus
from safeguard.decoding.prefix_cache import CachedModel
from safeguard.errors import MissingExtra

try:
    import torch
    from torch import Tensor
except ImportError as exc:
    raise MissingExtra("torch", extra="torch") from exc

Processor = Callable[[Tensor, Tensor], Tensor]
"""(rows (row, token), scores (row, token)) -> scores, as `generate()` calls its logits processors."""
_TRIES = 8  # rejections before the nucleus is worked out; one is enough for nine rows of ten at top_p 0.9


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def continued(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    copies: int,
    new_tokens: int,
    pad: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    processors: Sequence[Processor] = (),
) -> Tensor:
    """New tokens (prompt x copies, new token at most), `pad` behind the token that ends a text.

    ids, mask: (prompt, token), padded on the left. What `generate()` draws with the same settings, by other
    random numbers and without the model's own generation settings but its end tokens. generator: on the CPU.
    """
    reader, stops = CachedModel(model), torch.tensor(end_tokens(model), dtype=torch.long)
    rows, told = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
    running = torch.ones(len(rows), dtype=torch.bool)
    for _ in range(new_tokens):
        scores = reader(rows, told)
        for processor in processors:
            scores = processor(rows.to(scores.device), scores)
        tokens = drawn(scores / temperature, generator, top_p=top_p, top_k=top_k).to(rows.device)
        tokens = torch.where(running.to(rows.device), tokens, pad)
        rows = torch.cat([rows, tokens.unsqueeze(1)], 1)
        told = torch.cat([told, torch.ones_like(told[:, :1])], 1)
        running &= ~torch.isin(tokens.cpu(), stops)
        if not bool(running.any()):
            break
    return rows[:, ids.shape[1] :]


def end_tokens(model: Any) -> list[int]:
    """Tokens that end a text of this model, by its generation settings."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return []
    return [int(end) for end in ends] if isinstance(ends, list | tuple) else [int(ends)]


def drawn(scores: Tensor, generator: torch.Generator, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Tokens (row,) drawn from softmax(scores) within the top_k (0 for all) and then the nucleus.

    scores: (row, token), -inf never drawn. A token belongs to the nucleus where those likelier than it have
    less than top_p together, so a draw outside is drawn anew and no row is sorted. Tokens as likely as the
    last of the nucleus are in it. Raises ValueError for a row without a finite score, or with NaN.
    """
    if bool(torch.isnan(scores).any()) or not bool(torch.isfinite(scores).any(-1).all()):
        raise ValueError("scores must be numbers, one at least per row finite; a model gives NaN")
    scores = scores.float()
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    share = scores.softmax(-1)
    out = torch.empty(len(share), dtype=torch.long, device=share.device)
    left = torch.arange(len(share), device=share.device)
    for attempt in range(_TRIES + 1):
        inside = share if len(left) == len(share) else share[left]
        if attempt == _TRIES:
            inside = inside.masked_fill(~nucleus(scores[left], top_p), 0.0)
        tokens = _by_chance(inside, generator)
        own = inside.gather(-1, tokens)
        fine = (own > 0).squeeze(-1)
        if top_p < 1 and attempt < _TRIES:
            fine &= (inside * (inside > own)).sum(-1) < top_p
        if attempt == _TRIES:
            tokens = torch.where(fine.unsqueeze(-1), tokens, inside.argmax(-1, keepdim=True))
            fine = torch.ones_like(fine)
        out[left[fine]] = tokens[fine].squeeze(-1)
        left = left[~fine]
        if not len(left):
            break
    return out


def _by_chance(share: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (row, 1) drawn by inverse transform. share: (row, token), any sum above 0."""
    reached = share.cumsum(-1)
    uniform = torch.rand(len(share), 1, generator=generator).to(share.device)
    place = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    return place.clamp(max=share.shape[-1] - 1)
