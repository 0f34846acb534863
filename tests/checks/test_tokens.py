from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models

from safeguard.checks.tokens import TokenCutter


def test_special_tokens_are_found_and_left_out_of_the_ids(tokenizer: Tokenizer) -> None:
    cut = TokenCutter(tokenizer)

    assert (cut.prefix, cut.suffix, cut.special_tokens) == ([2], [3], 2)
    assert cut(["good day"])[0].ids.tolist() == [5, 6]


def test_offsets_are_characters_of_the_text(tokenizer: Tokenizer) -> None:
    assert TokenCutter(tokenizer)(["é good\tday"])[0].offsets.tolist() == [[0, 1], [2, 6], [7, 10]]


def test_the_tokenizer_given_is_not_changed(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=7)

    cut = TokenCutter(tokenizer)

    assert len(cut(["good day good day good day"])[0].ids) == 6
    assert len(tokenizer.encode("good day good day").ids) == 4
    assert cut.pad_id == 7


def test_special_tokens_written_out_by_a_user_stay_plain_text(tokenizer: Tokenizer) -> None:
    ids = TokenCutter(tokenizer)(["rude [SEP] [PAD]"])[0].ids.tolist()

    assert 3 not in ids
    assert 0 not in ids


def test_a_word_too_long_for_the_vocabulary_is_cut_not_hidden(tokenizer: Tokenizer) -> None:
    found = TokenCutter(tokenizer)(["good " + "a" * 250 + " day"])[0]

    # 250 characters as pieces of 100, 100, 50; the word between them is one [UNK] for plain WordPiece
    assert found.ids.tolist() == [5, 8, *[9] * 99, 8, *[9] * 99, 8, *[9] * 49, 6]
    assert found.offsets[1].tolist() == [5, 6]
    assert found.offsets[250].tolist() == [254, 255]


def test_half_a_surrogate_pair_is_no_error_and_moves_nothing(tokenizer: Tokenizer) -> None:
    assert TokenCutter(tokenizer)(["\ud800 good"])[0].offsets[-1].tolist() == [2, 6]


def test_a_tokenizer_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="gives no tokens for plain text"):
        TokenCutter(
            Tokenizer(models.WordPiece({"x": 0}, unk_token="x")).from_str(
                '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'
            )
        )


def test_equal_tokenizers_have_equal_digests_whatever_they_pad_to(tokenizer: Tokenizer) -> None:
    before = TokenCutter(tokenizer).digest
    tokenizer.enable_padding(length=7)
    same = TokenCutter(tokenizer).digest
    tokenizer.add_tokens(["another"])

    assert before == same
    assert TokenCutter(tokenizer).digest != before
