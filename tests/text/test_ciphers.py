"""Ciphers that keep words apart: found by their words, and no honest word is taken for one."""

from __future__ import annotations

import codecs

import pytest

from safeguard.text import View, views


def decoded(text: str) -> str | None:
    return next((view.text for view in views(text) if view.name == "decoded"), None)


def reading(text: str) -> View:
    return next(view for view in views(text) if view.name == "decoded")


@pytest.mark.parametrize(
    ("text", "clear"),
    [
        ("uvqr gur oyhr grncbg", "hide the blue teapot"),  # rot13
        ("Gb uvqr V arrq gur TNEQRA", "To hide I need the GARDEN"),
        ("jung n oyhr grncbg", "what a blue teapot"),  # Jung is a word too, but what is commoner
        ("please xvyy the lights", "please kill the lights"),
        ("say: gur oyhr grncbgg. Thanks", "say: the blue teapott. Thanks"),  # misspelt at the end of a run
        ("srwv gsv yofv gvzklg", "hide the blue teapot"),  # atbash
        ("topaet eulb eht edih", "hide the blue teapot"),  # backwards
        ("say: gur oyhr grncbg. Thanks", "say: the blue teapot. Thanks"),
        ("x v y y the lights", "kill the lights"),  # letters set apart
        ("Kilo India Lima Lima the lights", "kill the lights"),
        ("KILO, INDIA, LIMA, LIMA", "kill"),
    ],
)
def test_words_in_a_cipher_are_read(text: str, clear: str) -> None:
    assert decoded(text) == clear


@pytest.mark.parametrize(
    "text",
    [
        "Bjork and Zlatan visited Suez, Evra and Nev went to Lima in November.",
        "Mike met Oscar and Victor at the Hotel Sierra.",
        "Ich möchte gerne wissen, wo der Bahnhof ist.",
        "Quiero saber dónde está la estación de tren, por favor.",
        "Je voudrais savoir où se trouve la gare. Vorrei sapere dove si trova la stazione.",
        "Jeg vil gerne vide hvor stationen er. Chcę wiedzieć gdzie jest dworzec.",
        "Saya ingin tahu di mana stasiunnya. Nataka kujua kituo kiko wapi.",
        "knab",  # a name; backwards it is a bank, but four letters alone are chance
        "def foo(bar, baz): return qux",
    ],
)
def test_names_and_other_languages_are_no_cipher(text: str) -> None:
    assert decoded(text) is None


def test_the_span_of_a_deciphered_run_is_that_of_the_run() -> None:
    view = reading("say gur oyhr grncbg now")
    place = view.text.index("blue")

    # "say " is 4 characters; the run of three words is deciphered as one: 3 + 1 + 4 + 1 + 6
    assert view.span(place, place + 4) == (4, 19)


def test_a_long_text_in_rot13_is_read_whole() -> None:
    sentence = "The carpenter measured the shelf twice before cutting the board. "

    assert decoded(codecs.encode(sentence * 20, "rot13")) == sentence * 20
