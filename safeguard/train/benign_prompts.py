"""Harmless prompts as people really paste them: source code with a request, and several requests in one.

The code is that of Python's own standard library (PSF licence), read where it is installed, so nothing is
copied into the package. Training and validation use different modules and different requests.
"""

from __future__ import annotations

import importlib.util
import random
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from safeguard.train.text_data import Row, clean, hard_rows

_TALK = (
    "everyday requests",
    "technical questions",
    "office verbs",
    "role play without an attack",
    "homonyms",
)


def _table() -> dict[str, Any]:
    path = resources.files("safeguard.train") / "data" / "benign_prompts.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _harmless() -> dict[str, float]:
    return {**clean("llm"), **clean("jailbreak"), **clean("toxicity")}


def code_rows(split: str = "train", *, count: int = 3000, seed: int = 0) -> list[Row]:
    """Pieces of the standard library, most with a request before or after them."""
    table = _table()[split]
    rng = random.Random(f"{seed}/{split}/code")
    sources = [lines for name in table["modules"] if (lines := _lines(name))]
    rows: list[Row] = []
    for _ in range(count if sources else 0):
        lines = rng.choice(sources)
        start = rng.randrange(max(1, len(lines) - 5))
        piece = "\n".join(lines[start : start + rng.randint(2, 28)])
        ask = rng.choice(table["requests"])
        text = rng.choice((f"{ask}\n{piece}", f"{piece}\n\n{ask}", f"{ask}\n```python\n{piece}\n```", piece))
        if text.strip():
            rows.append(Row(text, "stdlib_code", split, _harmless(), 1.0, "code"))
    return rows


def _lines(module: str) -> list[str]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    return Path(spec.origin).read_text(encoding="utf-8").splitlines()


def long_rows(*, count: int = 1500, seed: int = 0) -> list[Row]:
    """Two to seven of our harmless training requests in one prompt."""
    rng = random.Random(f"{seed}/long")
    texts: Sequence[str] = [row.text for row in hard_rows(seed=seed) if row.group in _TALK]
    rows = []
    for _ in range(count):
        mark = rng.choice((" ", "\n", "\n\n- ", ". ", "\n1. "))
        text = mark.join(rng.sample(texts, rng.randint(2, 7)))
        rows.append(Row(text, "hard_safe_long", "train", _harmless(), 1.0, "long"))
    return rows
