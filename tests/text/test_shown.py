"""Overrides and backspaces: the text as it is shown, beside the text without them."""

from __future__ import annotations

import pytest

from safeguard.text import views

RLO, LRO, LRI, PDF, PDI = "\u202e", "\u202d", "\u2066", "\u202c", "\u2069"


def texts(text: str) -> list[str]:
    return [view.text for view in views(text)][1:]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"go {RLO}llik{PDF} on", "go kill on"),
        (f"go {RLO}llik", "go kill"),  # never closed
        (f"go {RLO}llik\nnow", "go kill\nnow"),  # the line ends it
        (f"k{LRO}{LRI}{RLO}{LRI}l{PDI}{LRI}i{PDI}{PDF}{PDI}{PDF}l", "kill"),  # one swap of Boucher et al.
        (f"{RLO}l{LRO}il{PDF}k{PDF}", "kill"),  # what is embedded keeps its order: k, il, l
        ("kix\bll", "kill"),
        ("kixy\b\x7fll", "kill"),
        ("\bkill", "kill"),
    ],
)
def test_what_is_shown_is_read(text: str, shown: str) -> None:
    assert shown in texts(text)


def test_the_reading_without_the_marks_stays_beside_it() -> None:
    assert texts("kill\b\b\b\b him") == ["kill him", " him"]  # a model is given all the letters
    assert texts(f"{RLO}kill{PDF}") == ["kill", "llik"]


def test_a_backspace_does_not_reach_over_a_line() -> None:
    assert texts("kill\n\b\b\b\bhim") == ["kill\nhim"]


def test_the_span_of_a_turned_word_is_the_whole_override() -> None:
    view = next(view for view in views(f"go {RLO}llik{PDF} on") if view.name == "shown")

    assert view.span(3, 7) == (3, 9)  # "go " is 3, then two marks and four letters


def test_very_deep_nesting_is_read_without_error() -> None:
    # 125 levels count, the rest is dropped: turned round an odd number of times
    assert "kill" in texts(RLO * 500 + "llik")
