from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
pytest.importorskip("transformers", reason="transformers is not installed (extra export)")

from safeguard.backends import open_backend
from safeguard.backends.torch import ModuleBackend
from safeguard.checks.clip_heads import ClipHeads, Concepts, Head, Perceptron, PromptPair, write_heads
from safeguard.checks.loading import load_check
from safeguard.errors import ExportError
from safeguard.exporters.clip import Tower, export_clip, read_named_heads, read_tower, tower
from safeguard.exporters.graph import operators
from safeguard.packs import resolve
from tests.exporters.tiny import vision_tower

RANDOM = np.random.default_rng(0)
Q16 = PromptPair("q16", RANDOM.standard_normal((2, 16)))
NUDE = Concepts(
    "nude",
    RANDOM.standard_normal((4, 16)),
    np.full(4, 0.2),
    RANDOM.standard_normal((2, 16)),
    np.array([-0.9, 0.3]),  # nearly everything is near the first special concept
)
GORE = Perceptron("gore", RANDOM.standard_normal((5, 16)), np.zeros(5), RANDOM.standard_normal(5), 0.25)
HEADS: list[Head] = [Q16, NUDE, GORE]
PICTURES = [np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8) for i in range(5)]


def source() -> Tower:
    return tower(vision_tower(), name="tiny-clip")


def original() -> ClipHeads:
    backend = ModuleBackend(vision_tower(), inputs=["pixel_values"], outputs=["image_embeds"])
    return ClipHeads(backend, HEADS, source().image)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "out"
    export_clip(source(), HEADS, out)
    return out


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "half"
    export_clip(source(), HEADS, out, dtype="float16", flavour="decomposed", max_flips=0.1)
    return out


def logits(pack: Path, pixels: Any) -> Any:
    found = resolve(pack)
    model = found.manifest.model
    return open_backend(found.model, inputs=model.inputs, outputs=model.outputs)({"pixel_values": pixels})


def test_export_scores_pictures_as_the_tower_that_it_came_from(pack: Path) -> None:
    wanted, found = original()(PICTURES), ClipHeads.load(pack)(PICTURES)
    for one, other in zip(wanted, found, strict=True):
        assert other.scores == pytest.approx(one.scores, abs=1e-4)


def test_export_loads_by_its_folder_with_every_head_as_a_label(pack: Path) -> None:
    check: Any = load_check(str(pack))
    assert check(PICTURES[:1])[0].scores.keys() == {"q16", "nude", "gore"}
    assert resolve(pack).manifest.labels == ("q16", "nude", "gore")


@pytest.mark.parametrize("rows", [1, 5])
def test_graph_alone_gives_the_logit_of_every_head(pack: Path, rows: int) -> None:
    pixels = np.random.default_rng(9).standard_normal((rows, 3, 32, 32)).astype(np.float32)
    found = logits(pack, pixels)
    wide = found["image_embeds"].astype(np.float64)
    # the checks' own float64 heads; a concept's probability is sigmoid(100 * margin)
    wanted = np.stack([Q16.raw(wide), 100 * NUDE.raw(wide), GORE.raw(wide)], axis=1)
    assert found["logits"] == pytest.approx(wanted, abs=1e-3)


def test_special_concept_moves_the_logit_in_the_graph_as_in_the_check(pack: Path) -> None:
    pixels = np.random.default_rng(9).standard_normal((5, 3, 32, 32)).astype(np.float32)
    found = logits(pack, pixels)
    plain = Concepts("nude", NUDE.concepts, NUDE.thresholds, NUDE.special, np.full(2, 2.0))  # never special
    without = 100 * plain.raw(found["image_embeds"].astype(np.float64))
    assert (found["logits"][:, 1] - without).max() == pytest.approx(1.0, abs=1e-3)  # 100 * 0.01


def test_float16_tower_has_float32_heads(half: Path) -> None:
    pixels = np.random.default_rng(9).standard_normal((3, 3, 32, 32)).astype(np.float32)
    found = logits(half, pixels)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    wide = found["image_embeds"].astype(np.float64)
    # were norm or product in float16, the logit of q16 would be off by about 0.1
    assert found["logits"][:, 0] == pytest.approx(Q16.raw(wide), abs=1e-3)
    assert "Attention" not in operators(half / "model.onnx")


def test_int8_leaves_the_heads_alone(tmp_path: Path) -> None:
    export_clip(source(), HEADS, tmp_path / "out", dtype="int8", max_flips=0.2)
    pixels = np.random.default_rng(9).standard_normal((1, 3, 32, 32)).astype(np.float32)
    found = logits(tmp_path / "out", pixels)
    wide = found["image_embeds"].astype(np.float64)
    assert found["logits"][:, 2] == pytest.approx(GORE.raw(wide), abs=1e-4)
    assert (
        operators(tmp_path / "out" / "model.onnx")["MatMulInteger"] == 13
    )  # 2 layers of 6, and the projection


def test_manifest_says_how_far_embeddings_and_logits_are_off(pack: Path) -> None:
    record = resolve(pack).manifest.export
    assert record is not None
    embeds, heads = record.parity
    assert (embeds.tensor, embeds.shapes, embeds.decisions) == ("image_embeds", ((1, 16), (5, 16)), 0)
    assert (heads.tensor, heads.decisions, heads.flips) == ("logits", 18, 0)  # six pictures, three heads


def test_head_of_another_width_is_refused(tmp_path: Path) -> None:
    wide = PromptPair("q16", np.ones((2, 768)))
    with pytest.raises(ExportError, match="embeddings have 16 numbers, head 'q16' wants 768"):
        export_clip(source(), [wide], tmp_path / "out")


def test_no_heads_and_heads_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a tower is exported with its heads, got none; give --heads FILE"):
        export_clip(source(), [], tmp_path / "out")
    with pytest.raises(ValueError, match="each head needs a category of its own, got"):
        export_clip(source(), [Q16, Q16], tmp_path / "out")


@pytest.mark.parametrize("name", ["heads.npz", "heads.safetensors"])
def test_heads_from_a_file_keep_their_numbers_and_are_exported(name: str, tmp_path: Path) -> None:
    write_heads(tmp_path / name, [Q16, NUDE, GORE])
    found: list[Any] = read_named_heads([tmp_path / name])

    assert [head.category for head in found] == ["gore", "nude", "q16"]
    assert (found[0].out_bias, found[2].scale) == (0.25, Q16.scale)  # numbers, no arrays of one
    export_clip(source(), found, tmp_path / "out")


def test_heads_are_read_by_category(tmp_path: Path) -> None:
    write_heads(tmp_path / "a.npz", [Q16, GORE])
    assert [head.category for head in read_named_heads([tmp_path / "a.npz"], ["gore"])] == ["gore"]
    with pytest.raises(ExportError, match="there is no head nude; the files hold gore, q16"):
        read_named_heads([tmp_path / "a.npz"], ["nude"])
    with pytest.raises(FileNotFoundError, match="no such file of heads"):
        read_named_heads([tmp_path / "b.npz"])


def test_tower_is_read_from_a_folder_with_its_preprocessing(tmp_path: Path) -> None:
    vision_tower().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 36}, "resample": 2, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}',
        encoding="utf-8",
    )
    found = read_tower(tmp_path)
    assert (found.dimension, found.image.size, found.image.resize) == (16, 32, 36)
    assert (found.image.resample, found.image.mean) == ("bilinear", (0, 0, 0))


def test_folder_of_another_model_is_no_tower(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(ExportError, match="its model_type is 'bert'; known: clip, clip_vision_model"):
        read_tower(tmp_path)
    with pytest.raises(ExportError, match="it is no folder"):
        read_tower(tmp_path / "config.json")
