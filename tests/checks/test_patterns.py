"""Patterns of the user: what they find, and that none of them can hang or hide a fault."""

from __future__ import annotations

import base64
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safeguard.checks.patterns import Patterns
from safeguard.errors import MissingExtra
from safeguard.types import Span

pytest.importorskip("re2", reason="google-re2 is not installed (extra patterns)")


@pytest.fixture
def check() -> Patterns:
    return Patterns({"code": [r"\bkey-[0-9]{4}\b"], "tools": [r"pipe\s+bombs?", r"kn(i|y)fe"]})


def flags(check: Patterns, text: str) -> set[str]:
    (found,) = check([text])
    return {category for category, score in found.scores.items() if score == 1.0}


def test_an_empty_batch_gives_no_findings(check: Patterns) -> None:
    assert check([]) == []


def test_an_empty_text_scores_zero_in_every_category(check: Patterns) -> None:
    assert check([""])[0].scores == {"code": 0.0, "tools": 0.0}


def test_a_match_scores_one_and_says_where(check: Patterns) -> None:
    (found,) = check(["é use KEY-1234 now"])

    assert found.scores == {"code": 1.0, "tools": 0.0}
    assert found.spans == (Span(6, 14, "code"),)  # é, space, use, space; in characters, not bytes


def test_a_batch_gives_what_its_texts_give_one_by_one(check: Patterns) -> None:
    texts = ["a knife", "", "pipe   bomb", "ｋｎｉｆｅ", "\ud800 knyfe", "\0"]

    assert check(texts) == [check([text])[0] for text in texts]


@pytest.mark.parametrize("text", ["a kitchen", "key-12345", "pipe, bomb"])
def test_what_does_not_match_scores_zero(check: Patterns, text: str) -> None:
    assert flags(check, text) == set()


@pytest.mark.parametrize(
    "text", ["k n i f e", "kn1fe", "ｋｎｉｆｅ", "kn\u200bife", base64.b64encode(b"a knife").decode()]
)
def test_disguised_and_decoded_text_is_searched_too(check: Patterns, text: str) -> None:
    assert flags(check, text) == {"tools"}


def test_the_span_in_a_code_is_that_of_the_code(check: Patterns) -> None:
    code = base64.b64encode(b"a pipe bomb").decode()  # 11 bytes: 16 characters

    assert Span(4, 20, "tools") in check([f"say {code}"])[0].spans


def test_case_counts_where_the_pattern_says_so() -> None:
    check = Patterns([r"(?-i)Kn"])

    assert [flags(check, text) for text in ("Kn", "kn")] == [{"patterns"}, set()]


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)*b", r"(.*a){12}$", r"(a?){50}a{50}c", "a[^b]*b|a"])
def test_no_pattern_hangs(pattern: str) -> None:
    check = Patterns([pattern])
    text = "a" * 20_000 + "!"
    started = time.process_time()
    check([text])

    assert time.process_time() - started < 5  # Python's re would take longer than the universe has


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(?=a)b", "invalid perl operator"),
        (r"(a)\1", "invalid escape sequence"),
        ("(", "missing"),
        ("((a{1,100}){1,100}){1,100}", "(too large|bad repetition|invalid repetition)"),
        ("a{1,1001}", "(bad repetition|invalid repetition)"),
        ("\ud800", "no valid text"),
    ],
)
def test_what_cannot_run_in_linear_time_is_refused_without_its_words(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"pattern 2 of 'secret' is refused by RE2: {why}") as caught:
        Patterns({"secret": ["fine", pattern]})

    assert pattern not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("pattern", ["", "a*", "x?", "^"])
def test_a_pattern_that_matches_everywhere_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern 1 of 'patterns' matches the empty text"):
        Patterns([pattern])


@pytest.mark.parametrize("patterns", [[], {"a": []}, ["x"] * 1001])
def test_none_or_too_many_patterns_are_refused(patterns: Any) -> None:
    with pytest.raises(ValueError, match="there must be 1 to 1000 patterns, got"):
        Patterns(patterns)


@pytest.mark.parametrize("patterns", ["knife", b"knife", [b"knife"], [None]])
def test_what_is_no_collection_of_strings_is_a_type_error(patterns: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a (collection of strings|string), got"):
        Patterns(patterns)


def test_a_file_gives_a_category_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("# keys\n\nkey-[0-9]+\n", encoding="utf-8")

    check = Patterns.load(tmp_path / "keys.txt")

    assert (check.name, check(["KEY-1"])[0].scores) == ("patterns/keys", {"keys": 1.0})


def test_a_file_without_patterns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("# nothing\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"none.txt has no patterns; write one on each line"):
        Patterns.load(tmp_path / "none.txt")


def test_the_digest_tells_lists_apart() -> None:
    assert Patterns(["a"]).digest == Patterns(["a"]).digest != Patterns(["b"]).digest


def test_without_re2_the_extra_is_named_and_python_re_does_not_step_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)

    with pytest.raises(
        MissingExtra, match=r"'google-re2' is not installed; run: pip install '.*\[patterns\]'"
    ):
        Patterns(["a"])
