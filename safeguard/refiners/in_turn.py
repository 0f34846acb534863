"""Two refiners in turn: a language model, and where it gives nothing that passes, a simpler one.

The flow judges each rewrite and asks again for one that is still flagged, as often as `attempts` says. What
the language model wrote is then rewritten once more, being nearer to safe than the original; the last turn is
the simple refiner's, on the original prompt, so that nothing is lost that it alone would have saved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from safeguard.errors import RefinerError, SafeguardError
from safeguard.types import Refiner, RefineRequest

log = logging.getLogger(__name__)


class InTurn:
    """Asks `first`, then `last` for what `first` gave nothing of use, ran out of time for, or failed on.

    tries: how often `first` is asked for one prompt. at_once: prompts that `first` gets in a call. limit_s:
    after so long in one call `first` is asked for no more prompts, so that a large batch does not run into
    the time limit of the policy and lose all of its rewrites.
    """

    def __init__(
        self,
        first: Refiner,
        last: Refiner,
        *,
        tries: int = 2,
        at_once: int = 1,
        limit_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if tries < 1 or at_once < 1:
            raise ValueError(f"tries and at_once must be 1 or more, got {tries} and {at_once}")
        if not limit_s > 0:
            raise ValueError(f"limit_s must be above 0, got {limit_s}")
        self._first, self._last = first, last
        self._tries, self._at_once, self._limit_s, self._clock = tries, at_once, limit_s, clock
        self.name = f"{first.name}+{last.name}"
        self.attempts = tries + 1

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        """One text per request; the prompt itself where neither has anything to offer."""
        texts: list[str | None] = [None] * len(requests)
        wanted = [place for place, request in enumerate(requests) if len(request.tried) < self._tries]
        end = self._clock() + self._limit_s
        for start in range(0, len(wanted), self._at_once):
            if self._clock() >= end:
                left = len(wanted) - start
                log.warning("out of time: refiner=%s left=%d of %d", self._first.name, left, len(wanted))
                break
            places = wanted[start : start + self._at_once]
            for place, text in zip(places, self._asked([requests[p] for p in places]), strict=True):
                texts[place] = text
        rest = [place for place, text in enumerate(texts) if text is None]
        if rest:
            found = _counted(self._last, [requests[place] for place in rest])
            for place, softer in zip(rest, found, strict=True):
                texts[place] = softer
        return [text if text is not None else r.prompt for text, r in zip(texts, requests, strict=True)]

    def _asked(self, requests: Sequence[RefineRequest]) -> list[str | None]:
        """What `first` makes of each, None for what is of no use: it failed, or changed nothing."""
        now = [replace(r, prompt=r.tried[-1], spans=()) if r.tried else r for r in requests]
        try:
            found = _counted(self._first, now)
        except SafeguardError as exc:
            log.error("refiner failed: refiner=%s error=%s", self._first.name, type(exc).__name__)
            return [None] * len(requests)
        return [
            None if not text.strip() or text == asked.prompt or text in request.tried else text
            for text, asked, request in zip(found, now, requests, strict=True)
        ]


def _counted(refiner: Refiner, requests: Sequence[RefineRequest]) -> list[str]:
    found = refiner(requests)
    if isinstance(found, str) or len(found) != len(requests):
        raise RefinerError(f"refiner {refiner.name!r} gave {len(found)} texts for {len(requests)} prompts")
    return list(found)
