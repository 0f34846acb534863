from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safeguard.cli.judge import TEXTS_AT_ONCE
from tests.cli.conftest import Run, rows_file

ROOT = Path(__file__).parents[2]


def process(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "safeguard.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=environment, **streams)


def test_an_interrupt_exits_with_130_and_keeps_what_was_judged(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with process(
        "check", "--input", "-", "--output", out, "--policy", policy, stdin=subprocess.PIPE
    ) as running:
        assert running.stdin is not None
        assert running.stderr is not None
        running.stdin.write(b'{"text": "rude"}\n' * 3)
        running.stdin.flush()  # all is judged, then it waits for more
        part = tmp_path / "out.jsonl.part"
        while running.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") == 3):
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        errors = running.stderr.read().decode()
        running.stdin.close()

    assert running.returncode == 130
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
    assert not out.exists()
    assert len(part.read_bytes().splitlines()) == 3


def test_a_sender_that_waits_for_each_report_gets_it(policy: Path) -> None:
    with process("check", "--json", "--policy", policy, stdin=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"rude\n")
        running.stdin.flush()
        first = json.loads(running.stdout.readline())
        running.stdin.write(b"good")
        running.stdin.close()
        second = json.loads(running.stdout.readline())

    assert [first["action"], second["action"]] == ["block", "allow"]
    assert running.returncode == 1


def test_a_reader_that_leaves_is_no_noise(policy: Path, tmp_path: Path) -> None:
    source = rows_file(tmp_path / "in.jsonl", *({"text": "good"} for _ in range(2 * TEXTS_AT_ONCE)))
    with process("check", "--input", source, "--json", "--policy", policy) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        errors = running.stderr.read()

    assert running.returncode == 141
    assert errors == b""


def test_a_terminal_gets_a_progress_bar_and_the_output_stays_clean(policy: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    source, out = rows_file(tmp_path / "in.jsonl", {"text": "good"}), tmp_path / "out.jsonl"
    ours, theirs = pty.openpty()
    options = ("--input", source, "--output", out, "--policy", policy)
    with process("check", *options, stderr=theirs) as running:
        assert running.stdout is not None
        printed = running.stdout.read()
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)

    assert "1 judged" in shown
    assert printed == b""


def test_an_error_let_through_by_debug_exits_with_2_and_never_as_flagged() -> None:
    with process("--debug", "check", "x", "--policy", "nix.yaml") as running:
        assert running.stderr is not None
        errors = running.stderr.read().decode()

    assert running.returncode == 2
    assert "Traceback" in errors
    assert "FileNotFoundError" in errors


def test_help_imports_no_model_library() -> None:
    code = (
        "import sys\nsys.argv = ['safeguard', '--help']\n"
        "from safeguard.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'onnxruntime', 'tokenizers', 'PIL', 'numpy'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == "0 []"


def test_the_version_is_printed(run: Run) -> None:
    import safeguard

    assert run("--version").stdout == f"safeguard {safeguard.__version__}\n"
