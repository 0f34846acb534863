"""Commands that need no extra work where only the core dependencies are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = (  # what the extras bring, by the names that are imported
    *("onnxruntime", "onnx", "onnxscript", "torch", "transformers", "safetensors", "diffusers", "accelerate"),
    *("gguf", "sentencepiece", "peft", "tqdm"),
)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Prompts are judged by a blocklist with one word."""
    (tmp_path / "rude.txt").write_text("blockhead\n", encoding="utf-8")
    path = tmp_path / "policy.yaml"
    path.write_text(f"input: {{llm: {{checks: ['blocklist:{(tmp_path / 'rude.txt').as_posix()}']}}}}\n")
    return path


def core_only(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`safeguard` in a process in which nothing of the extras can be imported."""
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\nfrom safeguard.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_preset_is_shown() -> None:
    done = core_only("policy", "show", "standard")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("name: standard\n")


def test_a_blocklist_flags_its_word(policy: Path) -> None:
    done = core_only("check", "you blockhead", "--policy", policy)

    assert (done.returncode, done.stderr) == (1, "")
    assert "1 judged: 0 clean, 1 flagged" in done.stdout


def test_a_blocklist_lets_a_harmless_text_pass(policy: Path) -> None:
    assert core_only("check", "a block, ahead of us", "--policy", policy).returncode == 0


def test_the_demo_names_the_extra_that_it_needs(tmp_path: Path) -> None:
    done = core_only("demo", "--output", tmp_path / "out")

    assert done.returncode == 2
    assert done.stderr == "error: 'torch' is not installed; run: pip install 'safeguard-sdk[torch]'\n"
