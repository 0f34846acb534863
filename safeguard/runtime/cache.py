"""ResultCache: what a check said of a text, kept for the next time, bounded in entries and bytes.

Keys are digests with a salt that only this process knows, values are scores and offsets: nothing in it can be
read back as content.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from safeguard.locks import ForkLock
from safeguard.types import Finding

_ENTRY_BYTES = 400  # key, node of the table and the finding itself
_SCORE_BYTES = 56  # a float and its place in a dict; the names are shared
_SPAN_BYTES = 120


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Look-ups since the cache was made, and what it holds now. `bytes` is an estimate from above."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of look-ups that found something, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class ResultCache:
    """Findings by text and what judged it; the least recently used go first.

    max_entries, max_bytes: whichever is reached first. Safe to share between threads and between checks. A
    forked process goes on with a copy.
    """

    def __init__(self, *, max_entries: int = 10_000, max_bytes: int = 64_000_000) -> None:
        if max_entries < 1 or max_bytes < 1:
            raise ValueError(
                f"max_entries and max_bytes must be 1 or more, got {max_entries} and {max_bytes}"
            )
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._salt = os.urandom(32)
        self._lock = ForkLock()
        self._found: OrderedDict[bytes, tuple[Finding, int]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def key(self, text: str, judge: Sequence[str]) -> bytes:
        """Digest of a text and of what judges it: pack, policy, settings. Salted, 32 bytes."""
        made = hashlib.blake2b(key=self._salt, digest_size=32)
        for part in (*judge, text):
            raw = part.encode("utf-8", "surrogatepass")
            made.update(len(raw).to_bytes(8, "little"))  # so that no two lists of parts run into one another
            made.update(raw)
        return made.digest()

    def get(self, key: bytes) -> Finding | None:
        """The finding under this key, its own copy; None where there is none."""
        with self._lock:
            held = self._found.get(key)
            if held is None:
                self._misses += 1
                return None
            self._hits += 1
            self._found.move_to_end(key)
        return _copy(held[0])

    def put(self, key: bytes, finding: Finding) -> None:
        """Keep a finding, unless it is no judgement (no scores, NaN, outside [0, 1]) or too large."""
        if not finding.scores or not all(0.0 <= score <= 1.0 for score in finding.scores.values()):
            return
        size = _ENTRY_BYTES + _SCORE_BYTES * len(finding.scores) + _SPAN_BYTES * len(finding.spans)
        if size > self._max_bytes:
            return
        kept = _copy(finding)
        with self._lock:
            before = self._found.pop(key, None)
            self._bytes += size - (before[1] if before else 0)
            self._found[key] = (kept, size)
            while len(self._found) > self._max_entries or self._bytes > self._max_bytes:
                _, (_, gone) = self._found.popitem(last=False)
                self._bytes -= gone
                self._evictions += 1

    def clear(self) -> None:
        """Forget all findings; the counts stay."""
        with self._lock:
            self._found.clear()
            self._bytes = 0

    @property
    def statistics(self) -> CacheStatistics:
        """Hits, misses and size at this moment."""
        with self._lock:
            return CacheStatistics(self._hits, self._misses, self._evictions, len(self._found), self._bytes)

    def __repr__(self) -> str:
        s = self.statistics
        return f"ResultCache(entries={s.entries}, bytes={s.bytes}, hits={s.hits}, misses={s.misses})"


def _copy(finding: Finding) -> Finding:
    return replace(finding, scores=dict(finding.scores))
