"""`safeguard export onnx`: packs from folders, errors on one line, nothing left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import Run

pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
pytest.importorskip("transformers", reason="transformers is not installed (extra export)")

from safeguard.checks.clip_heads import PromptPair, write_heads
from safeguard.checks.loading import load_check
from safeguard.cli.exporting import terminable
from safeguard.packs import resolve
from tests.exporters.tiny import classifier, tokenizer, vision_tower


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    classifier("Bert").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_text_classifier_becomes_a_pack_and_its_agreement_is_printed(
    run: Run, bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("export", "onnx", bert, out, "--name", "mine", "--license", "mit", "--opset", "20")

    assert result.exit_code == 0, result.output
    assert "mine, text_classifier, float32" in result.stdout
    assert "0 of 36 decisions differ" in result.stdout
    assert "comparing with the model" in result.stderr
    manifest = resolve(out).manifest
    assert (manifest.name, manifest.license) == ("mine", "mit")
    assert manifest.export is not None
    assert (manifest.export.flavour, manifest.export.opset) == ("decomposed", 20)  # what an old opset means


def test_clip_tower_is_known_by_its_config_and_takes_heads(run: Run, tmp_path: Path) -> None:
    vision_tower().save_pretrained(tmp_path / "clip")
    write_heads(tmp_path / "q16.npz", [PromptPair("q16", np.random.default_rng(0).standard_normal((2, 16)))])
    out = tmp_path / "out"

    result = run("export", "onnx", tmp_path / "clip", out, "--heads", tmp_path / "q16.npz", "--json")

    assert result.exit_code == 0, result.output
    assert [one["tensor"] for one in json.loads(result.stdout)["parity"]] == ["image_embeds", "logits"]
    picture = np.zeros((40, 40, 3), np.uint8)
    check: Any = load_check(str(out))
    assert check([picture])[0].scores.keys() == {"q16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "17"], "a decomposed graph needs an opset from 18 to 22, got 17"),
        (["--flavour", "native", "--opset", "20"], "a native graph needs an opset from 23 to 24, got 20"),
        (["--dtype", "int8", "--flavour", "decomposed"], "int8 graphs are for onnxruntime on the CPU"),
        (["--labels", "a,b"], "it has 3 labels, got 2 names for them"),
        (["--task", "clip"], "its model_type is 'bert'; known: clip, clip_vision_model"),
        (["--task", "clip", "--heads", "none.npz"], "none.npz: no such file of heads"),
        (["--texts", "none.txt"], "none.txt: No such file or directory"),
        (["--heads", "q16.npz"], "--heads says nothing to a model of task text-classifier; it takes --dtype"),
        (["--task", "clip", "--labels", "a"], "--labels says nothing to a model of task clip; it takes --dt"),
        (["--task", "causal-lm", "--optimise"], "task causal-lm; it takes --dtype, --opset, --flavour"),
        (["--via", "optimum", "--task", "clip"], "--via optimum is for text classifiers, not for task clip"),
        (["--via", "optimum", "--dtype", "int8"], "--dtype says nothing to a model of task optimum"),
        (["--via", "optimum"], "'optimum-onnx' is not installed; it pins transformers<4.58"),
    ],
)
def test_wrong_options_end_with_one_line_and_leave_nothing(
    run: Run, bert: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run("export", "onnx", bert, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "it is no folder; give one, or the name of a model on the hub: owner/name"),
        (".", "the folder has no config.json"),
    ],
)
def test_source_that_is_no_model_is_refused(run: Run, tmp_path: Path, source: str, message: str) -> None:
    place = tmp_path / "empty" if source == "." else source
    (tmp_path / "empty").mkdir()
    result = run("export", "onnx", place, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr


def test_folder_that_is_there_is_kept(run: Run, bert: Path, pack: Path) -> None:
    result = run("export", "onnx", bert, pack)
    assert result.exit_code == 2
    assert "is there already; give another folder, or --overwrite" in result.stderr
    assert resolve(pack).manifest.name == "rude-words"


def test_source_is_never_overwritten(run: Run, bert: Path) -> None:
    result = run("export", "onnx", bert, bert, "--overwrite")
    assert result.exit_code == 2
    assert "OUT must not be SOURCE or hold it" in result.stderr


def test_termination_ends_an_export_as_an_interrupt_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
