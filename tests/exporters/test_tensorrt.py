"""Engines are really parsed and built here, ahead of time, by tensorrt_rtx, which needs no GPU for that."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from safeguard.backends.engine_cache import EngineCache, Entry
from safeguard.backends.engine_spec import Buckets, TensorSpec
from safeguard.backends.tensorrt_flavours import (
    fits_architecture,
    join_architectures,
    load_flavour,
)
from safeguard.errors import BackendError, ExportError
from safeguard.exporters.tensorrt import build_engine, profile_shapes, weight_files
from tests.exporters.tiny_onnx import bag_of_words

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")

SMALL = Buckets(lengths=(8, 16, 32), batches=(1, 4))
TEXT = ("input_ids", "attention_mask")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"))


def build(model: Path, cache: EngineCache, **options: Any) -> Entry:
    return build_engine(model, cache=cache, **{"flavour": "tensorrt_rtx", "buckets": SMALL, **options})


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bag_of_words(tmp_path_factory.mktemp("words") / "model.onnx")[0]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier of one layer as our exporter writes it for TensorRT."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safeguard.exporters.graph import export_graph

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
    )
    path = tmp_path_factory.mktemp("bert") / "model.onnx"
    export_graph(
        transformers.BertForSequenceClassification(config),
        path,
        inputs={name: torch.ones(2, 8, dtype=torch.long) for name in TEXT},
        outputs=("logits",),
        dynamic={name: {0: "batch", 1: "token"} for name in TEXT},
        flavour="decomposed",
    )
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tower for pictures of 32 x 32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safeguard.exporters.graph import export_graph

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    path = tmp_path_factory.mktemp("clip") / "model.onnx"
    export_graph(
        transformers.CLIPVisionModelWithProjection(config),
        path,
        inputs={"pixel_values": torch.randn(2, 3, 32, 32)},
        outputs=("image_embeds",),
        dynamic={"pixel_values": {0: "batch"}},
        flavour="decomposed",
    )
    return path


def test_a_bert_becomes_an_engine_with_a_profile_for_each_length(bert: Path, cache: EngineCache) -> None:
    entry = build(bert, cache)

    assert entry.engine[:5] == b"vtrt\0"  # what engines of tensorrt_rtx begin with
    assert entry.spec.buckets == SMALL
    assert [(s.name, s.dtype, s.axes) for s in (*entry.spec.inputs, *entry.spec.outputs)] == [
        ("input_ids", "int64", ("batch", "length")),
        ("attention_mask", "int64", ("batch", "length")),
        ("logits", "float32", ("batch", 3)),
    ]
    # each profile but the first has its number in the names of its tensors, in the engine itself
    assert [f"logits [profile {i}]".encode() in entry.engine for i in (1, 2, 3)] == [True, True, False]


def test_a_clip_tower_becomes_an_engine_with_one_profile(clip: Path, cache: EngineCache) -> None:
    entry = build(clip, cache, buckets=Buckets(batches=(1, 2, 8)))

    assert entry.spec.buckets == Buckets(lengths=(), batches=(1, 2, 8))
    assert [s.axes for s in entry.spec.inputs] == [("batch", 3, 32, 32)]
    assert b"[profile 1]" not in entry.engine


def test_a_length_is_fixed_in_its_profile_and_the_batch_is_not() -> None:
    ids = TensorSpec(name="ids", dtype="int64", axes=("batch", "length"))

    assert list(profile_shapes([ids], Buckets(lengths=(8, 16), batches=(1, 2, 4)))) == [
        {"ids": ((1, 8), (2, 8), (4, 8))},
        {"ids": ((1, 16), (2, 16), (4, 16))},
    ]


def test_types_come_from_the_file(tmp_path: Path, words: Path, cache: EngineCache) -> None:
    half = build(bag_of_words(tmp_path / "half.onnx", half=True)[0], cache)

    assert build(words, cache).spec.precision == "float32"
    assert half.spec.precision == "float16"
    assert half.spec.outputs[0].dtype == "float16"


def test_an_engine_is_built_once_and_then_comes_from_the_cache(words: Path, cache: EngineCache) -> None:
    first = build(words, cache)

    def refuse(*_: Any) -> None:
        pytest.fail("it was built again")

    assert build(words, cache, progress=refuse) == first


@pytest.mark.parametrize(
    "options",
    [
        {"buckets": Buckets(lengths=(8, 16), batches=(1, 4))},
        {"buckets": Buckets(lengths=(8, 16, 32), batches=(1, 8))},
        {"architectures": ["sm89"]},
    ],
)
def test_other_options_make_another_engine(
    words: Path, cache: EngineCache, options: Mapping[str, Any]
) -> None:
    assert build(words, cache, **options).folder != build(words, cache).folder


def test_another_model_makes_another_engine(tmp_path: Path, words: Path, cache: EngineCache) -> None:
    def rename(graph: Any) -> None:
        graph.doc_string = "another file, the same sums"

    other = bag_of_words(tmp_path / "other.onnx", change=rename)[0]

    assert build(other, cache).spec.model != build(words, cache).spec.model


def test_an_engine_can_be_for_named_gpus(words: Path, cache: EngineCache) -> None:
    entry = build(words, cache, architectures=["sm89", "sm86", "sm89"])

    assert entry.spec.architecture == "sm86+sm89"
    assert (fits_architecture("sm86+sm89", "sm89"), fits_architecture("sm86+sm89", "sm120")) == (True, False)


def test_a_portable_engine_is_for_ampere_and_later() -> None:
    assert join_architectures([]) == "portable"
    assert [fits_architecture("portable", g) for g in ("sm75", "sm80", "sm120")] == [False, True, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sm90", "tensorrt_rtx .* cannot build for 'sm90'; known: sm120, "),
        ("ada", "written as sm89, got 'ada'"),
    ],
)
def test_an_unknown_gpu_is_refused(words: Path, cache: EngineCache, name: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        build(words, cache, architectures=[name])


def test_progress_is_told_from_beginning_to_end(words: Path, cache: EngineCache) -> None:
    told: list[tuple[str, int, int]] = []

    build(words, cache, rebuild=True, progress=lambda *step: told.append(step))

    whole = [(done, steps) for phase, done, steps in told if phase == "Building engine"]
    assert (whole[0][0], whole[-1][0]) == (0, whole[-1][1])


def test_an_interrupted_build_ends_and_keeps_nothing(tmp_path: Path, words: Path) -> None:
    cache = EngineCache(tmp_path / "engines")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(words, cache, progress=interrupt)
    assert cache.find(lambda _: True) is None


def test_building_is_logged_without_a_path(
    words: Path, cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "safeguard.exporters.tensorrt"):
        build(words, cache, rebuild=True)

    assert "building an engine: model=model.onnx flavour=tensorrt_rtx" in caplog.text
    assert str(words.parent) not in caplog.text


def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path, cache: EngineCache) -> None:
    def break_it(graph: Any) -> None:
        graph.node[3].op_type, graph.node[3].domain = "Sqeeze", "elsewhere"

    model = bag_of_words(tmp_path / "broken.onnx", change=break_it)[0]
    with pytest.raises(
        ExportError, match="operator Sqeeze: node 'apply_mask': TensorRT knows no such operator"
    ):
        build(model, cache)


def test_a_wrong_node_is_named_with_the_reason(tmp_path: Path, cache: EngineCache) -> None:
    def break_it(graph: Any) -> None:
        graph.node[5].input[1] = "table"  # (50, 16), which (batch, 16) cannot be multiplied with

    model = bag_of_words(tmp_path / "broken.onnx", change=break_it)[0]
    with pytest.raises(
        ExportError,
        match=r"operator MatMul: node 'classify': .* input0 = 16 and .* input1 = 50 .*\(INVALID_NODE\)$",
    ):
        build(model, cache)


def test_attention_as_one_operator_is_refused_with_what_to_do(tmp_path: Path, cache: EngineCache) -> None:
    def break_it(graph: Any) -> None:
        graph.node[3].op_type = "Attention"

    model = bag_of_words(tmp_path / "native.onnx", change=break_it)[0]
    with pytest.raises(ExportError, match=r"operator Attention: node 'apply_mask': .* --flavour decomposed"):
        build(model, cache)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, cache: EngineCache) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07 nothing")

    with pytest.raises(ExportError, match=r"broken.onnx cannot be exported: it is no ONNX file"):
        build(tmp_path / "broken.onnx", cache)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path, cache: EngineCache) -> None:
    with pytest.raises(FileNotFoundError):
        build(tmp_path / "absent.onnx", cache)


def test_a_fixed_batch_is_refused(tmp_path: Path, cache: EngineCache) -> None:
    def fix(graph: Any) -> None:
        for value in graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = 2

    model = bag_of_words(tmp_path / "fixed.onnx", change=fix)[0]
    with pytest.raises(
        ExportError, match=r"'input_ids' .*axis 0 must be a dynamic batch, its shape is \(2, -1\)"
    ):
        build(model, cache)


def test_a_model_with_a_length_needs_a_length_bucket(words: Path, cache: EngineCache) -> None:
    with pytest.raises(ExportError, match="at least one length bucket is needed"):
        build(words, cache, buckets=Buckets(lengths=()))


@pytest.mark.parametrize("place", ["../weights.data", "/weights.data", "a/../../weights.data", ".."])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    def move(graph: Any) -> None:
        weights = graph.initializer[0]
        weights.ClearField("raw_data")
        weights.data_location = 1  # TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=place)

    model = bag_of_words(tmp_path / "outside.onnx", change=move)[0]
    with pytest.raises(ExportError, match=r"keeps weights in .*, which is not in its own folder"):
        weight_files(model)


def test_weights_beside_the_model_are_read_and_count(tmp_path: Path, cache: EngineCache) -> None:
    import onnx

    source = onnx.load(str(bag_of_words(tmp_path / "one.onnx")[0]))
    model = tmp_path / "model.onnx"
    options = {
        "save_as_external_data": True,
        "size_threshold": 0,
        "location": "w.data",
        "convert_attribute": False,
    }
    onnx.save_model(source, str(model), **options)
    first = build(model, cache)

    assert weight_files(model) == ("w.data",)
    data = bytearray((tmp_path / "w.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "w.data").write_bytes(data)
    assert build(model, cache).spec.model != first.spec.model


def test_tensorrt_names_no_gpus_but_the_one_at_hand() -> None:
    flavour = load_flavour("tensorrt_rtx")
    full = type(flavour)("tensorrt", flavour.module)

    with pytest.raises(BackendError, match="tensorrt builds for the GPU at hand, not for sm89"):
        full.prepare_builder(None, ["sm89"])
    full.prepare_builder(None, [])
