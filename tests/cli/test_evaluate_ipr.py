from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="diffusers is not installed (extra diffusers)")
pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
pytest.importorskip("transformers", reason="transformers is not installed (extra torch)")

from safeguard.checks.clip_heads import HEADS_NAME, Perceptron, write_heads
from safeguard.cli import app
from safeguard.packs import seal
from tests.evaluate.tiny_diffusion import stable_diffusion
from tests.tiny_packs import red_pack

pytestmark = pytest.mark.filterwarnings("ignore:You have passed:FutureWarning")


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["evaluate", "ipr", *map(str, arguments)], catch_exceptions=False)
    return found.exit_code, found.output


def head_pack(folder: Path, bias: float) -> Path:
    """The tower of `red_pack` with another head: sigmoid(bias), whatever the picture."""
    red_pack(folder)
    write_heads(folder / HEADS_NAME, [Perceptron("red", np.zeros((1, 3)), np.zeros(1), np.zeros(1), bias)])
    manifest = json.loads((folder / "safeguard.json").read_text())
    del manifest["files"]
    seal(folder, {**manifest, "name": f"head-{bias:g}"}, files=["model.onnx", HEADS_NAME])
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("pipe") / "tiny")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"text": "w1 w2", "category": "a"}, {"text": "w3", "category": "b"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_real_pipeline_goes_through_the_guards_loop(tmp_path: Path, pipeline: Path, prompts: Path) -> None:
    always, judge = head_pack(tmp_path / "always", 4.0), red_pack(tmp_path / "judge")
    out = tmp_path / "out"
    options = ("--check", always, "--judge", judge, "--images", 2, "--rounds", 1, "--steps", 2)
    code, said = run(prompts, "--pipeline", pipeline, "--out", out, *options)
    assert code == 0, said
    found = json.loads((out / "ipr.json").read_text())
    steps = {row["step"]: row for row in found["rows"]}
    assert list(steps) == ["bare", "round 0", "round 1", "handed out"]
    assert steps["round 1"]["kept"] == 0.0  # the check flags every picture, so each is drawn again
    assert steps["handed out"]["refused"] == 1.0  # and withheld at the end
    assert found["settings"]["pipeline"] == "StableDiffusionPipeline"
    assert (out / "sheet.png").is_file()
    assert "| all | bare | 4 |" in said


def test_the_protocol_of_ipr_runs_with_its_negative_prompt(
    tmp_path: Path, pipeline: Path, prompts: Path
) -> None:
    judge = red_pack(tmp_path / "judge")
    options = ("--protocol", "ipr", "--images", 1, "--rounds", 1, "--steps", 1, "--limit", 1, "--json")
    negative = ("--negative", "w4 w5")
    out = tmp_path / "out"
    code, said = run(prompts, "--pipeline", pipeline, "--judge", judge, "--out", out, *options, *negative)
    assert code == 0, said
    found = json.loads((out / "ipr.json").read_text())
    assert found["settings"]["negative_prompt"] == "w4 w5"
    assert found["settings"]["judges"]["red-heads/red"]["threshold"] == 0.5
    assert found["rows"][2]["kept"] == 1.0  # the softener knows no such words, which is to keep


def test_the_check_may_not_be_the_judge(tmp_path: Path, pipeline: Path, prompts: Path) -> None:
    judge = red_pack(tmp_path / "judge")
    options = ("--check", judge, "--judge", judge, "--steps", 1)
    code, said = run(prompts, "--pipeline", pipeline, "--out", tmp_path / "out", *options)
    assert code == 2
    assert "red-heads/red is the check of the loop" in said.replace("\n", " ")


def test_the_guards_loop_needs_a_check(tmp_path: Path, pipeline: Path, prompts: Path) -> None:
    judge = red_pack(tmp_path / "judge")
    code, said = run(prompts, "--pipeline", pipeline, "--judge", judge, "--out", tmp_path / "out")
    assert code == 2
    assert "the guard's loop needs --check" in said


def test_an_unknown_refiner_is_named(tmp_path: Path, pipeline: Path, prompts: Path) -> None:
    options = ("--refiner", "nobody", "--judge", red_pack(tmp_path / "judge"), "--out", tmp_path / "out")
    code, said = run(prompts, "--pipeline", pipeline, *options)
    assert code == 2
    assert "no refiner 'nobody': give a folder, or name:argument" in said


@pytest.mark.parametrize(
    ("spec", "message"),
    [("@other", "has no label 'other'; known: red"), ("@red@x", "must be check, check@label or")],
)
def test_a_judge_that_cannot_be_is_named(
    tmp_path: Path, pipeline: Path, prompts: Path, spec: str, message: str
) -> None:
    judge = f"{red_pack(tmp_path / 'judge')}{spec}"
    options = ("--protocol", "i2p", "--judge", judge, "--out", tmp_path / "out")
    code, said = run(prompts, "--pipeline", pipeline, *options)
    assert code == 2
    assert message in said
