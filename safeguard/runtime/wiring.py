"""What a policy's `runtime` part makes of the checks of one guard: shared runs, a cache, or nothing."""

from __future__ import annotations

from typing import Any

from safeguard.policy import Policy
from safeguard.runtime.cache import CacheStatistics, ResultCache
from safeguard.runtime.checks import BatchedCheck, CachedCheck
from safeguard.types import Check


class Runtime:
    """Puts a micro-batcher and the guard's one cache before checks, as the policy says.

    device: where the models run. With batching "auto" only models on a GPU share runs: there a run of many
    costs little more than a run of one, which on a CPU it does not. A check is wrapped once, however many
    surfaces it is on.
    """

    def __init__(self, policy: Policy, device: str) -> None:
        rules = policy.runtime
        self._rules, self._policy_digest = rules, policy.digest
        self._batches = rules.batching == "always" or (rules.batching == "auto" and device != "cpu")
        self._wrapped: dict[int, tuple[Check[Any], Check[Any]]] = {}
        self._cache: ResultCache | None = None
        if rules.cache_entries:
            self._cache = ResultCache(max_entries=rules.cache_entries, max_bytes=rules.cache_bytes)

    def wrap(self, check: Check[Any]) -> Check[Any]:
        """The check as the guard should call it; the same one each time."""
        known = self._wrapped.get(id(check))
        if known is None:
            known = self._wrapped[id(check)] = (
                check,
                self._made(check),
            )  # kept, so that its id stays its own
        return known[1]

    @property
    def statistics(self) -> CacheStatistics | None:
        """Of the cache, None where there is none."""
        return None if self._cache is None else self._cache.statistics

    def _made(self, check: Check[Any]) -> Check[Any]:
        rules = self._rules
        # a check without a digest has no model behind it: sharing its runs would only make callers wait
        if self._batches and (rules.batching == "always" or getattr(check, "digest", None)):
            check = BatchedCheck(
                check,
                max_items=rules.max_items,
                max_tokens=rules.max_tokens,
                max_queue=rules.max_queue,
                max_wait_s=rules.max_wait_s,
                linger_s=rules.linger_s,
            )
        if self._cache is not None and check.modality == "text":
            check = CachedCheck(check, self._cache, policy=self._policy_digest)
        return check
