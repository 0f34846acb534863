"""A few inputs through every fuzzing target in each test run; `run.py` does a million."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import run, targets
from tests.fuzz.corpus import mutated, seeds
from tests.fuzz.texts import text_of

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXT_TARGETS = ("normalisation", "blocklist", "window_texts")


@pytest.mark.parametrize("target", TEXT_TARGETS)
def test_any_text_keeps_the_promises_of(target: str) -> None:
    @QUICK
    @given(st.text(), st.integers(0, 4))
    def holds(text: str, kind: int) -> None:
        targets.TARGETS[target](bytes([kind]) + text.encode("utf-8", "surrogatepass"))

    holds()


@pytest.mark.parametrize("target", sorted(set(targets.TARGETS) - set(TEXT_TARGETS)))
def test_any_bytes_keep_the_promises_of(target: str) -> None:
    @QUICK
    @given(st.binary(max_size=200))
    def holds(data: bytes) -> None:
        targets.TARGETS[target](data)

    holds()


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_damaged_seeds_keep_the_promises_of(target: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of many damaged pictures
        done = run.fuzz(target, seed=7, first=0, inputs=200)

    assert done.findings == []
    assert sum(done.outcomes.values()) == 200


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_undamaged_seeds_are_read_by(target: str) -> None:
    outcomes = {targets.TARGETS[target](data) for data in seeds(target)}

    assert outcomes & {"ok", "PackError (digests)"}  # the manifest's digests are made up


def test_promise_that_is_broken_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(data: bytes) -> str:
        targets.promise(False, "hold")
        return "ok"

    monkeypatch.setitem(targets.TARGETS, "windows", break_it)

    done = run.fuzz("windows", seed=1, first=5, inputs=2)

    assert [number for number, _ in done.findings] == [5, 6]
    assert done.outcomes == {"FINDING Broken": 2}


def test_input_that_never_ends_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(data: bytes) -> str:
        while True:
            pass

    monkeypatch.setitem(targets.TARGETS, "windows", spin)
    monkeypatch.setitem(targets.SECONDS, "windows", 0.05)

    assert run.fuzz("windows", seed=1, first=0, inputs=1).outcomes == {"FINDING Hang": 1}


def test_same_number_gives_the_same_input() -> None:
    assert mutated(1, "policy", 3) == mutated(1, "policy", 3)
    assert mutated(1, "policy", 3) != mutated(1, "policy", 4)


def test_half_surrogates_reach_the_text_targets() -> None:
    assert text_of(b"\x01\x00\xd8\x00") == "\ud800"


def test_counts_of_a_second_run_are_added_and_it_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for _ in range(2):
        run.main(["--inputs", "30", "--target", "windows", "--results", str(path)])

    entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["mutator"]["windows"]
    assert (entry["inputs"], entry["next"], sum(entry["outcomes"].values())) == (60, 60, 60)


def test_it_runs_as_a_file_and_says_so_with_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, run.__file__, "--inputs", "5", "--target", "jsonl"]
    done = subprocess.run([*command, "--results", str(tmp_path / "r.json")], capture_output=True, check=False)

    assert (done.returncode, json.loads(done.stdout)["jsonl"]["inputs"]) == (0, 5)


def test_shares_of_the_targets_are_a_million() -> None:
    assert set(run.MILLION) == set(targets.TARGETS)
    assert sum(run.MILLION.values()) == 1_000_000


def test_shipped_figures_are_of_a_million_inputs_without_a_finding() -> None:
    if not run.RESULTS.exists():
        pytest.skip("no figures: run python tests/fuzz/run.py --million")
    results = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    entries = [entry for engine in ("mutator", "atheris") for entry in results.get(engine, {}).values()]

    assert results["total_inputs"] == sum(entry["inputs"] for entry in entries) >= 1_000_000
    assert not any(entry["findings"] for entry in entries)
