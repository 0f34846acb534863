"""The loop over an exported graph: on a backend that counts, where each answer can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from safeguard.backends import Arrays
from safeguard.errors import BackendError, PackError, RefinerError
from safeguard.refiners.file_tokens import FileTokens
from safeguard.refiners.onnx_lm import DecoderLayout, OnnxLM, feeds

LAYOUT = DecoderLayout(
    inputs=("input_ids", "attention_mask", "position_ids"),
    layers=((1, 2, 3),),
    vocabulary=10,
    window=32,
    ends=(9,),
)


class Counting:
    """Says of each token the next number; keeps what it was given."""

    def __init__(self, *, broken: bool = False) -> None:
        self.seen: list[Arrays] = []
        self.broken = broken

    def __call__(self, inputs: Arrays, /) -> dict[str, Any]:
        self.seen.append(inputs)
        ids = inputs["input_ids"]
        logits = np.eye(10, dtype=np.float32)[(ids + 1) % 10]
        past, time = inputs["past_key_values.0.key"].shape[2], ids.shape[1]
        return {
            "logits": logits * (np.nan if self.broken else 1),
            "present.0.key": np.zeros((len(ids), 1, past + time, 2), np.float32),
            "present.0.value": np.zeros((len(ids), 1, past + time, 3), np.float32),
        }


def tokens() -> FileTokens:
    return FileTokens(Tokenizer(models.WordLevel({str(n): n for n in range(10)}, unk_token="0")))


def test_an_answer_goes_on_from_its_row_to_the_end_token() -> None:
    # after 5 come 6, 7, 8 and the end, 9; after 6 one less
    found = OnnxLM(Counting(), tokens(), LAYOUT).generate([[4, 5], [6]], [8, 8])
    assert [(answer.text, answer.whole) for answer in found] == [("6 7 8", True), ("7 8", True)]


def test_a_row_at_its_limit_is_not_whole() -> None:
    found = OnnxLM(Counting(), tokens(), LAYOUT).generate([[1], [7]], [2, 5])
    assert [(answer.text, answer.whole) for answer in found] == [("2 3", False), ("8", True)]


def test_rows_are_padded_on_the_left_and_positions_count_real_tokens() -> None:
    backend = Counting()
    OnnxLM(backend, tokens(), LAYOUT).generate([[1, 2, 3], [7]], [2, 2])
    first, second = backend.seen
    assert first["input_ids"].tolist() == [[1, 2, 3], [0, 0, 7]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert first["past_key_values.0.value"].shape == (2, 1, 0, 3)
    assert second["input_ids"].tolist() == [[4], [8]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert second["position_ids"].tolist() == [[3], [1]]
    assert second["past_key_values.0.key"].shape == (2, 1, 3, 2)


def test_the_loop_ends_with_the_last_row() -> None:
    backend = Counting()
    OnnxLM(backend, tokens(), LAYOUT).generate([[8], [7]], [30, 30])
    assert len(backend.seen) == 2  # the second row says 8 and 9


def test_a_stopped_generation_is_an_error() -> None:
    backend = Counting()
    with pytest.raises(RefinerError, match="the generation was stopped before its end"):
        OnnxLM(backend, tokens(), LAYOUT).generate([[1]], [8], stop=lambda: len(backend.seen) == 2)
    assert len(backend.seen) == 2


def test_logits_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(BackendError, match="gave logits that are not numbers"):
        OnnxLM(Counting(broken=True), tokens(), LAYOUT).generate([[1]], [8])


def test_a_model_without_positions_gets_none() -> None:
    layout = LAYOUT.model_copy(update={"inputs": ("input_ids", "attention_mask")})
    ids = np.ones((1, 2), np.int64)
    assert list(feeds(layout, ids, ids)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"layers": []})])
def test_a_malformed_layout_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "decoder.json").write_text(content)
    with pytest.raises(PackError, match=r"decoder\.json is no decoder layout"):
        DecoderLayout.read(tmp_path / "decoder.json")
