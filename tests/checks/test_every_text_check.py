"""The table that every text check must pass: a new check gets a row in CASES."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from safeguard.types import Finding


@dataclass(frozen=True)
class Case:
    """A check: `unsafe` scores over 0.5 in `category`, its harmless look-alike under it."""

    name: str
    make: Callable[[pytest.FixtureRequest], Any]
    category: str
    unsafe: str
    lookalike: str


def _classifier(request: pytest.FixtureRequest, **options: Any) -> Any:
    from safeguard.checks.text_classifier import TextClassifier
    from safeguard.manifest import Window

    backend, tokenizer, readout = (
        request.getfixturevalue(name) for name in ("rude_backend", "tokenizer", "readout")
    )
    return TextClassifier(backend, tokenizer, readout, Window(tokens=10, overlap=2), **options)


def _blocklist(request: pytest.FixtureRequest) -> Any:
    from safeguard.checks.blocklist import Blocklist

    return Blocklist({"toxic": ["rude"]})


CASES = [
    Case("blocklist", _blocklist, "toxic", "what a rude day", "a crude knife"),
    Case("text_classifier", _classifier, "toxic", "what a rude day", "a kitchen knife"),
    Case(
        "text_classifier-isolated",
        lambda request: _classifier(request, isolated=True, workers=2),
        "toxic",
        "what a rude day",
        "a kitchen knife",
    ),
]
UNICODE = [
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 🇫🇷",
    "\u202eright to left",
    "a\u0301\u0302\u0303",
    "\x00\x07",
    "\ud800",
    "\ufeff",
    "مرحبا",
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.param
    return made


@pytest.fixture
def check(case: Case, request: pytest.FixtureRequest) -> Any:
    return case.make(request)


def scores(result: Any) -> dict[str, float]:
    return dict(result.scores if isinstance(result, Finding) else result)


def test_an_empty_batch_has_no_results(check: Any) -> None:
    assert list(check([])) == []


def test_an_empty_text_has_a_low_score(check: Any, case: Case) -> None:
    assert scores(check([""])[0])[case.category] < 0.5


def test_one_unsafe_item_has_a_high_score(check: Any, case: Case) -> None:
    assert scores(check([case.unsafe])[0])[case.category] >= 0.5


def test_the_nearest_harmless_text_has_a_low_score(check: Any, case: Case) -> None:
    assert scores(check([case.lookalike])[0])[case.category] < 0.5


def test_a_batch_equals_one_by_one_in_order(check: Any, case: Case) -> None:
    batch = [
        case.lookalike,
        case.unsafe,
        "",
        *UNICODE,
        case.unsafe + " " + case.lookalike * 5,
        case.lookalike * 9,
    ]

    together = [scores(result) for result in check(batch)]

    assert len(together) == len(batch)
    assert together == [pytest.approx(scores(check([item])[0]), abs=1e-4) for item in batch]


def test_every_score_is_a_probability_also_for_odd_unicode(check: Any) -> None:
    found = [score for result in check(UNICODE) for score in scores(result).values()]

    assert len(found) >= len(UNICODE)
    assert all(math.isfinite(score) and 0 <= score <= 1 for score in found)


def test_unsafe_words_at_the_end_of_a_long_text_are_found(check: Any, case: Case) -> None:
    assert scores(check(["good day. " * 400 + case.unsafe])[0])[case.category] >= 0.5


def test_a_megabyte_is_judged_or_refused_but_never_passed_unseen(check: Any, case: Case) -> None:
    text = "good day. " * 100_000 + case.unsafe
    try:
        found = scores(check([text])[0])[case.category]
    except ValueError:
        return
    assert found >= 0.5


@pytest.mark.parametrize("item", [None, b"bytes", 3])
def test_what_is_no_text_is_refused(check: Any, item: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        check([item])


def test_the_same_scores_come_from_several_threads(check: Any, case: Case) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: scores(check([(case.unsafe, case.lookalike)[i % 2]])[0]), range(24)))

    assert [score[case.category] >= 0.5 for score in found] == [i % 2 == 0 for i in range(24)]


def test_a_check_says_what_it_is(check: Any, case: Case) -> None:
    assert check.modality == "text"
    assert check.name
    assert case.category in check.labels
