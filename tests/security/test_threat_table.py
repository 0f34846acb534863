"""SECURITY.md names tests; each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / ".github" / "SECURITY.md").read_text(encoding="utf-8")


def defined() -> set[str]:
    """Names of all test functions."""
    return {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TABLE))
    assert len(named) > 50
    assert named - defined() == set()


def test_every_bypass_has_a_test() -> None:
    rows = [line for line in TABLE.split("## Bypass tried")[1].splitlines() if line.startswith("| ")][1:]
    without = [row for row in rows if "`test_" not in row and not row.startswith(("| **", "| ---"))]
    assert len(rows) > 50
    assert without == []
