from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from safeguard.backends.engine_spec import (
    Buckets,
    EngineKey,
    EngineSpec,
    TensorSpec,
    cut,
    fill,
    model_digest,
    sizes,
)
from safeguard.errors import BackendError, PackError

IDS = TensorSpec(name="ids", dtype="int64", axes=("batch", "length"))
MASK = TensorSpec(name="mask", dtype="int64", axes=("batch", "length"))
PIXELS = TensorSpec(name="pixels", dtype="float16", axes=("batch", 3, 2, 2))
STATES = TensorSpec(name="states", dtype="float32", axes=("batch", 2, "length"))
LOGITS = TensorSpec(name="logits", dtype="float32", axes=("batch", 2))


def spec(**changed: Any) -> EngineSpec:
    fields: dict[str, Any] = {
        "flavour": "tensorrt_rtx",
        "version": "1.7.1",
        "architecture": "portable",
        "model": "a" * 64,
        "precision": "float16",
        "buckets": Buckets(lengths=(8, 16), batches=(1, 4)),
        "inputs": (IDS,),
        "outputs": (LOGITS,),
        "engine": "b" * 64,
        "size_bytes": 3,
    }
    return EngineSpec(**{**fields, **changed})


def test_a_length_goes_into_the_next_bucket() -> None:
    buckets = Buckets(lengths=(8, 16, 32))

    assert [buckets.length(n) for n in (0, 1, 8, 9, 16, 17, 32)] == [8, 8, 8, 16, 16, 32, 32]


def test_a_length_beyond_the_last_bucket_is_refused() -> None:
    with pytest.raises(BackendError, match="takes a length of at most 16, got 17"):
        Buckets(lengths=(8, 16)).length(17)


def test_rows_are_cut_into_full_batches_and_a_padded_rest() -> None:
    # 21 = 8 + 8 + 5, and 5 is padded to 8; 17 leaves one row; nothing takes no run
    buckets = Buckets(batches=(1, 2, 8))

    assert list(buckets.runs(21)) == [(0, 8, 8), (8, 16, 8), (16, 21, 8)]
    assert list(buckets.runs(17)) == [(0, 8, 8), (8, 16, 8), (16, 17, 1)]
    assert list(buckets.runs(2)) == [(0, 2, 2)]
    assert list(buckets.runs(0)) == []


def test_without_lengths_there_is_one_profile() -> None:
    assert Buckets(lengths=()).profiles() == (None,)
    assert Buckets(lengths=(8, 16)).profiles() == (8, 16)


@pytest.mark.parametrize(
    "wrong", [{"batches": ()}, {"batches": (2, 1)}, {"lengths": (8, 8)}, {"lengths": (0,)}]
)
def test_buckets_that_make_no_ladder_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Buckets(**wrong)


def test_the_batch_is_axis_0_and_no_other() -> None:
    with pytest.raises(ValidationError, match="axis 0 of 'x', and no other, must be the batch"):
        TensorSpec(name="x", dtype="int64", axes=("length", "batch"))
    with pytest.raises(ValidationError, match="must be the batch"):
        TensorSpec(name="x", dtype="int64", axes=("batch", "batch"))


def test_a_shape_is_that_of_the_bucket() -> None:
    assert IDS.shape(4, 16) == (4, 16)
    assert STATES.shape(4, 16) == (4, 2, 16)
    assert PIXELS.shape(4, None) == (4, 3, 2, 2)


def test_rows_are_padded_at_their_end_and_left_over_rows_repeat_the_first() -> None:
    buffer = np.full((3, 4), 9)

    fill(buffer, np.array([[1, 2], [3, 4]]), IDS, padding=7)

    assert buffer.tolist() == [[1, 2, 7, 7], [3, 4, 7, 7], [1, 2, 7, 7]]


def test_a_full_buffer_keeps_nothing_of_the_last_call() -> None:
    buffer = np.full((2, 2), 9)

    fill(buffer, np.array([[1, 2], [3, 4]]), IDS)

    assert buffer.tolist() == [[1, 2], [3, 4]]


def test_images_fill_whole_rows() -> None:
    buffer = np.zeros((2, 3, 2, 2), np.float16)

    fill(buffer, np.ones((1, 3, 2, 2), np.float32), PIXELS)

    assert buffer.tolist() == np.ones((2, 3, 2, 2)).tolist()


def test_a_length_at_the_last_axis_is_padded_there() -> None:
    buffer = np.full((1, 2, 3), 9.0)

    fill(buffer, np.array([[[1.0], [2.0]]]), STATES)

    assert buffer.tolist() == [[[1, 0, 0], [2, 0, 0]]]


def test_tensors_are_filled_as_arrays_are() -> None:
    torch = pytest.importorskip("torch")
    buffer = torch.full((3, 4), 9)

    fill(buffer, torch.tensor([[1, 2], [3, 4]]), IDS, padding=7)

    assert buffer.tolist() == [[1, 2, 7, 7], [3, 4, 7, 7], [1, 2, 7, 7]]


def test_outputs_are_cut_back_to_what_was_given() -> None:
    states = np.arange(12).reshape(2, 2, 3)

    assert cut(states, 1, 2, STATES).tolist() == [[[0, 1], [3, 4]]]
    assert cut(np.arange(6).reshape(3, 2), 2, 1, LOGITS).tolist() == [[0, 1], [2, 3]]


def test_rows_and_length_are_read_off_the_inputs() -> None:
    given = {"ids": np.zeros((3, 5), np.int32), "mask": np.ones((3, 5), np.int64)}

    assert sizes((IDS, MASK), given) == (3, 5)
    assert sizes((PIXELS,), {"pixels": np.zeros((2, 3, 2, 2), np.float32)}) == (2, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": np.zeros((1, 2), int)}, "needs inputs ids, mask; missing: mask"),
        (
            {"ids": np.zeros((1, 2), int), "mask": np.zeros(2, int)},
            r"'mask' must have shape \(batch, length\)",
        ),
        ({"ids": np.zeros((1, 2), int), "mask": np.zeros((2, 2), int)}, "must have the same batch"),
        ({"ids": np.zeros((1, 2), int), "mask": np.zeros((1, 3), int)}, "must have the same length"),
        ({"ids": np.zeros((1, 2)), "mask": np.zeros((1, 2), int)}, "'ids' must hold int64, got float64"),
    ],
)
def test_inputs_that_do_not_fit_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        sizes((IDS, MASK), given)


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(
        BackendError, match=r"'pixels' must have shape \(batch, 3, 2, 2\), got \(1, 3, 4, 4\)"
    ):
        sizes((PIXELS,), {"pixels": np.zeros((1, 3, 4, 4), np.float32)})


def test_raw_pixels_are_no_normalised_ones() -> None:
    with pytest.raises(BackendError, match="'pixels' must hold float16, got uint8"):
        sizes((PIXELS,), {"pixels": np.zeros((1, 3, 2, 2), np.uint8)})


@pytest.mark.parametrize(
    "changed",
    [
        {"flavour": "tensorrt"},
        {"version": "1.7.2"},
        {"architecture": "sm89"},
        {"model": "c" * 64},
        {"precision": "float32"},
        {"buckets": Buckets(lengths=(8, 32), batches=(1, 4))},
        {"buckets": Buckets(lengths=(8, 16), batches=(1, 8))},
        {"inputs": (IDS, MASK)},
        {"outputs": (LOGITS.model_copy(update={"name": "scores"}),)},
    ],
)
def test_the_key_changes_with_each_ingredient(changed: dict[str, Any]) -> None:
    assert EngineKey.of(spec(**changed)).digest != EngineKey.of(spec()).digest


def test_the_key_is_the_same_for_another_build_of_the_same_thing() -> None:
    again = spec(engine="d" * 64, built="2026-01-01T00:00:00Z", size_bytes=9)

    assert EngineKey.of(again).digest == EngineKey.of(spec()).digest


def test_a_description_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(spec().to_json(), encoding="utf-8")

    assert EngineSpec.read(tmp_path / "x.json") == spec()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "describes no engine"),
        ('{"format": 1}', "flavour: Field required"),
        ("[" * 100_000, "describes no engine"),
        (" " * 1_000_001, "is larger than 1000000 bytes"),
    ],
)
def test_a_broken_description_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")

    with pytest.raises(BackendError, match=message):
        EngineSpec.read(tmp_path / "x.json")


def test_a_missing_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"description x.json cannot be read: No such file"):
        EngineSpec.read(tmp_path / "x.json")


def test_the_model_digest_changes_with_the_model_and_with_weights_that_it_names(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"graph, weights in w.data")
    for name in ("w.data", "card.md"):
        (tmp_path / name).write_bytes(b"1")
    names = ["w.data", "card.md", "m.onnx", "absent"]
    first = model_digest(model, names)

    (tmp_path / "card.md").write_bytes(b"2")  # not named by the model
    assert model_digest(model, names) == first
    (tmp_path / "w.data").write_bytes(b"2")
    assert model_digest(model, names) != first
    assert model_digest(model) != model_digest(model, content=b"other graph")


def test_a_model_that_is_not_there_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="cannot be read"):
        model_digest(tmp_path / "m.onnx")
