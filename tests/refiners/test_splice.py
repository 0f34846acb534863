"""Expected sentences were written by hand as a careful editor would leave them."""

from __future__ import annotations

import pytest

from safeguard.refiners.splice import Edit, is_blank, splice


def edit(text: str, into: str = "", *, word: str = "xx") -> str:
    """Every place of `word` in the text becomes `into`."""
    edits = []
    place = text.find(word)
    while place >= 0:
        edits.append(Edit(place, place + len(word), into))
        place = text.find(word, place + len(word))
    return splice(text, edits, no_article=frozenset({"clothes"}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat, xx, on a mat", "a cat, on a mat"),
        ("a cat xx on a mat", "a cat on a mat"),
        ("a cat with xx and xx", "a cat"),
        ("a cat with xx, on a mat", "a cat, on a mat"),
        ("a cat with xx and a dog", "a cat with a dog"),
        ("a cat and xx", "a cat"),
        ("xx and a cat", "a cat"),
        ("xx, a cat", "a cat"),
        ("xx of a cat", "a cat"),
        ("a xx of a cat", "a cat"),
        ("a cat, xx", "a cat"),
        ("a cat full of xx.", "a cat."),
        ("a cat, xx. A dog", "a cat. A dog"),
        ("a cat (xx) on a mat", "a cat on a mat"),
        ("a cat, (xx:1.3), on a mat", "a cat, on a mat"),
        ("a cat [xx] [xx] sits", "a cat sits"),
        ("a x-xx-y cat", "a x-y cat"),
        ("a cat\nxx\na dog", "a cat\na dog"),
        ("a xx angel", "an angel"),
        ("an xx cat", "a cat"),
        ("a cat's xx's tail", "a cat's tail"),
        ("a sign 'xx' on a wall", "a sign on a wall"),
        ('a sign "xx" on a wall', "a sign on a wall"),
        ("xx", ""),
        ("xx, xx. xx", ""),
    ],
)
def test_a_cut_leaves_a_whole_sentence(text: str, expected: str) -> None:
    assert edit(text) == expected


@pytest.mark.parametrize(
    ("text", "into", "expected"),
    [
        ("an xx cat", "red", "a red cat"),
        ("a xx cat", "odd", "an odd cat"),
        ("An xx cat", "red", "A red cat"),
        ("in a xx today", "everyday clothes", "in everyday clothes today"),
        ("xx cat", "red", "red cat"),
        ("(xx:1.2)", "red", "(red:1.2)"),
    ],
)
def test_a_replacement_fits_its_article(text: str, into: str, expected: str) -> None:
    assert edit(text, into) == expected


def test_a_capital_is_kept_in_a_replacement() -> None:
    assert edit("Bad cat", "red", word="Bad") == "Red cat"


def test_capitals_are_kept_in_a_replacement() -> None:
    assert edit("BAD cat", "red", word="BAD") == "RED cat"


def test_a_text_that_began_with_a_capital_still_does() -> None:
    assert edit("Bad cat sits", word="Bad") == "Cat sits"


def test_a_cut_before_a_replacement_leaves_one_blank() -> None:
    assert splice("a big bad cat", [Edit(2, 5, ""), Edit(6, 9, "good")]) == "a good cat"


def test_text_away_from_an_edit_keeps_its_odd_blanks() -> None:
    assert edit("a  cat ,, xx and\ta  dog ,,") == "a  cat ,, a  dog ,,"


def test_an_edit_to_none_changes_nothing() -> None:
    assert splice("a cat ,, on", [Edit(2, 5, None)]) == "a cat ,, on"


@pytest.mark.parametrize("text", ["", " ", "a, of the", "1.3", "with and", "--"])
def test_a_text_of_links_alone_is_blank(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", ["cat", "a cat", "猫", "the red"])
def test_a_text_with_a_thing_in_it_is_not_blank(text: str) -> None:
    assert not is_blank(text)
