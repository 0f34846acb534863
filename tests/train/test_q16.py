from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
pytest.importorskip("torch", reason="torch is not installed (extra train)")

from safeguard.backends import open_backend
from safeguard.checks.clip_heads import ClipHeads, PromptPair, read_heads, write_heads
from safeguard.checks.loading import load_check
from safeguard.errors import ExportError, PackError
from safeguard.packs import resolve, seal
from safeguard.train.q16 import Q16Config, read_prompts, released_form, train_q16
from safeguard.train.q16_data import LabelledPicture
from safeguard.train.q16_encoder import PictureEncoder, embed, from_tower, open_encoder
from tests.tiny_packs import red_pack
from tests.train.tiny_pictures import PARTS, write_labels, write_pictures

QUICK = Q16Config(epochs=20, learning_rate=0.02, scale=4.0)  # with 100 the means alone part red from blue
RED = Image.new("RGB", (16, 16), (200, 50, 50))
BLUE = Image.new("RGB", (16, 16), (50, 50, 200))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PictureEncoder:
    """Its embedding is the mean of each channel."""
    return open_encoder(red_pack(tmp_path_factory.mktemp("packs") / "red"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path, encoder: PictureEncoder) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    return train_q16(QUICK, encoder, pictures, pictures / "labels.jsonl", out, pack=True).folder


def metrics_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_held_out_pictures_are_told_apart(trained: Path) -> None:
    held_out = metrics_of(trained)["held_out"]
    assert (held_out["inappropriate"], held_out["harmless"]) == (3, 3)
    assert held_out["auroc"] == 1.0
    assert held_out["at"]["half"] == {"threshold": 0.5, "recall": 1.0, "false_positives": 0.0}
    assert held_out["flagged_by_category"]["red"] == {"pictures": 3.0, "flagged": 1.0}


def test_pack_is_a_check_that_knows_red_from_blue(trained: Path) -> None:
    check: Any = load_check(str(trained / "pack"))
    red, blue = (finding.scores["inappropriate"] for finding in check([RED, BLUE]))
    assert red > 0.5 > blue
    assert set(check.operating_points) == {"lenient", "standard", "strict"}


def test_heads_are_what_the_exporter_and_the_check_read(trained: Path, encoder: PictureEncoder) -> None:
    (head,) = read_heads(trained / "heads.npz")
    assert (head.category, head.dimension) == ("inappropriate", 3)
    check = ClipHeads(encoder.backend, [head], encoder.image)
    wanted: Any = load_check(str(trained / "pack"))
    assert check([RED])[0].scores == pytest.approx(wanted([RED])[0].scores)


def test_prompts_are_written_in_the_released_form(trained: Path) -> None:
    with np.load(trained / "prompts.npz", allow_pickle=False) as file:
        assert file["prompts"].dtype == np.float16
        prompts = file["prompts"]
    (head,) = read_heads(trained / "heads.npz")
    rows = np.array([[200.0, 50.0, 50.0], [50.0, 50.0, 200.0]])
    # the released prompts are used with a scale of 100 and no other number
    assert PromptPair("q", prompts).raw(rows) == pytest.approx(head.raw(rows), rel=1e-2)


def test_metrics_name_seed_recipe_encoder_and_data(trained: Path, encoder: PictureEncoder) -> None:
    found = metrics_of(trained)
    assert found["seed"] == 0
    assert found["encoder"] == {"name": "red-heads", "digest": encoder.digest}
    assert len(found["data"]["pictures"]) == len(found["data"]["labels"]["labels.jsonl"]) == 64
    assert found["data"]["counts"]["train"] == {"inappropriate": 6, "harmless": 6}
    assert json.loads((trained / "config.json").read_text())["epochs"] == 20


def test_the_same_seed_gives_the_same_metrics(
    tmp_path: Path, trained: Path, pictures: Path, encoder: PictureEncoder
) -> None:
    again = train_q16(QUICK, encoder, pictures, pictures / "labels.jsonl", tmp_path / "out")
    first, second = metrics_of(trained), metrics_of(again.folder)
    del first["wall_s"], second["wall_s"]
    assert first == second


def test_training_lowers_the_validation_loss(trained: Path) -> None:
    found = metrics_of(trained)
    losses = found["validation_loss"]
    assert len(losses) == 21
    assert losses[found["best_epoch"]] == min(losses) < losses[0]


def test_released_prompts_are_measured_with_no_epochs(
    tmp_path: Path, pictures: Path, encoder: PictureEncoder
) -> None:
    # rows harmless, harmful, of any length: blue, then red
    np.savez(tmp_path / "q16.npz", prompts=np.array([[0, 0, 22], [21, 0, 0]], np.float16))
    config = Q16Config(epochs=0, calibrate=False)
    start = tmp_path / "q16.npz"
    labels = pictures / "labels.jsonl"
    result = train_q16(config, encoder, pictures, labels, tmp_path / "out", start=start)
    assert result.head.prompts == pytest.approx(np.array([[0, 0, 1], [1, 0, 0]]))
    assert result.metrics["held_out"] == result.metrics["before_training"] | {
        "at": result.metrics["held_out"]["at"]
    }
    assert list(result.metrics["start"]) == ["q16.npz"]


def test_prompts_of_another_width_are_refused(
    tmp_path: Path, pictures: Path, encoder: PictureEncoder
) -> None:
    np.save(tmp_path / "wide.npy", np.ones((2, 512), np.float32))
    start = tmp_path / "wide.npy"
    with pytest.raises(ValueError, match="prompts of 512 numbers, red-heads gives embeddings of 3"):
        train_q16(QUICK, encoder, pictures, pictures / "labels.jsonl", tmp_path / "out", start=start)


def test_folds_are_measured(tmp_path: Path, pictures: Path, encoder: PictureEncoder) -> None:
    config = Q16Config(epochs=2, folds=3)
    result = train_q16(config, encoder, pictures, pictures / "labels.jsonl", tmp_path / "out")
    assert result.metrics["folds"] == {"folds": 3, "accuracy": [1.0, 0.0], "auroc": [1.0, 0.0]}


def test_two_folds_are_refused() -> None:
    with pytest.raises(ValidationError, match="folds must be 0, or 3 or more"):
        Q16Config(folds=2)


def test_balanced_labels_move_the_probabilities_of_the_rare_one_up(
    tmp_path: Path, encoder: PictureEncoder
) -> None:
    folder = write_pictures(tmp_path / "p", ("train", "train") + ("validation", "validation"))
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    for i in range(8):  # purple, harmless nine times, inappropriate once
        Image.new("RGB", (16, 16), (120, 40, 120 + i)).save(folder / f"{i}.png")
        rows.append({"file": f"{i}.png", "label": int(i == 0), "split": "train"})
        rows.append({"file": f"{i}.png", "label": int(i == 0), "split": "validation"})
    labels = write_labels(folder, rows)
    settings = {"scale": 2.0, "epochs": 60, "learning_rate": 0.05, "calibrate": False}
    purple = np.array([[120.0, 40.0, 124.0]])
    scores = [
        train_q16(
            Q16Config(**settings, balanced=balanced), encoder, folder, labels, tmp_path / f"{balanced}"
        ).head.raw(purple)[0]
        for balanced in (False, True)
    ]
    assert scores[0] < scores[1]


def test_a_part_with_one_label_is_refused(tmp_path: Path, encoder: PictureEncoder) -> None:
    folder = write_pictures(tmp_path / "p", ("train",) * 4 + ("validation",))
    with pytest.raises(ValueError, match="validation needs pictures of both labels, got 0 inappropriate"):
        train_q16(QUICK, encoder, folder, folder / "labels.jsonl", tmp_path / "out")


def test_without_held_out_pictures_there_are_no_such_figures(tmp_path: Path, encoder: PictureEncoder) -> None:
    folder = write_pictures(tmp_path / "p", PARTS[:18])
    result = train_q16(Q16Config(epochs=1), encoder, folder, folder / "labels.jsonl", tmp_path / "out")
    assert result.metrics["held_out"] is None
    assert result.metrics["validation"]["auroc"] == 1.0


def test_a_folder_with_a_head_is_not_written_over(
    trained: Path, pictures: Path, encoder: PictureEncoder
) -> None:
    with pytest.raises(FileExistsError, match="holds a head already"):
        train_q16(QUICK, encoder, pictures, pictures / "labels.jsonl", trained)


def test_an_encoder_without_text_cannot_start_from_words(
    tmp_path: Path, pictures: Path, encoder: PictureEncoder
) -> None:
    with pytest.raises(ValueError, match="red-heads has no text half, so init must be 'means'"):
        train_q16(Q16Config(init="text"), encoder, pictures, pictures / "labels.jsonl", tmp_path / "out")


def test_a_black_picture_has_no_direction_and_is_named(tmp_path: Path, encoder: PictureEncoder) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    black = LabelledPicture(tmp_path / "black.png", "black.png", False, "train")
    with pytest.raises(ValueError, match=r"gives black.png an embedding that is not finite or has no dir"):
        embed(encoder, [black])


def test_a_file_that_is_no_picture_is_named(tmp_path: Path, encoder: PictureEncoder) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.png: "):
        embed(encoder, [LabelledPicture(tmp_path / "text.png", "text.png", False, "train")])


def test_every_view_of_a_transparent_picture_is_embedded(tmp_path: Path, encoder: PictureEncoder) -> None:
    Image.new("RGBA", (16, 16), (200, 50, 50, 128)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 16), (50, 50, 200)).save(tmp_path / "b.png")
    listed = [LabelledPicture(tmp_path / f"{n}.png", n, False, "train") for n in "ab"]
    found = embed(encoder, listed)
    assert found.owners.tolist() == [0, 0, 0, 1]  # colours as stored, on white, on black
    assert found.index().tolist() == [[0, 1, 2], [3, 3, 3]]
    assert np.linalg.norm(found.rows, axis=1) == pytest.approx(np.ones(4))


# --- encoders -------------------------------------------------------------------------------------


def test_a_classifier_pack_needs_the_name_of_an_output(tmp_path: Path) -> None:
    folder = red_pack(tmp_path / "red")
    fields = resolve(folder).manifest.model_dump(exclude={"files"})
    seal(folder, {**fields, "kind": "image_classifier"}, files=["model.onnx"])
    with pytest.raises(ValueError, match="name the output of its model that holds embeddings"):
        open_encoder(folder)
    assert open_encoder(folder, output="image_embeds").output == "image_embeds"


def test_a_text_pack_is_no_picture_encoder(tmp_path: Path) -> None:
    from tests.tiny_packs import rude_pack

    with pytest.raises(PackError, match="is a text_classifier, which gives no picture embeddings"):
        open_encoder(rude_pack(tmp_path / "rude"))


def clip_folder(folder: Path, *, projection: int = 16) -> Path:
    """A tiny CLIP with both halves, a tokenizer, and 16 numbers an embedding."""
    transformers = pytest.importorskip("transformers")
    import torch

    from tests.exporters.tiny import tokenizer

    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    }
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 60, "max_position_embeddings": 40, "eos_token_id": 2},
        vision_config={**small, "image_size": 32, "patch_size": 8, "projection_dim": projection},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


def test_a_tower_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no CLIP tower could be loaded from it"):
        open_encoder(clip_folder(tmp_path / "clip", projection=24))


def test_a_clip_folder_is_an_encoder_whose_head_becomes_a_pack(
    tmp_path: Path, clip: Path, pictures: Path
) -> None:
    pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
    encoder = open_encoder(clip)
    config = Q16Config(epochs=3, mirrored=False)
    result = train_q16(config, encoder, pictures, pictures / "labels.jsonl", tmp_path / "out", pack=True)
    check: Any = load_check(str(tmp_path / "out" / "pack"))
    mine = ClipHeads(encoder.backend, [result.head], encoder.image)
    assert check([RED])[0].scores == pytest.approx(mine([RED])[0].scores, abs=1e-3)
    logits = open_backend(
        tmp_path / "out" / "pack" / "model.onnx", inputs=["pixel_values"], outputs=["logits"]
    )
    assert logits({"pixel_values": np.zeros((1, 3, 32, 32), np.float32)})["logits"].shape == (1, 1)


def test_words_are_where_training_starts_in_the_paper(tmp_path: Path, clip: Path, pictures: Path) -> None:
    encoder = open_encoder(clip)
    assert encoder.texts is not None
    config = Q16Config(init="text", harmless_text="w1 w2", harmful_text="w3", epochs=0, calibrate=False)
    result = train_q16(config, encoder, pictures, pictures / "labels.jsonl", tmp_path / "out")
    assert result.head.prompts == pytest.approx(encoder.texts(["w1 w2", "w3"]), abs=1e-6)


def test_a_tower_in_memory_is_an_encoder_and_its_weights_are_its_digest() -> None:
    from safeguard.exporters.clip import tower
    from tests.exporters.tiny import vision_tower

    one, same, other = (from_tower(tower(vision_tower(seed=seed))) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert one.texts is None


# --- files of prompts -----------------------------------------------------------------------------


def test_released_forms_are_read(tmp_path: Path) -> None:
    prompts = np.array([[1.0, 2.0], [3.0, 4.0]], np.float16)
    np.savez(tmp_path / "a.npz", prompts=prompts)
    np.save(tmp_path / "b.npy", prompts)
    write_heads(tmp_path / "c.npz", [PromptPair("harm", prompts, 50.0)])
    found = [read_prompts(tmp_path / name) for name in ("a.npz", "b.npy", "c.npz")]
    assert [pair.scale for pair in found] == [100.0, 100.0, 50.0]
    assert all(np.array_equal(pair.prompts, prompts) for pair in found)
    assert [pair.category for pair in found] == ["inappropriate", "inappropriate", "harm"]


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.ones(3))
    with pytest.raises(PackError, match=r"a.npz has no pair of prompts for None; it has none"):
        read_prompts(tmp_path / "a.npz")


def test_released_form_keeps_the_logits_of_another_scale() -> None:
    pair = PromptPair("q", np.array([[1.0, 0.0], [0.0, 1.0]]), 40.0)
    rows = np.array([[0.6, 0.8]])
    # 40 * (0.8 - 0.6)
    assert PromptPair("q", released_form(pair)).raw(rows) == pytest.approx([8.0], rel=1e-5)


def test_a_scale_beyond_the_released_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale 1000.0 of 'q' cannot be told in prompts of scale 100"):
        released_form(PromptPair("q", np.eye(2), 1000.0))
