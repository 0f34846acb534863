from __future__ import annotations

from safeguard.runtime.tokenising import TextBatch, tokenise_once


class Lengths:
    """Stands for a tokenizer; keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str]) -> list[int]:
        self.asked.append(texts)
        return [len(text) for text in texts]


def test_a_second_check_with_the_same_tokenizer_uses_the_tokens_of_the_first() -> None:
    batch, tokenise = TextBatch(["ab", "c"]), Lengths()

    assert tokenise_once(batch, "t", tokenise) == [2, 1]
    assert tokenise_once(TextBatch(["c", "def"], batch.memo), "t", tokenise) == [1, 3]
    assert tokenise.asked == [["ab", "c"], ["def"]]


def test_another_tokenizer_makes_its_own_tokens() -> None:
    batch, tokenise = TextBatch(["ab"]), Lengths()

    tokenise_once(batch, "t", tokenise)
    tokenise_once(batch, "u", tokenise)

    assert tokenise.asked == [["ab"], ["ab"]]


def test_equal_texts_are_tokenised_once() -> None:
    tokenise = Lengths()

    assert tokenise_once(["ab", "c", "ab"], "t", tokenise) == [2, 1, 2]
    assert tokenise.asked == [["ab", "c"]]


def test_nothing_is_kept_for_a_plain_list() -> None:
    texts, tokenise = ["ab"], Lengths()

    tokenise_once(texts, "t", tokenise)
    tokenise_once(texts, "t", tokenise)

    assert tokenise.asked == [["ab"], ["ab"]]


def test_two_calls_share_nothing() -> None:
    assert TextBatch(["ab"]).memo is not TextBatch(["ab"]).memo
