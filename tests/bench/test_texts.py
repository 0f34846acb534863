from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from safeguard.bench.texts import Texts, length_at, mean_length, of_length, read_texts
from safeguard.packs import resolve


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_str(resolve("text-guard-s").read("tokenizer.json").decode())
    found.no_truncation()
    return found


@pytest.mark.parametrize("tokens", [3, 16, 64, 512])
def test_a_made_up_text_has_the_tokens_asked_for(tokenizer: Tokenizer, tokens: int) -> None:
    assert len(tokenizer.encode(of_length(tokens, seed=tokens)).ids) == tokens


def test_a_text_is_never_empty() -> None:
    assert of_length(0) != ""


def test_the_same_seed_gives_the_same_texts() -> None:
    assert Texts().draw(8, 5) == Texts().draw(8, 5)
    assert Texts().draw(8, 5) != Texts().draw(8, 6)


@pytest.mark.parametrize(
    ("share", "length"),
    [(0.0, 3), (0.5, 17), (0.99, 227), (1.0, 512), (0.97, 158)],  # 90 + 0.02 / 0.04 * (227 - 90) = 158.5
)
def test_lengths_follow_the_table(share: float, length: int) -> None:
    assert length_at(share) == length


def test_the_mean_of_made_up_lengths_is_that_of_the_prompts() -> None:
    assert mean_length() == pytest.approx(29.9, rel=0.05)  # measured on the prompts, cut at 512


def test_one_text_of_every_range_of_length_is_drawn() -> None:
    texts = Texts(tuple("x" * n for n in range(1, 101)))

    drawn = [len(text) for text in texts.draw(4, 0)]

    assert [(n - 1) // 25 for n in drawn] == [0, 1, 2, 3]  # quarters of 1..100


def test_nothing_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="at least one text must be drawn, got 0"):
        Texts().draw(0, 0)


def test_texts_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a longer prompt"}\n\n{"text": "short", "label": 1}\n', encoding="utf-8")

    assert read_texts(path).rows == ("short", "a longer prompt")


def test_texts_are_read_from_packed_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "grün"}).encode()))

    assert read_texts(path).rows == ("grün",)


def test_other_files_hold_a_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one line\nanother, longer line\n", encoding="utf-8")

    assert read_texts(path).rows == ("one line", "another, longer line")


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"text": 3}', '{"text": " "}', '["a"]'])
def test_a_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"prompts.jsonl:2 has no text; a line is"):
        read_texts(path)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("plain\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"prompts\.jsonl:1 is no JSON"):
        read_texts(path)


def test_a_file_without_texts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"prompts\.txt holds no texts"):
        read_texts(path)
