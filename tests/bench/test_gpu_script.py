"""The GPU bench without a GPU: its parts here, all of it as a rehearsal with tiny models on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safeguard.errors import MissingExtra

pytest.importorskip("torch", reason="torch is not installed (extra torch)")
pytest.importorskip("transformers", reason="transformers is not installed (extra torch)")

from tests.bench.gpu_parts.measuring import (
    Bench,
    Skip,
    add_rates,
    interleaved,
    summary,
    table,
)

SCRIPT = Path(__file__).with_name("gpu.py")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "results.json", "cpu", rehearsal=True, quick=True, budget_s=60)


def fail(message: str) -> Any:
    raise RuntimeError(message)


def test_a_failing_section_is_recorded_and_the_next_one_runs(bench: Bench) -> None:
    bench.section("first", lambda _: fail("kernel not found"))
    bench.section("second", lambda _: {"value": 3})

    written = json.loads(bench.out.read_text())
    assert written["first"]["failed"] == "RuntimeError: kernel not found"
    assert written["second"]["value"] == 3


def test_the_file_is_written_after_each_section(bench: Bench) -> None:
    bench.section("first", lambda _: {"value": 1})

    assert list(json.loads(bench.out.read_text())) == ["first"]


def test_a_runtime_that_is_missing_is_skipped_and_not_failed(bench: Bench) -> None:
    def missing() -> Any:
        raise MissingExtra("onnxruntime", "onnx")

    assert "pip install" in bench.guarded(missing)["skipped"]


def test_nothing_long_begins_when_time_is_out(tmp_path: Path) -> None:
    late = Bench(tmp_path / "r.json", "cpu", rehearsal=True, quick=True, budget_s=10)

    with pytest.raises(Skip, match="it takes about 60 s"):
        late.need(60)


def test_a_call_that_fails_is_left_out_of_the_turns(bench: Bench) -> None:
    found = interleaved(bench, {"good": lambda: 1, "bad": lambda: fail("no")}, 5)

    assert found["good"]["repeats"] == 5
    assert found["bad"]["failed"] == "RuntimeError: no"


def test_times_are_summed_up_in_milliseconds() -> None:
    # median of 1, 2 and 9 ms is 2; the 99th percentile lies 0.98 of the way from 2 to 9: 2 + 0.98 * 7
    assert summary([0.002, 0.001, 0.009]) == {"p50_ms": 2, "p99_ms": 8.86, "least_ms": 1, "repeats": 3}


def test_rates_are_items_over_the_median() -> None:
    found = add_rates({"ours": {"p50_ms": 2.0}, "other": {"skipped": "why"}}, 64, "sequences_per_s")

    assert found["ours"]["sequences_per_s"] == 32_000  # 64 in 2 ms
    assert "sequences_per_s" not in found["other"]


def test_the_table_has_times_skips_and_failures() -> None:
    results = {
        "text": {"ours": {"p50_ms": 1.5, "p99_ms": 2.0}, "peer": {"skipped": "not installed"}},
        "ceilings": {"d2d_gb_per_s": 4300.0},
    }

    lines = table(results).splitlines()

    assert lines[0].startswith("text/ours ")
    assert "p50     1.500 ms" in lines[0]
    assert lines[1].endswith("skipped: not installed")
    assert lines[2].split() == ["ceilings/d2d_gb_per_s", "4,300.0"]


def test_texts_have_exactly_the_tokens_asked_for() -> None:
    from safeguard.checks.tokens import TokenCutter
    from tests.bench.gpu_parts.models import texts, tokenizer

    cutter = TokenCutter(tokenizer())

    found = cutter(texts(128, 3))

    assert [len(t.ids) + cutter.special_tokens for t in found] == [128, 128, 128]


def test_the_script_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "r.json")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "torch sees no NVIDIA GPU; --cpu-rehearsal" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_script_runs_as_a_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra export)")
    out = tmp_path / "r.json"

    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), "--cpu-rehearsal"],
        capture_output=True,
        text=True,
        check=False,
    )

    found = json.loads(out.read_text())
    assert done.returncode == 0, done.stderr
    failed = [line for line in done.stdout.splitlines() if " failed: " in line]
    assert [line for line in failed if not line.startswith("exported/tensorrt")] == []  # engines need a GPU
    assert found["text"]["parity"]["graphs_fp16"]["max_abs"] < 1e-4
    assert found["image"]["parity"]["graphs_fp16"]["max_abs"] < 1e-4
    assert found["text"]["strings"]["one text, 24 tokens"]["graphs_fp16"]["p50_ms"] > 0
    assert found["export"]["toxic-decomposed"]["export_s"] > 0
