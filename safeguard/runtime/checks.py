"""A check with a micro-batcher before it, or a result cache: still a check, with the same answers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from safeguard.runtime.batcher import MicroBatcher
from safeguard.runtime.cache import ResultCache
from safeguard.runtime.tokenising import Memo, TextBatch
from safeguard.types import Check, Finding, Scores

_CHARACTERS_PER_TOKEN = 4  # of English text; a budget of runs needs no exact number
_SHARED = ("digest", "labels", "operating_points", "settings")


class BatchedCheck:
    """A check of which callers at the same time share the runs; see `MicroBatcher` for the options.

    max_tokens: budget of one run for texts, at four characters a token; pictures count by `max_items` alone.
    A check with `lanes`, of which a call runs in parts side by side, has as many runs going on at a time, and
    then each of them `in_one_lane`.
    """

    def __init__(
        self,
        check: Check[Any],
        *,
        max_items: int = 64,
        max_tokens: int = 16_384,  # as text-embeddings-inference has it
        max_queue: int = 1024,
        max_wait_s: float | None = None,
        linger_s: float = 0.0,
    ) -> None:
        self.name, self.modality = check.name, check.modality
        self.check = check
        self.__dict__.update(_known(check))
        is_text = check.modality == "text"
        lanes = getattr(check, "lanes", 1) if is_text else 1
        self._narrow: Check[Any] = getattr(check, "in_one_lane", lambda: check)() if lanes > 1 else check
        self.batcher: MicroBatcher[Any, Finding | Scores] = MicroBatcher(
            self._judge_texts if is_text else check,
            max_items=max_items,
            max_cost=max_tokens if is_text else None,
            cost=_tokens if is_text else None,
            max_queue=max_queue,
            max_wait_s=max_wait_s,
            linger_s=linger_s,
            lanes=lanes,
            name=check.name,
        )

    def __call__(self, batch: Sequence[Any], /) -> list[Finding | Scores]:
        """What the check says of each item. Raises QueueFull, and what the check raises for these items."""
        return self.batcher(self._items(batch))

    async def acall(self, batch: Sequence[Any]) -> list[Finding | Scores]:
        """The same for an event loop, which is never held, whatever the size of its pool of threads."""
        return await self.batcher.acall(self._items(batch))

    def _items(self, batch: Sequence[Any]) -> Sequence[Any]:
        """What the batcher queues: pictures as they are, texts each with the memo of its call."""
        if isinstance(batch, str):
            raise TypeError("a check takes a batch: a list of texts, got one text")
        if self.modality != "text":
            return batch
        memo = batch.memo if isinstance(batch, TextBatch) else {}
        return [(text, memo) for text in batch]

    def _judge_texts(self, items: Sequence[tuple[Any, Memo]]) -> Sequence[Finding | Scores]:
        """A run over texts of several calls, with what each has tokenised; each gets back its own only."""
        batch = TextBatch(text for text, _ in items)
        for memo in {id(memo): memo for _, memo in items}.values():
            batch.memo.update(memo)
        known = set(batch.memo)
        found = (self.check if self.batcher.running < 2 else self._narrow)(batch)
        made = [key for key in list(batch.memo) if key not in known]
        if made:
            owners: dict[Any, list[Memo]] = {}
            for text, memo in items:
                if isinstance(text, str):
                    owners.setdefault(text, []).append(memo)
            for key in made:
                for memo in owners.get(key[1], ()):
                    memo[key] = batch.memo[key]
        return found

    def warmup(self) -> None:
        """Let the check make what its first runs would have to wait for."""
        warm_up(self.check)

    def close(self) -> None:
        """Refuse new calls, and wait for those that came before."""
        self.batcher.close()


class CachedCheck:
    """A text check that is asked only for what it has not judged before.

    policy: digest of the policy in force; it is part of the key, as are the check's own digest and its
    `settings`. A check without a digest shares nothing with any other. A call that raises keeps nothing.
    """

    def __init__(self, check: Check[Any], cache: ResultCache, *, policy: str = "") -> None:
        if check.modality != "text":
            raise ValueError(f"only texts are cached, and {check.name!r} judges {check.modality}")
        self.name, self.modality = check.name, check.modality
        self.check, self.cache = check, cache
        self.__dict__.update(_known(check))
        digest = getattr(check, "digest", None) or secrets.token_hex(16)
        self._judge = (check.name, digest, policy, str(getattr(check, "settings", "")))

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        """A finding per text, in order; each text that is new goes to the check, once."""
        for i, text in enumerate(batch):
            if not isinstance(text, str) or isinstance(batch, str):
                raise TypeError(f"item {i} of the batch must be text in a list, got {type(text).__name__}")
        keys = [self.cache.key(text, self._judge) for text in batch]
        found: dict[bytes, Finding | None] = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        new = {key: text for key, text in zip(keys, batch, strict=True) if found[key] is None}
        if new:
            memo = batch.memo if isinstance(batch, TextBatch) else None
            rows = self.check(TextBatch(new.values(), memo))
            if len(rows) != len(new):
                raise ValueError(f"check {self.name!r} gave {len(rows)} results for {len(new)} items")
            for key, row in zip(new, rows, strict=True):
                fresh = row if isinstance(row, Finding) else Finding(row)
                found[key] = fresh
                self.cache.put(key, fresh)
        return [finding for key in keys if (finding := found[key]) is not None]

    def warmup(self) -> None:
        """Let the check make what its first runs would have to wait for."""
        warm_up(self.check)

    def close(self) -> None:
        """Forget all findings and close the check inside."""
        self.cache.clear()
        close = getattr(self.check, "close", None)
        if close is not None:
            close()


def warm_up(check: Check[Any]) -> None:
    """Has a check make what its first runs would have to wait for; one that offers no way judges one item."""
    own = getattr(check, "warmup", None)
    if own is not None:
        own()
    elif check.modality == "text":
        check(["a"])
    else:
        import numpy as np

        check([np.full((64, 64, 3), 127, np.uint8)])


def _known(check: Check[Any]) -> dict[str, Any]:
    return {name: getattr(check, name) for name in _SHARED if hasattr(check, name)}


def _tokens(item: tuple[Any, Memo]) -> int:
    text = item[0]
    return 2 + len(text) // _CHARACTERS_PER_TOKEN if isinstance(text, str) else 1
