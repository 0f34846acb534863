from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from safeguard.errors import QueueClosed
from safeguard.runtime.cache import ResultCache
from safeguard.runtime.checks import BatchedCheck, CachedCheck, warm_up
from safeguard.runtime.tokenising import TextBatch, tokenise_once
from safeguard.testing import BrightCheck, FailingCheck, ScoreCheck, WordCheck
from safeguard.types import Finding, Modality, Scores, Span


def test_a_batched_check_says_what_the_check_says() -> None:
    check = BatchedCheck(WordCheck("rude"))

    assert check(["a rude day", "", "good"]) == WordCheck("rude")(["a rude day", "", "good"])
    assert (check.name, check.modality) == ("words", "text")


def test_callers_at_the_same_time_get_the_findings_of_their_own_texts() -> None:
    check = BatchedCheck(WordCheck("rude"), max_items=8)
    start = threading.Barrier(8)

    def work(worker: int) -> list[float]:
        start.wait(30)
        texts = [f"{'rude' if (worker + n) % 3 == 0 else 'good'} {n}" for n in range(50)]
        return [_score(check([text])[0]) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))

    assert found == [[1.0 if (worker + n) % 3 == 0 else 0.0 for n in range(50)] for worker in range(8)]


def test_a_check_with_lanes_has_its_runs_side_by_side_each_in_one_lane() -> None:
    laned = _Laned()
    batched = BatchedCheck(laned)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batched, ["a"])
        assert laned.began.wait(30)
        second = pool.submit(batched, ["b"])

    # the one that came first had the check for itself, the other one knew that it was not alone
    assert laned.asked == ["wide", "narrow"]
    assert [first.result(), second.result()] == [[{"x": 0.5}], [{"x": 0.5}]]


def test_an_event_loop_gets_the_findings_of_its_own_texts() -> None:
    check = BatchedCheck(WordCheck("rude"))

    async def both() -> Any:
        return await asyncio.gather(check.acall(["a rude day", "good"]), check.acall(["good"]))

    with asyncio.Runner() as runner:
        first, second = runner.run(both())

    assert [_score(finding) for finding in [*first, *second]] == [1.0, 0.0, 0.0]


def test_pictures_are_batched_too() -> None:
    check = BatchedCheck(BrightCheck())
    white, black = np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4, 3), np.uint8)

    assert check([white, black]) == [{"bright": 1.0}, {"bright": 0.0}]


def test_what_a_check_raises_comes_through() -> None:
    with pytest.raises(RuntimeError, match="device lost"):
        BatchedCheck(FailingCheck())(["a"])


def test_one_text_in_the_place_of_a_batch_is_refused() -> None:
    with pytest.raises(TypeError, match="a check takes a batch"):
        BatchedCheck(WordCheck())("text")


def test_a_closed_check_takes_no_more() -> None:
    check = BatchedCheck(WordCheck())
    check.close()

    with pytest.raises(QueueClosed):
        check(["a"])


def test_thresholds_labels_and_digest_are_those_of_the_check() -> None:
    check = _Known()

    for wrapped in (BatchedCheck(check), CachedCheck(check, ResultCache())):
        assert getattr(wrapped, "digest") == "d" * 64  # noqa: B009
        assert getattr(wrapped, "operating_points") == {"standard": {"bad": 0.7}}  # noqa: B009
        assert getattr(wrapped, "labels") == ("bad",)  # noqa: B009
    assert not hasattr(BatchedCheck(WordCheck()), "digest")


def test_a_cached_text_is_not_judged_again() -> None:
    inner = WordCheck("rude")
    check = CachedCheck(inner, ResultCache())

    first = check(["rude", "good", "rude"])
    second = check(["good", "new", "rude"])

    assert inner.seen == ["rude", "good", "new"]
    assert first[0] == Finding({"bad": 1.0}, (Span(0, 4, "bad"),))
    assert second == [first[1], Finding({"bad": 0.0}), first[0]]


def test_bare_scores_are_cached_as_findings() -> None:
    check = CachedCheck(ScoreCheck({"a": {"bad": 0.5}}), ResultCache())

    assert check(["a"]) == [Finding({"bad": 0.5})]
    assert check(["a"]) == [Finding({"bad": 0.5})]


def test_a_failure_is_never_cached() -> None:
    cache = ResultCache()
    check = CachedCheck(FailingCheck(when=lambda text: text == "bad"), cache)

    with pytest.raises(RuntimeError, match="device lost"):
        check(["good", "bad"])

    assert cache.statistics.entries == 0


def test_two_checks_without_digests_share_nothing() -> None:
    cache = ResultCache()
    high, low = ScoreCheck({}, {"bad": 0.9}), ScoreCheck({}, {"bad": 0.1})

    assert CachedCheck(high, cache)(["a"]) == [Finding({"bad": 0.9})]
    assert CachedCheck(low, cache)(["a"]) == [Finding({"bad": 0.1})]


def test_the_same_model_under_another_policy_is_asked_again() -> None:
    cache, inner = ResultCache(), _Known()

    CachedCheck(inner, cache, policy="p")(["a"])
    CachedCheck(inner, cache, policy="p")(["a"])
    CachedCheck(inner, cache, policy="q")(["a"])

    assert inner.seen == ["a", "a"]


def test_tokens_of_the_call_are_handed_on() -> None:
    inner = _Known()
    batch = TextBatch(["a"])

    CachedCheck(inner, ResultCache())(batch)

    assert inner.memo is batch.memo


def test_an_empty_batch_stays_empty() -> None:
    assert CachedCheck(WordCheck(), ResultCache())([]) == []
    assert BatchedCheck(WordCheck())([]) == []


@pytest.mark.parametrize("item", [None, b"a", 3])
def test_what_is_no_text_is_refused_and_not_cached(item: Any) -> None:
    with pytest.raises(TypeError, match="item 1 of the batch must be text in a list, got"):
        CachedCheck(WordCheck(), ResultCache())(["a", item])


def test_a_check_that_loses_rows_is_refused() -> None:
    lossy = ScoreCheck({})
    lossy.__class__ = _Lossy

    with pytest.raises(ValueError, match="check 'scores' gave 0 results for 1 items"):
        CachedCheck(lossy, ResultCache())(["a"])


def test_pictures_are_not_cached() -> None:
    with pytest.raises(ValueError, match="only texts are cached, and 'bright' judges image"):
        CachedCheck(BrightCheck(), ResultCache())


def test_warming_up_reaches_the_check_inside() -> None:
    inner = WordCheck()

    BatchedCheck(inner).warmup()
    CachedCheck(inner, ResultCache()).warmup()

    assert inner.seen == ["a", "a"]


def test_a_picture_check_without_a_warmup_judges_a_grey_picture() -> None:
    seen: list[Any] = []

    class Keeps(BrightCheck):
        def __call__(self, batch: Sequence[Any], /) -> list[Any]:
            seen.extend(batch)
            return [{"bright": 0.0}]

    warm_up(Keeps())

    assert [image.shape for image in seen] == [(64, 64, 3)]


def _score(row: Finding | Scores) -> float:
    return (row.scores if isinstance(row, Finding) else row)["bad"]


class _Laned:
    """Says which form of it was asked; a run ends when the other one has begun."""

    name = "laned"
    modality: Modality = "text"
    lanes = 2

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.began, self._second = threading.Event(), threading.Event()

    def in_one_lane(self) -> Callable[[Sequence[str]], list[Scores]]:
        return lambda batch: self._judge("narrow", batch)

    def __call__(self, batch: Sequence[str], /) -> list[Scores]:
        return self._judge("wide", batch)

    def _judge(self, form: str, batch: Sequence[str]) -> list[Scores]:
        self.asked.append(form)
        self.began.set()
        if len(self.asked) == 2:
            self._second.set()
        assert self._second.wait(30)
        return [{"x": 0.5} for _ in batch]


class _Known(WordCheck):
    digest = "d" * 64
    labels = ("bad",)
    operating_points = {"standard": {"bad": 0.7}}  # noqa: RUF012
    memo: Any = None

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        self.memo = getattr(batch, "memo", None)
        return super().__call__(batch)


class _Lossy(ScoreCheck):
    def __call__(self, batch: Sequence[Any], /) -> list[Any]:
        return []


class _Tokenising:
    """A check that tokenises as ours do, and keeps what it had to tokenise itself."""

    name = "tokenising"
    modality: Modality = "text"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, batch: Sequence[str], /) -> list[Scores]:
        return [{"length": size / 100} for size in tokenise_once(batch, "digest", self._tokenise)]

    def _tokenise(self, texts: list[str]) -> list[int]:
        self.asked += texts
        return [len(text) for text in texts]


def test_checks_with_one_tokenizer_share_it_behind_their_queues() -> None:
    first, second = _Tokenising(), _Tokenising()
    batch = TextBatch(["ab", "c", "ab"])

    found = BatchedCheck(first)(batch)

    assert found == BatchedCheck(second)(batch) == [{"length": 0.02}, {"length": 0.01}, {"length": 0.02}]
    assert (first.asked, second.asked) == (["ab", "c"], [])
    assert set(batch.memo) == {("digest", "ab"), ("digest", "c")}


def test_callers_of_a_shared_run_get_tokens_of_their_own_texts_only() -> None:
    inside, gate = threading.Event(), threading.Event()

    class Held(_Tokenising):
        def __call__(self, batch: Sequence[str], /) -> list[Scores]:
            if "first" in batch:
                inside.set()
                gate.wait(30)
            return super().__call__(batch)

    check = BatchedCheck(Held())
    batches = [TextBatch(["first"]), TextBatch(["mine", "both"]), TextBatch(["yours", "both"])]
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(check, batches[0])]
        inside.wait(30)
        calls += [pool.submit(check, batch) for batch in batches[1:]]
        while len(check.batcher._state.waiting) < 2:
            time.sleep(0.001)
        gate.set()
        for call in calls:
            call.result(30)

    assert check.batcher.statistics.runs == 2  # the second one was shared
    assert [{text for _, text in batch.memo} for batch in batches] == [
        {"first"},
        {"mine", "both"},
        {"yours", "both"},
    ]


def test_a_plain_list_goes_through_the_queue_as_well() -> None:
    check = _Tokenising()

    assert BatchedCheck(check)(["ab"]) == [{"length": 0.02}]
    assert check.asked == ["ab"]
