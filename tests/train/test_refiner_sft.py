from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safeguard.refiners.causal_lm import CausalLMRefiner
from safeguard.refiners.template import RefinerTemplate
from safeguard.train.refiner.pairs import Pair
from safeguard.train.refiner.runs import finite, load_adapter, open_run
from safeguard.train.refiner.sft import RefinerSftConfig, select, train_refiner_sft
from safeguard.types import RefineRequest
from tests.tiny_decoders import TEMPLATE
from tests.train.tiny_refiner import IGNORE_PEFT, base_model, sft_config, write_pairs

pytestmark = pytest.mark.filterwarnings(IGNORE_PEFT)
RECIPES = Path(__file__).parents[2] / "safeguard" / "train" / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, pairs, and a finished run of four steps."""
    root = tmp_path_factory.mktemp("refiner")
    base_model(root / "base")
    write_pairs(root / "pairs.jsonl")
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    config = sft_config(folder / "base", validation_rows=0)
    train_refiner_sft(
        config, folder / "pairs.jsonl", folder / "run", template=TEMPLATE, merge=True, progress=False
    )
    return folder / "run"


def test_a_run_writes_adapter_template_metrics_card_and_merged_model(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "refiner_template.json",
        "metrics.json",
        "run.json",
        "README.md",
        "merged",
    } <= names


def test_metrics_hold_seed_counts_and_digests(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["seed"], metrics["steps"], metrics["examples"]) == (0, 4, 11)
    assert metrics["kept"] == 3  # .3 of the whole beside eight rewrites: 3.43
    assert len(metrics["pairs_digest"]) == len(metrics["files"]["pairs.jsonl"]) == 64
    assert metrics["versions"]["trl"].startswith("1.")


def test_the_adapter_is_stored_in_half_precision(run: Path) -> None:
    weights = load_file(run / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_the_adapter_changed_the_model(run: Path) -> None:
    weights = load_file(run / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_the_served_refiner_takes_the_folder_as_it_is(run: Path) -> None:
    refiner = CausalLMRefiner.load(run)
    assert refiner.template == TEMPLATE
    assert len(refiner([RefineRequest("a bad cat")])) == 1


def test_the_merged_model_answers_as_the_adapter_does(run: Path) -> None:
    prompts = ["a bad cat", "a calm dog"]
    assert CausalLMRefiner.load(run / "merged").readings(prompts) == CausalLMRefiner.load(run).readings(
        prompts
    )


def test_a_resumed_run_equals_an_unbroken_one(folder: Path, run: Path) -> None:
    config, data = sft_config(folder / "base"), folder / "pairs.jsonl"
    import shutil

    broken = folder / "broken"
    shutil.copytree(run, broken)
    for name in ("adapter_model.safetensors", "metrics.json"):
        (broken / name).unlink()
    shutil.rmtree(broken / "checkpoints" / "checkpoint-4")  # as if it had stopped after step 3
    train_refiner_sft(config, data, broken, template=TEMPLATE, resume=True, progress=False)
    first, again = (load_file(p / "adapter_model.safetensors") for p in (run, broken))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_run_in_the_folder_is_not_overwritten(folder: Path, run: Path) -> None:
    with pytest.raises(ValueError, match="holds a run already; give a new folder, or --resume"):
        train_refiner_sft(sft_config(folder / "base"), folder / "pairs.jsonl", run, template=TEMPLATE)


def test_a_run_goes_on_with_the_same_recipe_only(folder: Path, run: Path) -> None:
    other = sft_config(folder / "base", learning_rate=0.5)
    with pytest.raises(ValueError, match="had other config; give a new folder"):
        train_refiner_sft(other, folder / "pairs.jsonl", run, template=TEMPLATE, resume=True)


def test_whole_sequence_loss_trains_other_weights(folder: Path, run: Path) -> None:
    config = sft_config(folder / "base", whole_sequence_loss=True, steps=2)
    out = folder / "whole"
    train_refiner_sft(config, folder / "pairs.jsonl", out, template=TEMPLATE, progress=False)
    plain = load_file(run / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    whole = load_file(out / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)


def test_held_out_pairs_are_measured(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"a bad {w}", "rewrite": f"a {w}", "split": "train"} for w in ("cat", "dog")]
    rows += [{**row, "split": "validation"} for row in rows]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = sft_config(folder / "base", steps=1, validation_rows=10)
    found = train_refiner_sft(config, data, tmp_path / "run", template=TEMPLATE, progress=False)
    assert found.metrics["examples"] == 2
    assert 0 < found.metrics["validation_loss"] < 20
    assert 0 <= found.metrics["validation_token_accuracy"] <= 1


def test_data_without_a_short_enough_pair_is_an_error(folder: Path, tmp_path: Path) -> None:
    config = sft_config(folder / "base", max_tokens=32)
    with pytest.raises(ValueError, match="no pair of at most 32 tokens to train on, of 11"):
        train_refiner_sft(config, folder / "pairs.jsonl", tmp_path / "run", template=TEMPLATE)


def test_without_filters_no_model_is_loaded_to_select_pairs() -> None:
    assert select([Pair("a", "b")], sft_config("x")) == ([Pair("a", "b")], {"far": 0, "flagged": 0})


def test_rewrites_that_the_shipped_check_flags_are_left_out() -> None:
    config = sft_config("x", drop_flagged=True, threshold=0.0)  # from 0 on everything is flagged
    assert select([Pair("a", "a cat")], config)[1] == {"far": 0, "flagged": 1}


def test_the_shipped_recipe_is_valid_and_small_enough() -> None:
    config = RefinerSftConfig.read(RECIPES / "refiner_sft.toml")
    # SmolLM2-135M: 30 layers; q, o 576 x 576; k, v 576 x 192; gate, up, down 576 x 1536
    sides = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert 2 * 30 * config.lora.rank * sides < 12e6  # two bytes a weight


@pytest.mark.parametrize(
    "wrong", [{"keep_share": 1.0}, {"learning_rate": math.inf}, {"lora": {"rank": 0}}, {"stepps": 3}]
)
def test_a_recipe_cannot_be_in_a_wrong_state(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RefinerSftConfig.model_validate(wrong)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(ValueError, match="training diverged: loss is not finite"):
        finite([{"loss": 1.0}, {"loss": math.nan}], "loss")


def test_a_run_that_has_no_checkpoint_yet_starts_anew(tmp_path: Path) -> None:
    assert open_run(tmp_path / "run", {"a": 1}, steps=4, resume=False) is None
    assert open_run(tmp_path / "run", {"a": 1}, steps=4, resume=True) is None


def test_a_run_goes_on_from_the_last_whole_checkpoint_before_its_end(tmp_path: Path) -> None:
    open_run(tmp_path, {}, steps=4, resume=False)
    for step in (1, 2, 3, 4):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    for step in (1, 2, 4):  # the third was cut off while it was written
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").touch()
    found = open_run(tmp_path, {}, steps=4, resume=True)
    assert found == str(tmp_path / "checkpoints" / "checkpoint-2")


def test_a_finished_run_does_not_go_on(folder: Path, run: Path) -> None:
    with pytest.raises(ValueError, match="is finished; give a new folder"):
        train_refiner_sft(
            sft_config(folder / "base"), folder / "pairs.jsonl", run, template=TEMPLATE, resume=True
        )


def test_a_folder_without_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json of an earlier run"):
        load_adapter(tmp_path, sft_config("x"))


def test_the_default_template_is_the_served_one() -> None:
    assert RefinerTemplate.default().keep == "keep"
