from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from safeguard.runtime.cache import ResultCache
from safeguard.types import Finding

JUDGE = ("guard", "model digest", "policy digest", "")


def finding(score: float = 0.5) -> Finding:
    return Finding({"toxic": score})


def test_what_was_put_is_found_and_counted() -> None:
    cache = ResultCache()
    key = cache.key("a text", JUDGE)

    assert cache.get(key) is None
    cache.put(key, finding(0.25))

    assert cache.get(key) == finding(0.25)
    statistics = cache.statistics
    assert (statistics.hits, statistics.misses, statistics.entries) == (1, 1, 1)
    assert statistics.hit_rate == 0.5


def test_another_text_policy_model_or_setting_has_another_key() -> None:
    cache = ResultCache()
    keys = {
        cache.key(text, judge)
        for text in ("a", "b")
        for judge in (JUDGE, ("other", *JUDGE[1:]), (*JUDGE[:2], "other", ""), (*JUDGE[:3], "other"))
    }

    assert len(keys) == 8


def test_parts_of_a_key_do_not_run_into_one_another() -> None:
    cache = ResultCache()

    assert cache.key("c", ("a", "b")) != cache.key("bc", ("a", ""))


def test_each_cache_has_a_salt_of_its_own() -> None:
    assert ResultCache().key("a", JUDGE) != ResultCache().key("a", JUDGE)


def test_half_a_surrogate_pair_has_a_key_too() -> None:
    cache = ResultCache()

    assert cache.key("\ud800", JUDGE) != cache.key("\ufffd", JUDGE)


def test_the_least_recently_used_goes_first() -> None:
    cache = ResultCache(max_entries=2)
    a, b, c = (cache.key(text, JUDGE) for text in "abc")
    cache.put(a, finding())
    cache.put(b, finding())
    cache.get(a)

    cache.put(c, finding())

    assert [cache.get(key) is not None for key in (a, b, c)] == [True, False, True]
    assert cache.statistics.evictions == 1


def test_the_cache_stays_within_its_bytes() -> None:
    cache = ResultCache(max_bytes=1000)  # an entry with one score counts 456 bytes, so two fit
    for text in "abcd":
        cache.put(cache.key(text, JUDGE), finding())

    assert cache.statistics.entries == 2
    assert cache.statistics.bytes == 912


def test_a_finding_larger_than_the_cache_is_not_kept() -> None:
    cache = ResultCache(max_bytes=100)
    cache.put(cache.key("a", JUDGE), finding())

    assert cache.statistics.entries == 0


def test_the_same_key_twice_is_one_entry() -> None:
    cache = ResultCache()
    key = cache.key("a", JUDGE)
    cache.put(key, finding(0.1))
    cache.put(key, finding(0.2))

    assert cache.get(key) == finding(0.2)
    assert (cache.statistics.entries, cache.statistics.bytes) == (1, 456)


@pytest.mark.parametrize("scores", [{}, {"a": float("nan")}, {"a": 1.5}, {"a": -0.1, "b": 0.5}])
def test_what_is_no_judgement_is_never_kept(scores: dict[str, float]) -> None:
    cache = ResultCache()
    key = cache.key("a", JUDGE)
    cache.put(key, Finding(scores))

    assert cache.get(key) is None


def test_a_caller_that_changes_its_finding_changes_nobody_elses() -> None:
    cache = ResultCache()
    key = cache.key("a", JUDGE)
    given = {"toxic": 0.9}
    cache.put(key, Finding(given))
    given["toxic"] = 0.0
    first = cache.get(key)
    assert first is not None
    assert isinstance(first.scores, dict)
    first.scores["toxic"] = 0.0

    assert cache.get(key) == finding(0.9)


def test_no_content_stays_in_the_cache() -> None:
    cache = ResultCache()
    canary = "".join(["can", "ary-", str(os.getpid())])
    cache.put(cache.key(canary, JUDGE), finding())
    kept = [canary]

    assert canary not in repr(cache)
    assert not any(canary in repr(held) for held in cache._found.items())
    assert [r for r in gc.get_referrers(canary) if r is kept] == [kept]


def test_clear_forgets_the_findings() -> None:
    cache = ResultCache()
    key = cache.key("a", JUDGE)
    cache.put(key, finding())
    cache.clear()

    assert cache.get(key) is None
    assert cache.statistics.bytes == 0


def test_threads_keep_the_bounds() -> None:
    cache = ResultCache(max_entries=10)

    def work(worker: int) -> bool:
        found = True
        for n in range(200):
            key = cache.key(str(n % 20), JUDGE)
            cache.put(key, finding((n % 20) / 20))
            held = cache.get(key)
            found = found and held in (None, finding((n % 20) / 20))
        return found

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert cache.statistics.entries == 10
    assert cache.statistics.bytes == 4560


@pytest.mark.parametrize("options", [{"max_entries": 0}, {"max_bytes": 0}])
def test_bounds_must_be_positive(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_entries and max_bytes must be 1 or more"):
        ResultCache(**options)
