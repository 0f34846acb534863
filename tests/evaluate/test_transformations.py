"""The transformations of the evasion table: seeded, and undone by normalisation where they can be."""

from __future__ import annotations

import pytest

from safeguard.errors import UnknownName
from safeguard.evaluate.transformations import TRANSFORMATIONS, transform
from safeguard.text import views
from safeguard.train.augment import DISGUISES

TEXT = "Please water the garden before sunset"
UNDONE = (
    "bidi", "tags", "soft_hyphens", "base64", "hex", "rot13", "url", "html", "base64_of_url",
    "zero_width", "combining", "fullwidth",
)  # fmt: skip


def test_every_disguise_of_training_is_among_them() -> None:
    assert set(DISGUISES) < set(TRANSFORMATIONS)


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS))
def test_same_seed_gives_the_same_text_whatever_stands_beside_it(name: str) -> None:
    assert transform(name, [TEXT, "a b"], 7)[0] == transform(name, ["other", TEXT], 7)[1]


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS))
def test_every_transformation_changes_the_text_for_some_seed(name: str) -> None:
    assert {transform(name, [TEXT], seed)[0] for seed in range(5)} != {TEXT}


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS))
def test_odd_texts_pass_through_without_error(name: str) -> None:
    assert len(transform(name, ["", " ", "ok", "👍", "12 34", "\ud800", "한국어"], 3)) == 7


@pytest.mark.parametrize("name", UNDONE)
@pytest.mark.parametrize("seed", range(4))
def test_the_words_are_found_again_in_some_reading(name: str, seed: int) -> None:
    (changed,) = transform(name, [TEXT], seed)

    assert TEXT.casefold() not in changed.casefold()
    assert any(TEXT.casefold() in " ".join(view.text.casefold().split()) for view in views(changed))


def test_an_unknown_transformation_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="no transformation named 'morse'; known: base64, "):
        transform("morse", ["a"], 0)
