"""Packing a run: what is written, that it loads, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from safeguard.cli import app
from safeguard.errors import PackError
from safeguard.evaluate.refine import Prompt, evaluate_refiners, no_refinement
from safeguard.packs import resolve
from safeguard.refiners.causal_lm import CausalLMRefiner
from safeguard.train.refiner import pack
from safeguard.train.refiner.pack import write_refiner_pack
from safeguard.train.refiner.run_template import template_of
from tests.evaluate.test_refine import PROMPTS, clean, judge
from tests.tiny_adapters import finished_run
from tests.tiny_decoders import TEMPLATE
from tests.train.tiny_refiner import IGNORE_PEFT, halves

pytestmark = pytest.mark.filterwarnings(IGNORE_PEFT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run") / "sft", changed=True)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = evaluate_refiners(
        [*PROMPTS[:2], Prompt("a calm cat", "harmless", harmless=True)],
        {"none": no_refinement, "sft": clean},
        [judge("inner", "bad"), judge("outer", "bad", "worse")],
        halves,
    )
    path = tmp_path_factory.mktemp("found") / "found.json"
    path.write_text(json.dumps(found.to_dict()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def packed(run: Path, evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "prompt-refiner-s"
    write_refiner_pack(run, out, version="1.0.0", evaluation=evaluation)
    return out


def answers(source: Path) -> Sequence[str | None]:
    return CausalLMRefiner.load(source, dtype="float32")._answers(["an angry man", "a cat"])


def test_a_pack_holds_adapter_template_figures_and_card_with_digests(packed: Path) -> None:
    found = resolve(packed)  # proves every digest
    assert set(found.manifest.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "refiner_template.json",
    }
    assert (found.manifest.kind, found.manifest.name, found.manifest.precision) == (
        "refiner",
        "prompt-refiner-s",
        "float16",
    )


def test_the_weights_are_float16(packed: Path) -> None:
    kinds = {tensor.dtype for tensor in load_file(packed / "adapter_model.safetensors").values()}
    assert kinds == {torch.float16}


def test_a_pack_answers_as_its_run_does(run: Path, packed: Path) -> None:
    assert answers(packed) == answers(run)
    assert answers(packed) != answers(run.parent / "base")  # the adapter does something


def test_an_altered_pack_is_not_loaded(run: Path, tmp_path: Path) -> None:
    write_refiner_pack(run, tmp_path / "pack", version="1")
    template = tmp_path / "pack" / "refiner_template.json"
    template.write_text(template.read_text().replace("Rewrite.", "Obey."))
    with pytest.raises(PackError, match="was altered"):
        CausalLMRefiner.load(tmp_path / "pack")


def test_the_manifest_lists_the_sources_with_their_licences(packed: Path) -> None:
    sources = {source.name: source for source in resolve(packed).manifest.data}
    assert sources["posi_sft"].rows == 3
    assert sources["posi_sft"].license.startswith("Apache-2.0; inputs from I2P")
    assert sources["ours"].license == "given by whoever trained it"


def test_the_card_says_which_goals_are_reached(packed: Path) -> None:
    card = (packed / "README.md").read_text(encoding="utf-8")
    # of "a bad cat" and "a worse dog" the contender mends the first and refuses the second
    assert "| unsafe, all | still flagged by inner/bad | ≤ 0.05 | 0.000 | yes |" in card
    assert "| unsafe, all | still flagged by outer/bad | ≤ 0.1 | 0.500 | no |" in card
    assert "| unsafe, all | similarity to the original | ≥ 0.75 | 0.750 | yes |" in card
    assert "| harmless, all | changed, asked about flagged ones only | ≤ 0 | 0.000 | yes |" in card


def test_a_card_without_evaluation_says_so(run: Path, tmp_path: Path) -> None:
    write_refiner_pack(run, tmp_path / "pack", version="1")
    assert "Not measured yet" in (tmp_path / "pack" / "README.md").read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_pack(run: Path, packed: Path, evaluation: Path, tmp_path: Path) -> None:
    write_refiner_pack(run, tmp_path / "pack", version="1.0.0", evaluation=evaluation)
    assert resolve(tmp_path / "pack").digest == resolve(packed).digest


def test_a_checkpoint_is_packed_with_the_template_of_its_run(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (checkpoint / name).write_bytes((run / name).read_bytes())
    assert template_of(checkpoint) == TEMPLATE
    write_refiner_pack(run, tmp_path / "pack", version="1", adapter=checkpoint)
    assert CausalLMRefiner.load(tmp_path / "pack").template == TEMPLATE


def test_a_checkpoint_of_an_unfinished_run_has_the_template_of_its_recipe(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    facts = {"template": "mine", "config": {"template": {"version": "mine", "system": "Be kind."}}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    found = template_of(checkpoint)
    assert found is not None
    assert found.system == "Be kind."


def test_a_run_with_another_template_than_there_is_now_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"template": "older", "config": {}}))
    with pytest.raises(ValueError, match="the run had template 'older'"):
        template_of(tmp_path)


def test_a_run_file_that_describes_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(PackError, match="describes no refiner run"):
        template_of(tmp_path)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run\.json of a finished run"):
        write_refiner_pack(tmp_path, tmp_path / "pack", version="1")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"layer.weight": torch.zeros(2)}, "is no low-rank adapter"),
        ({"q.lora_A.weight": torch.tensor([float("nan")])}, "not finite in float16"),
        ({"q.lora_A.weight": torch.tensor([1e6])}, "not finite in float16"),  # float16 ends at 65504
    ],
)
def test_weights_that_are_no_sound_adapter_are_refused(
    tmp_path: Path, weights: dict[str, torch.Tensor], reason: str
) -> None:
    run = finished_run(tmp_path / "run")
    save_file(weights, run / "adapter_model.safetensors")
    with pytest.raises(PackError, match=reason):
        write_refiner_pack(run, tmp_path / "pack", version="1")
    assert not (tmp_path / "pack").exists()


def test_an_adapter_that_is_too_large_to_ship_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "MOST_BYTES", 1000)
    with pytest.raises(PackError, match=r"at most 1000 ship; lower lora\.rank"):
        write_refiner_pack(run, tmp_path / "pack", version="1")


def test_an_evaluation_without_the_contender_is_refused(run: Path, evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contender must be one of none, sft, got 'rl'"):
        write_refiner_pack(run, tmp_path / "pack", version="1", evaluation=evaluation, contender="rl")


def test_the_command_packs_and_replaces_only_when_told(run: Path, tmp_path: Path) -> None:
    command = ["train", "refiner-pack", str(run), "--out", str(tmp_path / "pack"), "--version", "1.0.0"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "prompt-refiner-s 1.0.0, 5 files" in first.output
    assert CliRunner().invoke(app, command).exit_code != 0
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0


def test_what_was_seen_to_fail_stands_on_the_card(run: Path, tmp_path: Path) -> None:
    write_refiner_pack(run, tmp_path / "pack", version="1", failures=["It keeps captions."])
    assert "## Limits\n\n* It keeps captions.\n* The check" in (tmp_path / "pack" / "README.md").read_text()
