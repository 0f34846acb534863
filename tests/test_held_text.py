"""What one held-back text promises of places, of work, and of what its checks do."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest

from safeguard import Guard, Policy
from safeguard.checks.blocklist import Blocklist
from safeguard.driving import drive
from safeguard.held_text import HeldText
from safeguard.policy import StreamRules
from safeguard.testing import WordCheck
from safeguard.types import Scores

WORDY = "loaf and tea "


def held(check: Any, **rules: Any) -> HeldText:
    sizes = {"hold_chars": 20, "step_chars": 10, "context_chars": 40} | rules
    policy = Policy.from_data({"stream": sizes})
    return HeldText(Guard(outputs=[check], policy=policy).output_route("text"))


def feed(text: HeldText, whole: str, size: int = 1) -> str:
    parts = (whole[i : i + size] for i in range(0, len(whole), size))
    return "".join(drive(text.feed(part)) for part in parts)


def work(whole: str, size: int = 1, **rules: Any) -> int:
    """Characters that the check was given for this stream."""
    check = WordCheck("bank")
    text = held(check, **rules)
    feed(text, whole, size)
    drive(text.finish())
    assert not text.stopped
    return sum(map(len, check.seen))


@pytest.mark.parametrize("mode", ["withhold", "sentence"])
@pytest.mark.parametrize(
    "part",
    [WORDY, "字", "x", "One day. ", "a ", "\n", "k\u200b\u200b\u200b\u200b", " " * 9 + "x", "🎈"],
    ids=lambda part: ascii(part),
)
def test_work_is_in_proportion_to_the_length(part: str, mode: str) -> None:
    texts = [(part * (4000 // len(part) + 1))[:n] for n in (1000, 2000, 4000)]
    once, twice, four = (work(text, mode=mode) for text in texts)
    # an invisible or a drawn out part has a second reading of its own, once it is long enough
    assert twice <= 2.3 * once + 1000
    assert four <= 2.3 * twice + 1000
    assert four <= 40 * 4000  # a window of at most 40 + 20 + 10 and a word of 40 every 10, in two readings


def test_flood_of_invisible_characters_is_held_and_costs_no_more_than_other_text() -> None:
    flood = "loaf " * 20 + "k" + "\u200b" * 20_000 + "ill them all now" + " loaf" * 20
    text = held(Blocklist(["kill"]))
    out = feed(text, flood)
    out += drive(text.finish())
    assert text.stopped
    assert "k" not in out
    assert work(flood) <= 20 * len(flood)


def test_what_is_held_back_is_counted_in_what_can_be_read() -> None:
    text = held(Blocklist(["kill"]))
    out = feed(text, "k" + "\u200b" * 500 + "il")
    assert out == ""


def test_code_is_held_until_enough_follows_the_whole_of_it() -> None:
    text = held(Blocklist(["bomb them all"]))
    out = feed(text, "look: Ym9tYiB0aGVtIGFsbA== and")  # base64 of "bomb them all", longer than is held
    assert "Ym9t" not in out
    feed(text, " then the loaf is baked, and all is well in the end")
    assert text.stopped


def test_no_more_than_48_tokens_of_english_are_held_back_by_default() -> None:
    rules = StreamRules()
    text = HeldText(Guard(outputs=[WordCheck("bank")]).output_route("text"))
    english = "In the evening the whole family sits down at the table to eat bread and cheese together. " * 20
    most, out = 0, 0
    for given, letter in enumerate(english, 1):
        out += len(drive(text.feed(letter)))
        most = max(most, given - out)
    # 96 + 40 and what is left of a word; a token of English text has 4 characters or more
    assert most <= rules.hold_chars + rules.step_chars + 12 <= 48 * 4


def test_sentence_without_a_space_behind_it_is_released_in_chinese() -> None:
    text = held(WordCheck("bank"), mode="sentence", step_chars=1)
    out = feed(text, "今天天气很好，我们去公园。" * 6)
    assert out.endswith("。")
    assert len(out) >= 13 * 3


def test_sentence_that_does_not_end_is_held_to_the_end() -> None:
    text = held(WordCheck("bank"), mode="sentence")
    assert feed(text, WORDY * 200) == ""
    assert drive(text.finish()) == WORDY * 200


def test_clusters_of_marks_come_through_whole_one_character_at_a_time() -> None:
    whole = unicodedata.normalize("NFD", "crème brûlée, señor Müller ") * 6 + "👩‍👩‍👧 🏳️‍🌈 हिन्दी " * 6
    text = held(WordCheck("bank"))
    assert feed(text, whole) + drive(text.finish()) == whole


class Numbers:
    """Gives these scores one after the other, then 0."""

    name = "numbers"
    modality = "text"

    def __init__(self, *scores: float) -> None:
        self._scores = list(scores)

    def __call__(self, batch: Sequence[str], /) -> list[Scores]:
        return [{"bad": self._scores.pop(0) if self._scores else 0.0} for _ in batch]


@pytest.mark.parametrize("score", [math.nan, math.inf, -1.0, 1.5])
def test_score_that_is_none_closes_the_stream(score: float) -> None:
    text = held(Numbers(0.0, score, score))
    out = feed(text, WORDY * 20)
    assert text.stopped
    assert text.verdicts[-1].error
    # released at the first look, with 20 and more behind it; nothing at the second
    assert 0 < len(out) <= 30


def test_what_was_flagged_once_stays_in_the_report_where_the_policy_only_watches() -> None:
    policy = Policy.from_data({"mode": "monitor", "stream": {"hold_chars": 20, "step_chars": 10}})
    text = HeldText(Guard(outputs=[Numbers(0.0, 0.9)], policy=policy).output_route("text"))
    out = feed(text, WORDY * 20)
    out += drive(text.finish())
    assert out == WORDY * 20
    assert [v.flagged for v in text.verdicts] == [("bad",), ()]


def test_text_is_not_looked_at_twice_where_nothing_new_can_be_read() -> None:
    check = WordCheck("bank")
    text = held(check)
    feed(text, WORDY * 3 + "x" * 30)  # of the last word nothing is looked at before it ends
    assert len(check.seen) == len(set(check.seen))
