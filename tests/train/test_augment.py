from __future__ import annotations

import random

import pytest

from safeguard.text import normalise
from safeguard.train.augment import (
    _HOMOGLYPHS,
    _LEET,
    _PADDING,
    _ZERO_WIDTH,
    DISGUISES,
    UNDONE,
    disguise,
    draw_disguise,
)

TEXT = "Please water the garden before sunset"


@pytest.mark.parametrize("name", sorted(DISGUISES))
def test_same_seed_gives_the_same_text(name: str) -> None:
    assert disguise(TEXT, 7, name=name) == disguise(TEXT, 7, name=name)


@pytest.mark.parametrize("name", sorted(DISGUISES))
def test_every_disguise_changes_the_text_for_some_seed(name: str) -> None:
    assert any(disguise(TEXT, seed, name=name) != TEXT for seed in range(5))


@pytest.mark.parametrize("name", sorted(DISGUISES))
@pytest.mark.parametrize("text", ["", " ", "ok", "👍", "12 34"])
def test_short_and_odd_texts_pass_through_without_error(name: str, text: str) -> None:
    assert isinstance(disguise(text, 3, name=name, variety="test"), str)


def test_spacing_keeps_the_letters_in_order() -> None:
    changed = disguise(TEXT, 1, name="spacing")
    assert "".join(c for c in changed if c.isalpha()) == TEXT.replace(" ", "")


def test_padding_keeps_the_text_whole() -> None:
    assert TEXT in disguise(TEXT, 2, name="padded_around", variety="test")


def test_swapped_letters_keep_the_letters_of_each_word() -> None:
    changed = disguise(TEXT, 5, name="swapped_letters")
    assert [sorted(w) for w in changed.split()] == [sorted(w) for w in TEXT.split()]


def test_varieties_share_no_padding_and_no_invisible_character() -> None:
    assert not set(_PADDING["train"]) & set(_PADDING["test"])
    assert not set(_ZERO_WIDTH["train"]) & set(_ZERO_WIDTH["test"])


def test_look_alikes_of_the_varieties_are_of_different_scripts() -> None:
    assert not set(_HOMOGLYPHS["train"].values()) & set(_HOMOGLYPHS["test"].values()) - {"п"}
    assert _LEET["train"] != _LEET["test"]


def test_every_disguise_is_drawn_some_time() -> None:
    rng = random.Random(0)
    assert {draw_disguise(rng) for _ in range(600)} == set(DISGUISES)


@pytest.mark.parametrize("name", sorted(UNDONE))
def test_what_counts_as_undone_is_taken_off_by_normalisation(name: str) -> None:
    undone = normalise(disguise(TEXT, 3, name=name)).text
    words = set(TEXT.lower().split())
    assert len(words & set(undone.lower().split())) >= 0.6 * len(words)


def test_dropping_leaves_words_of_three_letters_alone() -> None:
    assert DISGUISES["dropped_letters"](random.Random(0), "the cat sat", "train") == "the cat sat"
