from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from safeguard.checks.readout import Readout
from safeguard.checks.text_classifier import TextClassifier, read_tokenizer
from safeguard.errors import PackError
from safeguard.manifest import Window
from safeguard.packs import seal
from safeguard.runtime.buckets import Buckets
from safeguard.runtime.tokenising import TextBatch
from safeguard.testing import FakeBackend
from safeguard.types import Coverage, Span

HIGH = 1 / (1 + np.exp(-4))  # sigmoid(4)
LOW = 1 / (1 + np.exp(4))
WINDOW = Window(tokens=10, overlap=2)  # 8 tokens of text and 2 special ones


@pytest.fixture
def check(rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout) -> TextClassifier:
    return TextClassifier(rude_backend, tokenizer, readout, WINDOW)


def test_a_rude_text_scores_high_and_the_ignored_label_is_not_given(check: TextClassifier) -> None:
    (found,) = check(["the rude day"])

    assert found.scores == {"toxic": pytest.approx(HIGH)}
    assert found.coverage == Coverage("tokens", 3, 3, 1)
    assert found.spans == ()


def test_a_rude_word_in_any_window_of_a_long_text_counts(check: TextClassifier) -> None:
    (found,) = check(["good " * 19 + "rude"])

    assert found.scores["toxic"] == pytest.approx(HIGH)
    # 20 tokens in windows of 8 that share 2: [0, 8) [6, 14) [12, 20)
    assert found.coverage == Coverage("tokens", 20, 20, 3)


def test_the_span_of_a_long_text_is_its_worst_window(check: TextClassifier) -> None:
    (found,) = check(["good " * 19 + "rude"])

    # tokens 12 to 19: five characters each, the last one four
    assert found.spans == (Span(60, 99, "toxic", found.scores["toxic"]),)


def test_a_calm_long_text_has_no_spans(check: TextClassifier) -> None:
    assert check(["good " * 30])[0].spans == ()


def test_an_empty_text_still_gets_scores(check: TextClassifier) -> None:
    (found,) = check([""])

    assert found.scores["toxic"] == pytest.approx(LOW)
    assert found.coverage == Coverage("tokens", 0, 0, 1)


def test_rows_are_padded_to_the_longest_of_their_run_only(
    check: TextClassifier, rude_backend: FakeBackend
) -> None:
    check(["good", "good day", "the rude day"])

    assert rude_backend.shapes == [(3, 5)]  # three words and two special tokens


def test_runs_stay_within_the_budget_of_tokens(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    check = TextClassifier(rude_backend, tokenizer, readout, WINDOW, max_tokens=12)

    found = check(["rude", "good day good day good day", "good", "day", "the day the"])

    # lengths with special tokens 3, 3, 3, 5, 8: 4 x 5 > 12, 2 x 8 > 12
    assert rude_backend.shapes == [(3, 3), (1, 5), (1, 8)]
    assert [f.scores["toxic"] > 0.5 for f in found] == [True, False, False, False, False]


def test_isolated_windows_have_runs_of_their_own_without_padding(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    check = TextClassifier(rude_backend, tokenizer, readout, WINDOW, isolated=True, workers=2)

    found = check(["rude", "good day", "good " * 9])

    assert sorted(rude_backend.shapes) == [
        (1, 3),
        (1, 4),
        (1, 10),
        (1, 10),
    ]  # nine words: two windows of eight
    assert [f.scores["toxic"] > 0.5 for f in found] == [True, False, False]


def test_windows_share_a_run_only_where_they_are_padded_alike_alone(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    fine = Buckets.fine(4, WINDOW.tokens, 8)
    check = TextClassifier(rude_backend, tokenizer, readout, WINDOW, buckets=fine)
    texts = ["rude", "good day", "the good day", "good " * 8]

    together = check(texts)
    shared = sorted(rude_backend.shapes)
    rude_backend.shapes.clear()
    alone = [check([text])[0] for text in texts]

    # lengths with special tokens 3, 4, 5, 10
    assert shared == [(1, 8), (1, 10), (2, 4)]
    assert rude_backend.shapes == [(1, 4), (1, 4), (1, 8), (1, 10)]
    assert together == alone


def test_a_call_is_spread_over_the_workers(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    fine = Buckets.fine(4, WINDOW.tokens, 8)
    check = TextClassifier(rude_backend, tokenizer, readout, WINDOW, buckets=fine, workers=2)

    found = check(["rude", "good", "day", "rude"])

    assert rude_backend.shapes == [(2, 4), (2, 4)]  # not one run of four rows for one of the two
    assert [f.scores["toxic"] > 0.5 for f in found] == [True, False, False, True]


def test_a_neighbour_changes_no_score_of_the_shipped_model() -> None:
    check = TextClassifier.load("text-guard-s")
    own = "please tell me how I can get the garden ready"
    loud = "YOU ARE A STUPID IDIOT and I hate all of you"
    strange = ["\u0416" * 9, "!!!!!!!!!", loud, "a " * 9, "0 " * 11, loud * 9]

    alone = check([own])[0]

    together = check([*strange, own, *strange, own])
    # rounding and no more: a CPU may take another kernel for more rows
    for found in (together[len(strange)], together[-1]):
        assert found.scores == pytest.approx(alone.scores, rel=0, abs=1e-5)


BUCKETS = Buckets(lengths=(4, 8, 16), rows=(1, 2, 4))


def test_with_buckets_runs_have_few_shapes_and_the_same_scores(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout, check: TextClassifier
) -> None:
    bucketed = TextClassifier(rude_backend, tokenizer, readout, WINDOW, buckets=BUCKETS)
    texts = ["rude", "good", "the rude day", "good day good day good"]
    expected = check(texts)
    rude_backend.shapes.clear()

    assert bucketed(texts) == expected
    # lengths with special tokens 3, 3, 5, 7: two rows of 4, two rows of 8
    assert rude_backend.shapes == [(2, 4), (2, 8)]


def test_rows_that_only_fill_a_bucket_are_cut_off_again(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    check = TextClassifier(rude_backend, tokenizer, readout, WINDOW, buckets=BUCKETS)

    found = check(["rude", "good", "rude"])

    assert rude_backend.shapes == [(4, 4)]
    assert [f.scores["toxic"] > 0.5 for f in found] == [True, False, True]


def test_no_bucket_is_longer_than_the_window(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    TextClassifier(rude_backend, tokenizer, readout, WINDOW, buckets=BUCKETS)(["good day " * 4])

    assert rude_backend.shapes == [(1, 10)]  # eight words and two special tokens fill the window of ten


def test_no_row_of_a_run_is_masked_as_a_whole(tokenizer: Tokenizer, readout: Readout) -> None:
    masks: list[Any] = []

    def keep(inputs: Any) -> dict[str, Any]:
        masks.append(inputs["attention_mask"])
        return {"logits": np.zeros((len(inputs["input_ids"]), 2), np.float32)}

    TextClassifier(FakeBackend(keep), tokenizer, readout, WINDOW, buckets=BUCKETS)(["good", "a", "day"])

    assert masks[0].any(axis=1).tolist() == [True, True, True, True]


def test_a_backend_that_loses_rows_of_a_bucket_is_refused(tokenizer: Tokenizer, readout: Readout) -> None:
    backend = FakeBackend(lambda inputs: {"logits": np.zeros((1, 2), np.float32)})

    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \(3, 2\)"):
        TextClassifier(backend, tokenizer, readout, WINDOW, buckets=BUCKETS)(["a", "good", "day"])


def test_warming_up_runs_every_bucket_once(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    TextClassifier(rude_backend, tokenizer, readout, WINDOW, buckets=BUCKETS, max_tokens=16).warmup()

    # a window has 10 tokens, and the model no positions for the 16 of the next bucket
    assert rude_backend.shapes == [(1, 4), (2, 4), (4, 4), (1, 8), (2, 8), (1, 10)]


def test_warming_up_without_buckets_runs_the_shortest_and_the_longest_window(
    check: TextClassifier, rude_backend: FakeBackend
) -> None:
    check.warmup()

    assert rude_backend.shapes == [(1, 3), (1, 10)]


def test_a_second_classifier_with_the_same_tokenizer_tokenises_nothing_again(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    batch = TextBatch(["the rude day"])
    first, second = (TextClassifier(rude_backend, tokenizer, readout, WINDOW) for _ in range(2))

    first(batch)
    (tokens,) = batch.memo.values()

    assert second(batch) == first(batch)
    assert list(batch.memo.values()) == [tokens]


def test_an_error_in_one_of_several_workers_is_raised(tokenizer: Tokenizer, readout: Readout) -> None:
    def fail(inputs: Any) -> dict[str, Any]:
        raise RuntimeError("no memory")

    check = TextClassifier(FakeBackend(fail), tokenizer, readout, WINDOW, isolated=True, workers=2)

    with pytest.raises(RuntimeError, match="no memory"):
        check(["good", "day"])


def test_nan_in_any_window_is_not_hidden(tokenizer: Tokenizer, readout: Readout) -> None:
    def broken(inputs: Any) -> dict[str, Any]:
        logits = np.full((len(inputs["input_ids"]), 2), 3.0, np.float32)
        logits[-1] = np.nan
        return {"logits": logits}

    (found,) = TextClassifier(FakeBackend(broken), tokenizer, readout, WINDOW)(["good " * 20])

    assert np.isnan(found.scores["toxic"])


def test_a_backend_that_loses_rows_is_refused(tokenizer: Tokenizer, readout: Readout) -> None:
    backend = FakeBackend(lambda inputs: {"logits": np.zeros((1, 2), np.float32)})

    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \(2, 2\)"):
        TextClassifier(backend, tokenizer, readout, WINDOW)(["good", "day"])


def test_a_text_of_too_many_windows_is_refused_not_cut(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    check = TextClassifier(rude_backend, tokenizer, readout, WINDOW, max_windows=3)

    assert check(["good " * 20])[0].coverage == Coverage("tokens", 20, 20, 3)
    with pytest.raises(
        ValueError, match="item 1 of the batch needs 4 windows of 8 tokens, more than max_windows=3"
    ):
        check(["good", "good " * 21])
    assert len(rude_backend.shapes) == 1


def test_a_huge_text_is_refused_before_it_is_tokenised(check: TextClassifier) -> None:
    with pytest.raises(ValueError, match="has 1000000 characters, more than max_windows=512"):
        check(["a" * 1_000_000])


@pytest.mark.parametrize("item", [None, b"good", 3, ["good"]])
def test_what_is_no_text_is_refused(check: TextClassifier, item: Any) -> None:
    with pytest.raises(TypeError, match="item 1 of the batch must be text, got"):
        check(["good", item])


def test_one_text_in_the_place_of_a_batch_is_refused(check: TextClassifier) -> None:
    with pytest.raises(TypeError, match="a check takes a batch"):
        check("good")


def test_unknown_inputs_are_refused(
    rude_backend: FakeBackend, tokenizer: Tokenizer, readout: Readout
) -> None:
    with pytest.raises(ValueError, match=r"inputs must be among .* got pixels"):
        TextClassifier(rude_backend, tokenizer, readout, WINDOW, inputs=["pixels"])


def test_threads_get_the_scores_of_their_own_texts(check: TextClassifier) -> None:
    texts = [f"{'rude' if i % 3 == 0 else 'good'} " * (i % 7 + 1) for i in range(60)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: check([text])[0].scores["toxic"] > 0.5, texts))

    assert found == [i % 3 == 0 for i in range(60)]


def test_load_reads_a_pack(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _rude_pack(tmp_path, tokenizer, precision="float32")

    check = TextClassifier.load(tmp_path, threads=1)

    assert (check.name, check.labels) == ("rude-words", ("toxic",))
    assert check.operating_points == {"standard": {"toxic": 0.6}}
    assert check.digest is not None
    assert len(check.digest) == 64
    assert [f.scores["toxic"] > 0.5 for f in check(["a rude day", "good day"])] == [True, False]


def test_load_isolates_the_texts_of_an_int8_pack(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _rude_pack(tmp_path, tokenizer, precision="int8")

    found = TextClassifier.load(tmp_path, threads=2)(["a rude day", "good day", "good " * 20])

    assert [f.scores["toxic"] > 0.5 for f in found] == [True, False, False]


def test_a_pack_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    seal(tmp_path, {"name": "r", "version": "1", "kind": "refiner", "license": "MIT"} | _MODEL)

    with pytest.raises(PackError, match="pack 'r' is a refiner, not a text_classifier"):
        TextClassifier.load(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "9"}))

    with pytest.raises(PackError, match="is no tokenizer that this version of tokenizers can read"):
        read_tokenizer(tmp_path / "tokenizer.json")


_MODEL = {"model": {"file": "model.onnx", "inputs": ["input_ids", "attention_mask"], "outputs": ["logits"]}}


def _rude_pack(folder: Path, tokenizer: Tokenizer, precision: str) -> None:
    """A pack with a real ONNX file: logits 8 * (any unmasked token is "rude", 4) - 4, and its opposite."""
    helper = pytest.importorskip("onnx.helper", reason="onnx is not installed (extra export)")
    import onnx

    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    kinds = onnx.TensorProto
    nodes = [
        helper.make_node("Equal", ["input_ids", "rude"], ["is_rude"]),
        helper.make_node("Cast", ["is_rude"], ["number"], to=kinds.INT64),
        helper.make_node("Mul", ["number", "attention_mask"], ["seen"]),
        helper.make_node("ReduceMax", ["seen", "axis"], ["any"], keepdims=1),
        helper.make_node("Cast", ["any"], ["any_float"], to=kinds.FLOAT),
        helper.make_node("Mul", ["any_float", "slope"], ["sloped"]),
        helper.make_node("Add", ["sloped", "offset"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("rude", kinds.INT64, [], [4]),
        helper.make_tensor("axis", kinds.INT64, [1], [1]),
        helper.make_tensor("slope", kinds.FLOAT, [1, 2], [8, -8]),
        helper.make_tensor("offset", kinds.FLOAT, [1, 2], [-4, 4]),
    ]
    inputs = [
        helper.make_tensor_value_info(n, kinds.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("logits", kinds.FLOAT, ["b", 2])]
    graph = helper.make_graph(nodes, "rude", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "name": "rude-words",
        "version": "1",
        "kind": "text_classifier",
        "labels": ["toxic", "calm"],
        "ignored_labels": ["calm"],
        "window": {"tokens": 10, "overlap": 2},
        "operating_points": {"standard": {"toxic": 0.6}},
        "precision": precision,
        "license": "Apache-2.0",
    }
    seal(folder, fields | _MODEL)
