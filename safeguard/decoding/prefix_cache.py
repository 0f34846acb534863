"""A language model that is asked for the scores of the next token again and again, with its own KV cache.

Generation asks with rows that grow by one token, are put in another order (beams) or become shorter again
(assisted generation). What is cached is used as far as a row really goes on from it, so the answer depends on
the rows alone, whatever was asked before.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

from safeguard.errors import MissingExtra

try:
    import torch
    from torch import Tensor
except ImportError as exc:
    raise MissingExtra("torch", extra="torch") from exc

_MOST_COMPARED = 2**22  # tokens compared at a time when rows are looked up in the cache


@dataclass(slots=True)
class _Cached:
    """What a model has read: ids, mask (row, token), its keys and values, its last scores."""

    ids: Tensor
    mask: Tensor
    cache: Any
    logits: Tensor


def padding_mask(ids: Tensor, prompt_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Attention mask (row, token), int64, of rows that begin with prompts padded on the left.

    prompt_mask: (prompt, width), for rows that are its prompts in order, each as often as the others; what
    follows the width counts. Without it the leading run of pad_token_id is left out, but never a whole row.
    Raises ValueError when the rows are no multiple of the prompts.
    """
    mask = torch.ones_like(ids, dtype=torch.long)
    if prompt_mask is not None:
        prompts = len(prompt_mask)
        if not prompts or len(ids) % prompts:
            raise ValueError(
                f"attention_mask must have one row per prompt, got {prompts} for {len(ids)} rows of tokens"
            )
        width = min(prompt_mask.shape[1], ids.shape[1])
        rows = prompt_mask.to(device=ids.device).repeat_interleave(len(ids) // prompts, 0)
        mask[:, :width] = rows[:, :width].to(torch.long)
    elif pad_token_id is not None:
        real = ids != pad_token_id
        real[:, -1] = True
        mask = (real.long().cumsum(1) > 0).long()
    return mask


class CachedModel:
    """Scores of the next token by a causal model, whose cache is only ever a shortcut.

    Safe to use from several threads: one of them has the cache, the others do without. Models whose state
    cannot be taken back (recurrent ones, sliding windows) read all anew where that would be needed.
    Raises ValueError for a model in training mode: dropout would give other scores each time.
    """

    def __init__(self, model: Any, *, use_cache: bool = True) -> None:
        if getattr(model, "training", False):
            raise ValueError(f"{type(model).__name__} is in training mode; call its eval() first")
        self.model = model
        self._use_cache = use_cache
        inner = getattr(model, "get_base_model", lambda: model)()  # PEFT hides what its model takes
        parameters = inspect.signature(inner.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_keep = "logits_to_keep" in parameters
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        self._tokens: int | None = getattr(embeddings, "num_embeddings", None)
        self._lock = threading.Lock()
        self._cached: _Cached | None = None

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (row, token of the vocabulary), float32, of what follows the rows.

        ids, mask: (row, token); mask is 0 where padded. Raises ValueError for rows without tokens and for
        tokens that the model does not have.
        """
        if ids.dim() != 2 or not ids.shape[1] or not len(ids):
            raise ValueError(f"there must be tokens to continue, got input_ids of shape {tuple(ids.shape)}")
        device = self.model.device
        ids, mask = ids.to(device), mask.to(device)
        with self._lock:
            cached, self._cached = self._cached, None
        if cached is not None and torch.equal(cached.ids, ids) and torch.equal(cached.mask, mask):
            found = cached
        else:
            found = self._answer(ids, mask, self._continued(cached, ids, mask))
        if self._use_cache:
            with self._lock:
                self._cached = found
        return found.logits

    def _continued(self, cached: _Cached | None, ids: Tensor, mask: Tensor) -> tuple[Any, int]:
        """A cache of the longest beginning that all rows share with cached ones, and its length."""
        if cached is None or cached.cache is None:
            return None, 0
        rows, keep = _lookup(cached, ids, mask)
        keep = min(keep, ids.shape[1] - 1)  # the last token is read again: its scores are what is wanted
        drop = cached.ids.shape[1] - keep
        if keep <= 0 or (drop and not _can_crop(cached.cache)):
            return None, 0
        if rows is not None:
            cached.cache.reorder_cache(rows)
        if drop:
            cached.cache.crop(-drop)
        return cached.cache, keep

    def _answer(self, ids: Tensor, mask: Tensor, start: tuple[Any, int]) -> _Cached:
        """Reads what is new; equal rows that begin (a prompt to be continued many times) only once."""
        if start[0] is not None or not self._use_cache or len(ids) < 2:
            return self._read(ids, mask, start)
        both, place = torch.stack([ids, mask.to(ids)]).unique_consecutive(return_inverse=True, dim=1)
        if both.shape[1] == len(ids):
            return self._read(ids, mask, start)
        once = self._read(both[0], both[1].to(mask), start)
        if not hasattr(once.cache, "reorder_cache"):
            return self._read(ids, mask, start)
        once.cache.reorder_cache(place)
        return _Cached(ids.clone(), mask, once.cache, once.logits[place])

    def _read(self, ids: Tensor, mask: Tensor, start: tuple[Any, int]) -> _Cached:
        cache, read = start
        new = ids[:, read:]
        if self._tokens is not None and bool((new >= self._tokens).any() or (new < 0).any()):
            raise ValueError(
                f"{type(self.model).__name__} has {self._tokens} tokens, got token {int(new.max())}; "
                "it must have the vocabulary of the model it guides"
            )
        named: dict[str, Any] = {"input_ids": new, "attention_mask": mask, "use_cache": self._use_cache}
        if self._takes_positions:
            named["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, read:]
        if self._takes_keep:
            named["logits_to_keep"] = 1
        if cache is not None:
            named["past_key_values"] = cache
        out = self.model(**named)
        cache = getattr(out, "past_key_values", None) if self._use_cache else None
        return _Cached(ids.clone(), mask, cache, out.logits[:, -1].float())


def _lookup(cached: _Cached, ids: Tensor, mask: Tensor) -> tuple[Tensor | None, int]:
    """Cached row for each row (None: the same, in order) and how many tokens all of them share."""
    width = min(cached.ids.shape[1], ids.shape[1])
    old_ids, old_mask = cached.ids[:, :width], cached.mask[:, :width]
    same_rows = len(old_ids) == len(ids) and torch.equal(old_ids, ids[:, :width])
    if same_rows and torch.equal(old_mask, mask[:, :width]):
        return None, width
    best, rows = [], []
    step = max(1, _MOST_COMPARED // max(1, len(old_ids) * width))
    for i in range(0, len(ids), step):
        same = (ids[i : i + step, None, :width] == old_ids) & (mask[i : i + step, None, :width] == old_mask)
        shared = same.long().cumprod(-1).sum(-1)  # (row, cached row)
        length, row = shared.max(1)
        best.append(length)
        rows.append(row)
    return torch.cat(rows), int(torch.cat(best).min())


def _can_crop(cache: Any) -> bool:
    return bool(getattr(cache, "is_croppable", False)) and not any(getattr(cache, "is_sliding", ()))
