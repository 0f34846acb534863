"""Training of refiners that see pictures, on tiny random models of the real classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl")

import torch
from PIL import Image
from safetensors.torch import load_file

from safeguard.refiners.torch_vlm import TorchVLM
from safeguard.refiners.vlm import VLMRefiner
from safeguard.train.refiner.examples import IGNORED
from safeguard.train.refiner.pairs import Pair
from safeguard.train.refiner.pictures import PictureModels
from safeguard.train.refiner.rl import load_rewards, train_refiner_rl
from safeguard.train.refiner.sft import train_refiner_sft
from safeguard.train.refiner.vision import VisionBatch, open_picture, vision_end
from safeguard.types import RefineRequest
from tests.tiny_vlms import TEMPLATE, save, vlm
from tests.train.tiny_refiner import IGNORE_PEFT, rl_config, sft_config

pytestmark = pytest.mark.filterwarnings(IGNORE_PEFT)
RED = Image.new("RGB", (40, 30), (200, 0, 0))
PAIRS = [Pair("a bad cat", "a good cat", image=RED), Pair("a calm dog", None)]


def write_data(folder: Path) -> Path:
    """Three pictures, each with a prompt to rewrite and one that stays."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, word in enumerate(("cat", "dog", "owl")):
        Image.new("RGB", (40, 30), (200, 40 * i, 0)).save(folder / "images" / f"{i}.png")
        rows += [
            {"file_name": f"images/{i}.png", "query": f"a bad {word}", "response": f"a good {word}"},
            {"file_name": f"images/{i}.png", "query": f"a calm {word}", "response": "keep"},
        ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["qwen", "idefics"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished supervised run of two steps beside its base and data."""
    root = tmp_path_factory.mktemp(str(request.param))
    base, data = save(root / "base", request.param), write_data(root / "data")
    config = sft_config(base, steps=2, validation_rows=2)
    train_refiner_sft(config, data / "metadata.jsonl", root / "run", template=TEMPLATE, progress=False)
    return root / "run"


def test_a_run_on_pictures_is_served_as_it_is(run: Path) -> None:
    refiner = VLMRefiner.load(run)
    assert refiner.template == TEMPLATE
    assert len(refiner([RefineRequest("a bad cat", ("bad",), result=RED, round=1)])) == 1


def test_the_adapter_leaves_what_reads_the_picture_alone(run: Path) -> None:
    names = load_file(run / "adapter_model.safetensors")
    assert any("q_proj" in name for name in names)
    assert not [name for name in names if "vis" in name or "connector" in name]


def test_the_run_records_the_digest_of_its_pictures(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert len(facts["pictures"]) == 64
    assert "VLMRefiner.load" in (run / "README.md").read_text(encoding="utf-8")


def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Any]]:
    return [[Image.new("RGB", (30, 30), (len(p) % 256, seed, 0)) for seed in seeds] for p in prompts]


def test_reinforcement_walks_through_the_pictures_of_its_own_rewrites(run: Path) -> None:
    models = PictureModels(
        drawn, lambda images: [0.9] * len(images), lambda images, texts: [0.2] * len(images)
    )
    config = rl_config(
        reward="improvement", safety_weight=0, intent_weight=0, edit_weight=0, images_per_prompt=2, steps=2
    )
    rewards = load_rewards(config, pictures=models, sees=True)
    out = run.parent / "rl"
    train_refiner_rl(
        config, run.parent / "data" / "metadata.jsonl", out, adapter=run, rewards=rewards, progress=False
    )
    buffer = json.loads((out / "checkpoints" / "checkpoint-2" / "image_buffer.json").read_text())
    assert set(buffer["visits"].values()) == {1}  # four prompts of six, each seen once
    assert all(states[0][0] == original for original, states in buffer["states"].items())
    assert any(len(states) == 2 for states in buffer["states"].values())
    assert VLMRefiner.load(out).template == TEMPLATE


def batch(kind: str) -> tuple[TorchVLM, VisionBatch, int]:
    model, processor = vlm(kind)
    lm = TorchVLM(model, processor)
    end = vision_end(lm, model, TEMPLATE)
    return lm, VisionBatch(lm, TEMPLATE, PAIRS, end), end


@pytest.mark.parametrize(("kind", "name"), [("qwen", "<|im_end|>"), ("idefics", "<end_of_utterance>")])
def test_an_answer_ends_as_the_chat_template_ends_a_turn(kind: str, name: str) -> None:
    lm, _, end = batch(kind)
    assert lm.tokenizer.convert_ids_to_tokens(end) == name


@pytest.mark.parametrize("kind", ["qwen", "idefics"])
def test_the_loss_is_on_the_answer_alone_with_and_without_a_picture(kind: str) -> None:
    lm, collate, end = batch(kind)
    made = collate([{"row": 0, "whole": False}, {"row": 1, "whole": False}])
    answers = [[t for t in row.tolist() if t != IGNORED] for row in made["labels"]]
    assert answers == [[*lm.encode("a good cat"), end], [*lm.encode("keep"), end]]
    shown = lm.render(TEMPLATE.messages("a bad cat"), picture=True)
    start = lm.inputs([shown], [RED])["input_ids"][0].tolist()
    assert made["input_ids"][0].tolist()[: len(start)] == start
    assert made["attention_mask"].sum(1).tolist() == [collate.length(0), collate.length(1)]


def test_the_loss_on_the_whole_leaves_padding_and_pictures_out() -> None:
    lm, collate, _ = batch("qwen")
    made = collate([{"row": 0, "whole": True}, {"row": 1, "whole": True}])
    image = lm.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ignored = made["labels"] == IGNORED
    assert torch.equal(ignored, (made["attention_mask"] == 0) | (made["input_ids"] == image))


def test_stored_pictures_are_read_in_each_form(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    forms = (RED, tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": (tmp_path / "a.png").read_bytes()})
    pictures = [open_picture(form) for form in forms]
    assert [picture.tobytes() for picture in pictures if picture] == [RED.tobytes()] * 4
    assert open_picture(None) is None


def test_a_picture_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stored bytes are no picture"):
        open_picture({"bytes": b"GIF"})
    with pytest.raises(FileNotFoundError):
        open_picture(str(tmp_path / "none.png"))
