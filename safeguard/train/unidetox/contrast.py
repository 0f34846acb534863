"""Sampling from two models at once, each with its own cache: contrastive decoding and its soft successor.

Sources: Li et al. 2023 (contrastive decoding, adaptive plausibility); UniDetox (Lu et al. 2025); SoCD of HSPD
(2026). The random numbers of a text depend on the seed and its number alone, so a run that was interrupted
gives the same texts as one that was not.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safeguard.errors import MissingExtra

try:
    import torch
    from torch import Tensor
except ImportError as exc:
    raise MissingExtra("torch", "train") from exc

Combine = Callable[[Tensor, Tensor], Tensor]
"""(base logits, toxic logits), both (row, token), -> scores (row, token)."""


def contrast(base: Tensor, toxic: Tensor, *, alpha: float, beta: float) -> Tensor:
    """(1 + beta) base - beta toxic where p_base >= alpha max p_base, else -inf; base - toxic at beta = inf.

    base, toxic: (row, token), logits. alpha: in (0, 1].
    """
    cut = base.max(-1, keepdim=True).values + math.log(alpha)
    moved = base - toxic if math.isinf(beta) else (1 + beta) * base - beta * toxic
    return moved.masked_fill(base < cut, -math.inf)


def soft_contrast(base: Tensor, toxic: Tensor, *, least_k: int = 10) -> Tensor:
    """SoCD: base - a toxic for the k tokens that gain most in the toxic model, base for the others.

    base, toxic: (row, token), logits. D = ||p_base - p_toxic||, a = t / (1 + t), t = log(1 + D),
    k = a V between least_k and V, among tokens with log p_toxic > log p_base. D is what HSPD's call computes:
    its Sinkhorn distance is given each distribution as one point, and that of two points is their distance.
    """
    base_log, toxic_log = base.log_softmax(-1), toxic.log_softmax(-1)
    distance = (base_log.exp() - toxic_log.exp()).norm(dim=-1)
    step = torch.log1p(distance)
    strength = (step / (1 + step)).unsqueeze(-1)  # (row, 1)
    size = base.shape[-1]
    k = (strength * size).floor().clamp(min=min(least_k, size), max=size)
    gain = toxic_log - base_log
    rank = gain.argsort(-1, descending=True).argsort(-1)
    return torch.where((gain > 0) & (rank < k), base - strength * toxic, base)


def draw(seed: int, text: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), (count,), float64, of one text of one seed."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def pick(scores: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """Tokens (row,) sampled from softmax(scores / temperature) of the top_k, 0 for all, by inverse transform.

    scores: (row, token), -inf never chosen. uniform: (row,), in [0, 1). Raises ValueError for a row without
    any finite score.
    """
    if not bool(torch.isfinite(scores).any(-1).all()) or bool(torch.isnan(scores).any()):
        raise ValueError("scores must be numbers, one at least per row finite; a model gives NaN")
    if 0 < top_k < scores.shape[-1]:
        scores, tokens = scores.topk(top_k, dim=-1)
    else:
        tokens = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    scores = scores.double() / temperature
    reached = scores.softmax(-1).cumsum(-1)
    place = (reached > uniform.to(reached).unsqueeze(-1) * reached[:, -1:]).long().argmax(-1)
    return tokens.gather(-1, place.unsqueeze(-1)).squeeze(-1)


class Twins:
    """Two models of one vocabulary that read the same rows step by step, each with its own cache.

    shared_cache: the toxic model reads the keys and values of the base for all but the newest tokens, as the
    released code of UniDetox does. Raises ValueError for models in training mode and for other vocabularies.
    """

    def __init__(self, base: Any, toxic: Any, *, shared_cache: bool = False) -> None:
        for model in (base, toxic):
            if model.training:
                raise ValueError(f"{type(model).__name__} is in training mode; call its eval() first")
        sizes = [model.get_input_embeddings().num_embeddings for model in (base, toxic)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"both models must have one vocabulary, got {sizes[0]} and {sizes[1]} tokens")
        self._base, self._toxic, self._shared = base, toxic, shared_cache
        self._caches: list[Any] = [None, None]

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def __call__(self, new: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (row, token) of both, float32, of what follows the rows.

        new: (row, new tokens), what was not read yet. mask: (row, all tokens), 0 where padded on the left.
        """
        if self._shared:
            toxic = self._with_bases_cache(new, mask)
        else:
            toxic, self._caches[1] = _read(self._toxic, new, mask, self._caches[1])
        base, self._caches[0] = _read(self._base, new, mask, self._caches[0])
        return base, toxic.to(base.device)

    def _with_bases_cache(self, new: Tensor, mask: Tensor) -> Tensor:
        cache = self._caches[0]
        toxic, cache = _read(self._toxic, new, mask, cache)
        if self._caches[0] is not None:
            if not getattr(cache, "is_croppable", True):
                raise ValueError(
                    f"shared_cache needs a cache that can be cropped; {type(cache).__name__} cannot"
                )
            cache.crop(-new.shape[1])  # takes the toxic model's own entries out again
        return toxic


def _read(model: Any, new: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    device = model.device
    named: dict[str, Any] = {
        "input_ids": new.to(device),
        "attention_mask": mask.to(device),
        "use_cache": True,
    }
    takes = inspect.signature(model.forward).parameters
    if "position_ids" in takes:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        named["position_ids"] = positions.to(device)
    if "logits_to_keep" in takes:
        named["logits_to_keep"] = 1
    if cache is not None:
        named["past_key_values"] = cache
    out = model(**named)
    return out.logits[:, -1].float(), out.past_key_values


def sample(
    twins: Twins,
    ids: Tensor,
    mask: Tensor,
    uniform: Tensor,
    combine: Combine,
    *,
    ends: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    min_tokens: int = 0,
) -> Iterator[tuple[int, list[int], bool]]:
    """Yields (row, its new tokens without the end, whether it ended by itself) as soon as a row is finished.

    ids, mask: (row, prompt), padded on the left. uniform: (row, new tokens at most). ends: tokens that end a
    text; they are not chosen before min_tokens.
    """
    texts: list[list[int]] = [[] for _ in ids]
    open_rows = set(range(len(texts)))
    new, stops = ids, torch.tensor(list(ends), dtype=torch.long)
    for step in range(uniform.shape[1]):
        base, toxic = twins(new, mask)
        scores = combine(base, toxic)
        if step < min_tokens:
            scores = _without(scores, base, stops)
        tokens = pick(scores, uniform[:, step], temperature=temperature, top_k=top_k)
        for row, token in enumerate(tokens.tolist()):
            if row not in open_rows:
                continue
            if token in ends:
                open_rows.remove(row)
                yield row, texts[row], True
            else:
                texts[row].append(token)
        if not open_rows:
            return
        new = tokens.to(mask.device).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    for row in sorted(open_rows):
        yield row, texts[row], False


def _without(scores: Tensor, base: Tensor, stops: Tensor) -> Tensor:
    """The scores with the stops banned; a row with nothing left takes the base's likeliest other token."""
    stops = stops.to(scores.device)
    scores = scores.index_fill(-1, stops, -math.inf)
    empty = ~torch.isfinite(scores).any(-1)
    if bool(empty.any()):
        best = base.index_fill(-1, stops, -math.inf).argmax(-1)
        scores[empty, best[empty]] = 0.0
    return scores
