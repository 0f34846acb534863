"""A command line to call, and a policy on a real pack of a few kilobytes that calls the word `rude` toxic."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from safeguard.cli import app
from tests.tiny_packs import rude_pack

Run = Callable[..., Result]


def reports(text: str) -> list[dict[str, Any]]:
    """The lines of JSON that were printed or written."""
    return [json.loads(line) for line in text.splitlines()]


def rows_file(path: Path, *rows: Any) -> Path:
    """A JSONL file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run() -> Run:
    """Call `safeguard` with arguments, in this process; standard input is empty unless given."""

    def call(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, prog_name="safeguard")

    return call


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rude_pack(tmp_path_factory.mktemp("packs") / "rude")


@pytest.fixture
def write_policy(tmp_path: Path, pack: Path) -> Callable[..., Path]:
    """Write a policy on the pack; lines are added at its top."""

    def write(*lines: str, llm: Sequence[str] = (), name: str = "policy.yaml") -> Path:
        checks = f'checks: ["{pack.as_posix()}"]'
        path = tmp_path / name
        path.write_text(
            "\n".join(
                [
                    *("name: tiny", "max_chars: 100", *lines, "input:"),
                    "  llm: {" + ", ".join((checks, *llm)) + "}",
                    "  t2i: {" + checks + ", action: refine}",
                    "output:",
                    "  text: {" + checks + "}",
                ]
            ),
            encoding="utf-8",
        )
        return path

    return write


@pytest.fixture
def policy(write_policy: Callable[..., Path]) -> Path:
    return write_policy()
