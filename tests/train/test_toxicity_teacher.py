from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from safeguard.train.text_data import Row
from safeguard.train.toxicity_teacher import KINDS, add_teacher, teacher_ids, teacher_scores


def write_teacher(folder: Path) -> Path:
    """A teacher whose six probabilities are the same: its share of 100 known words, times ten."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({"rude": 1, "word": 1}), encoding="utf-8")
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["known"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["known", "axes"], ["share"], keepdims=1),
        helper.make_node("Mul", ["share", "ten"], ["one"]),
        helper.make_node("Concat", ["one"] * 6, ["probs"], axis=1),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
        helper.make_tensor("ten", TensorProto.FLOAT, [1], [10.0]),
    ]
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", 100])],
        [helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["b", 6])],
        constants,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        folder / "model.onnx",
    )
    return folder


def test_words_are_cleaned_and_padded_in_front() -> None:
    ids = teacher_ids(["Rude, UNKNOWN word!"], {"rude": 7, "word": 8})
    assert ids.shape == (1, 100)
    assert ids[0, -3:].tolist() == [0, 7, 8]


def test_long_texts_keep_their_end() -> None:
    ids = teacher_ids(["a " * 150 + "b"], {"a": 1, "b": 2})
    assert ids[0, 0] == 1
    assert ids[0, -1] == 2


def test_scores_come_in_six_kinds(tmp_path: Path) -> None:
    # two of a hundred words are known: .02 * 10 = .2
    scores = teacher_scores(write_teacher(tmp_path), ["a rude word", "quiet"])
    assert scores == pytest.approx(np.array([[0.2] * 6, [0.0] * 6]))


def test_the_teacher_speaks_only_where_no_human_did(tmp_path: Path) -> None:
    rows = [
        Row("rude word", "a", "train", {"toxicity": 1.0, "insult": 1.0}),
        Row("kind", "a", "train", {"toxicity": 0.0}),
        Row("how to bake", "b", "train", {"llm_request": 0.0}),
    ]
    found = add_teacher(rows, write_teacher(tmp_path), cache=tmp_path / "cache.npz")
    assert found[0].targets["insult"] == 1.0
    assert found[0].targets["threat"] == pytest.approx(0.2)
    assert set(KINDS) <= found[0].targets.keys()
    assert found[1:] == rows[1:]


def test_scores_are_computed_once(tmp_path: Path) -> None:
    rows = [Row("rude word", "a", "train", {"toxicity": 1.0})]
    first = add_teacher(rows, write_teacher(tmp_path), cache=tmp_path / "cache.npz")
    assert add_teacher(rows, tmp_path / "gone", cache=tmp_path / "cache.npz") == first


def test_a_cache_of_other_rows_is_refused(tmp_path: Path) -> None:
    rows = [Row("rude word", "a", "train", {"toxicity": 1.0})]
    add_teacher(rows, write_teacher(tmp_path), cache=tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="holds 1 scores for 2 texts; delete it"):
        add_teacher(rows * 2, tmp_path, cache=tmp_path / "cache.npz")


def test_insults_that_a_hate_source_calls_harmless_say_nothing_of_toxicity(tmp_path: Path) -> None:
    # six of a hundred words are known: .06 * 10 = .6, over .5
    abuse = Row(
        "rude word " * 3, "dghs_v0.1", "train", {"toxicity": 0.0, "identity_hate": 0.0, "jailbreak": 0.0}
    )
    mild = Row("rude word", "dghs_v0.1", "train", {"toxicity": 0.0})
    found = add_teacher([abuse, mild], write_teacher(tmp_path), cache=tmp_path / "cache.npz")
    assert found[0].targets == {"identity_hate": 0.0, "jailbreak": 0.0}
    assert found[1] == mild
