"""The example that trains a text-to-image pipeline: captions, labels, and the whole recipe at a tiny size."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import BertConfig, BertModel

from examples.emoji_diffusion import data, train, train_text_encoder, train_vae, training
from examples.emoji_diffusion.sheet import draw_sheet

RED, GREEN = (220, 20, 20), (20, 160, 20)


def square(colour: tuple[int, int, int]) -> data.Pixels:
    """A square of 32 pixels in the middle of a transparent picture."""
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[16:48, 16:48] = (*colour, 255)
    return picture


def emoji(key: str, *names: str, group: str = "tool", colour: tuple[int, int, int] = RED) -> data.Emoji:
    return data.Emoji(key, names, group, square(colour), key in data.words()["names"])


ROWS = [  # key, unified, category, subcategory, colour
    ("cat", "1F431", "Animals & Nature", "animal-mammal", GREEN),
    ("pizza", "1F355", "Food & Drink", "food-prepared", RED),
    ("hocho", "1F52A", "Food & Drink", "dishware", (90, 90, 90)),
    ("otter", "1F9A6", "Animals & Nature", "animal-mammal", (90, 60, 20)),
    ("male-cook", "1F468-200D-1F373", "People & Body", "person-role", GREEN),
    ("flag-fr", "1F1EB-1F1F7", "Flags", "country-flag", GREEN),
]


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two archives as npm packs them, with six emoji, of which the last two are not drawn."""
    rows, pictures = [], {}
    for order, (key, unified, category, subcategory, colour) in enumerate(ROWS):
        rows.append(
            {
                "name": key.upper(),
                "unified": unified,
                "image": f"{key}.png",
                "short_name": key,
                "short_names": [key],
                "category": category,
                "subcategory": subcategory,
                "sort_order": order,
                "has_img_google": True,
            }
        )
        png = io.BytesIO()
        Image.fromarray(square(colour)).save(png, "PNG")
        pictures[f"package/img/google/64/{key}.png"] = png.getvalue()
    keywords = {
        "\U0001f9a6": ["otter", "animal", "river_dog"],
        "\U0001f431": ["cat_face", "animal", "whiskers"],
    }
    pack(tmp_path / data.PICTURES, {"package/emoji.json": json.dumps(rows).encode(), **pictures})
    pack(tmp_path / data.KEYWORDS, {"package/dist/emoji-en-US.json": json.dumps(keywords).encode()})
    for name in (data.PICTURES, data.KEYWORDS):
        monkeypatch.setitem(data.SHA256, name, hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    return tmp_path


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_flags_and_gendered_forms_are_not_drawn(npm: Path) -> None:
    assert list(data.read_emoji(npm)) == ["cat", "pizza", "hocho", "otter"]


def test_keywords_that_name_one_emoji_only_are_names_of_it(npm: Path) -> None:
    # "animal" stands at two emoji, "river dog" at one
    assert data.read_emoji(npm)["otter"].names == ("otter", "river dog")


def test_another_archive_is_refused(npm: Path) -> None:
    (npm / data.KEYWORDS).write_bytes(b"something else")
    with pytest.raises(ValueError, match="must have the SHA-256"):
        data.read_emoji(npm)


def test_missing_archives_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        data.read_emoji(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "a cat"),
        ("umbrella", "an umbrella"),
        ("slice of pizza", "a slice of pizza"),
        ("bunch of grapes", "a bunch of grapes"),
        ("french fries", "french fries"),
        ("glass of milk", "a glass of milk"),
        ("two mugs of beer", "two mugs of beer"),
        ("cutlass", "a cutlass"),
    ],
)
def test_article_of_a_name(name: str, expected: str) -> None:
    assert data.with_article(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pizza", "pizzas"),
        ("slice of pizza", "slices of pizza"),
        ("puppy", "puppies"),
        ("monkey", "monkeys"),
        ("paintbrush", "paintbrushes"),
        ("fireman", "firemen"),
        ("grapes", "grapes"),
    ],
)
def test_plural_of_a_name(name: str, expected: str) -> None:
    assert data.plural(name) == expected


def test_transparent_parts_are_white_without_a_background() -> None:
    picture = data.draw(data.Scene(("axe",), ()), {"axe": emoji("axe", "axe")})
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[0, 0]) == (255, 255, 255)
    assert tuple(picture[32, 32]) == RED


def test_a_pair_stands_side_by_side_in_its_order() -> None:
    world = {"a": emoji("a", "a"), "b": emoji("b", "b", colour=GREEN)}
    picture = data.draw(data.Scene(("a", "b"), ()), world)
    # halves of 32 pixels from row 16 on: the squares' middles are at (32, 16) and (32, 48)
    assert tuple(picture[32, 16]) == RED
    assert tuple(picture[32, 48]) == GREEN


def test_background_has_the_colour_of_the_table() -> None:
    picture = data.draw(data.Scene(("axe",), (), background="blue"), {"axe": emoji("axe", "axe")})
    assert list(picture[0, 0]) == data.words()["colours"]["blue"]


def test_paint_turns_the_main_hue_and_keeps_what_is_clear() -> None:
    painted = data.repaint(square(RED), "blue")
    red, _, blue, alpha = painted[32, 32]
    assert blue > 150 > red
    assert alpha == 255
    assert painted[0, 0, 3] == 0


def test_compositions_are_the_same_for_the_same_seed() -> None:
    world = {"car": emoji("car", "car"), "man": emoji("man", "man", group="person")}
    assert data.compositions(world, 30, 1) == data.compositions(world, 30, 1)
    assert data.compositions(world, 30, 1) != data.compositions(world, 30, 2)


def test_no_held_out_composition_is_trained_on() -> None:
    world = {key: emoji(key, key) for key in ("car", "axe", "saw", "key", "bed", "cup", "hat", "pen")}
    trained, held_out = data.split(data.compositions(world, 2000, 0))
    what = [{(scene.keys, scene.paint, scene.background) for scene in part} for part in (trained, held_out)]
    assert held_out
    assert not what[0] & what[1]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("gun", (1, "weapons")),
        ("beer", (1, "alcohol")),
        ("smoking", (1, "smoking")),
        ("middle_finger", (1, "rude")),
        ("skull", (1, "death")),
        ("drop_of_blood", (1, "blood")),
        ("droplet", (0, "")),
        ("spoon", (0, "")),
        ("ghost", None),
    ],
)
def test_labels_of_a_family_app(key: str, expected: tuple[int, str] | None) -> None:
    assert data.label(key) == expected


def test_nothing_is_both_inappropriate_and_unlabelled() -> None:
    bad = {key for keys in data.words()["inappropriate"].values() for key in keys}
    held_out = data.words()["held_out"]
    assert not bad & {*held_out["unlabelled"], *held_out["appropriate"]}
    assert set(held_out["inappropriate"]) <= bad


def test_labelled_pictures_keep_held_out_emoji_apart(tmp_path: Path) -> None:
    keys = ("bed", "gun", "dagger_knife", "spoon", "key", "saw", "hat", "pen", "cup")
    world = {key: emoji(key, key) for key in keys}
    counts = data.write_labelled(world, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    # alone, on six backgrounds, and beside harmless ones of its split: the gun with key, saw, hat, pen, cup;
    # the dagger, held out, beside the spoon, held out by name, and the bed, as the first of every seven
    assert counts["train weapons"] == 12
    assert counts["held_out weapons"] == 9
    assert {row["split"] for row in rows if row["name"] == "dagger_knife"} == {"held_out"}
    assert all((tmp_path / row["file"]).is_file() for row in rows)


def test_the_loss_weighs_a_step_by_its_signal() -> None:
    # alpha 0.5: SNR 1, weight 1 / 2; alpha 0.9: SNR 9, capped at 5, weight 5 / 10
    off_by_one = torch.ones(1, 4, 2, 2)
    half = train.denoising_loss(off_by_one, torch.zeros(1, 4, 2, 2), torch.tensor([0.5]), 5.0)
    much = train.denoising_loss(off_by_one, torch.zeros(1, 4, 2, 2), torch.tensor([0.9]), 5.0)
    assert half.item() == pytest.approx(0.5)
    assert much.item() == pytest.approx(0.5)


def test_learning_rate_rises_then_falls_to_its_floor() -> None:
    # step 4 of 10 to warm up is half-way there; after all steps the floor of .02 is left
    assert training.warmup_cosine(4, 100, warmup=10) == pytest.approx(0.5)
    assert training.warmup_cosine(10, 100, warmup=10) == pytest.approx(1)
    assert training.warmup_cosine(100, 100, warmup=10) == pytest.approx(0.02)


def test_a_step_draws_the_same_numbers_again() -> None:
    assert training.step_rng(1, 7)[0].random() == training.step_rng(1, 7)[0].random()
    assert training.step_rng(1, 7)[0].random() != training.step_rng(1, 8)[0].random()


def tiny_minilm(folder: Path) -> Path:
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
        "cat",
        "otter",
        "face",
    ]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


VAE = train_vae.VaeConfig(channels=(8, 8, 8), steps=2, batch=2, precision="no")
TEXT = train_text_encoder.TextConfig(steps=2, batch=4, commonest_words=100, max_tokens=16)
TINY = train.DiffusionConfig(
    channels=(8, 8, 8), head_size=8, steps=2, batch=2, compositions=8, precision="no", save_every=1
)


@pytest.fixture
def trained(npm: Path, tmp_path: Path) -> Path:
    """A run folder with everything but the denoiser."""
    out = tmp_path / "run"
    train_vae.train_vae(VAE, npm, out)
    train_text_encoder.train_text_encoder(TEXT, tiny_minilm(tmp_path / "minilm"), npm, out)
    return out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_recipe_gives_a_stock_pipeline_that_draws(npm: Path, trained: Path) -> None:
    train.train(TINY, npm, trained)
    pipe = StableDiffusionPipeline.from_pretrained(trained / "pipeline", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a cat", "an otter"], num_inference_steps=2).images
    sheet = draw_sheet(pipe, ["a cat", "an otter"], seeds=2, steps=1)
    metrics = json.loads((trained / "pipeline" / "metrics.json").read_text())
    assert [image.size for image in images] == [(64, 64), (64, 64)]
    assert sheet.size == (2 * (2 * 64 + 12), 64 + 16 + 12)  # two columns of two pictures and a gap
    assert type(pipe) is StableDiffusionPipeline
    assert metrics["steps_done"] == 2
    assert metrics["config"]["seed"] == 5


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_resumed_training_ends_like_an_unbroken_one(npm: Path, trained: Path) -> None:
    whole = train.train(TINY, npm, trained).unet.state_dict()
    (trained / "checkpoint.pt").unlink()
    train.train(TINY, npm, trained, stop_at=1)
    state = training.load_checkpoint(trained / "checkpoint.pt")
    assert state is not None
    assert state["step"] == 1
    again = train.train(TINY, npm, trained).unet.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_text_encoder_masks_its_padding_and_keeps_its_scale(trained: Path) -> None:
    encoder = BertModel.from_pretrained(trained / "text_encoder")
    assert encoder.config.use_attention_mask is True
    assert len(encoder.encoder.layer) == 3
