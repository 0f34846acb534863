from __future__ import annotations

from safeguard.refiners.language_model import cut, special_pattern


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
