from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from safeguard.train.unidetox.config import Rewriting
from safeguard.train.unidetox.distil import finish
from safeguard.train.unidetox.rewrite import ask, choose, rewrite
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.train.tiny_detox import RUDE, random_model

VECTORS = {"original": [1.0, 0.0], "close": [4.0, 3.0], "far": [0.0, 2.0]}


def embed(texts: Sequence[str]) -> np.ndarray:
    return np.array([VECTORS[text] for text in texts], np.float32)


def test_best_candidate_is_the_close_one_where_both_are_harmless() -> None:
    # cosines 4/5 and 0, no toxicity
    best, score = choose("original", ["far", "close"], embed, lambda some: np.zeros(len(some), np.float32))
    assert best == "close"
    assert score == pytest.approx(0.8)


def test_toxicity_outweighs_closeness() -> None:
    # close: 0.8 - 0.9 = -0.1; far: 0 - 0 = 0
    def toxicity(texts: Sequence[str]) -> np.ndarray:
        return np.array([0.9 if text == "close" else 0.0 for text in texts], np.float32)

    best, score = choose("original", ["far", "close"], embed, toxicity)
    assert best == "far"
    assert score == pytest.approx(0.0)


def test_no_candidate_leaves_the_text_empty() -> None:
    assert choose("original", ["", "  "], embed, lambda some: np.zeros(len(some), np.float32)) == ("", -1.0)


def test_request_uses_the_chat_template_where_there_is_one() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(ask(tokenizer, "Be kind.", "geese")) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\ngeese<|im_end|>\n<|im_start|>assistant\n"
    )


def test_request_without_chat_template_is_plain_text() -> None:
    tokenizer = tiny_tokenizer(None)
    wanted = "Be kind.\n\nText: geese\nRewritten text:"
    assert tokenizer.decode(ask(tokenizer, "Be kind.", "geese")) == wanted


def test_interrupted_rewriting_gives_the_texts_of_an_unbroken_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    models = random_model(tokenizer, 1), random_model(tokenizer, 2)
    settings = Rewriting(texts=3, temperatures=(0.8, 1.2), repeats=1, batch_size=2, new_tokens=5)

    def run(out: Path) -> list[str]:
        journal = rewrite(
            *models, tokenizer, RUDE, settings, out, toxicity=lambda some: np.zeros(len(some), np.float32)
        )
        finish(journal, out, 3)
        return [json.loads(line)["text"] for line in (out / "texts.jsonl").read_text().splitlines()]

    whole = run(tmp_path / "a")
    part = run(tmp_path / "b")
    journal = tmp_path / "b" / "texts.part-0.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    assert part == whole
    assert run(tmp_path / "b") == whole
