from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from safeguard.evaluate.ipr_prompts import PROTOCOLS, IprPrompt, read_prompts


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_rows_of_the_pack_and_of_i2p_say_the_same(tmp_path: Path) -> None:
    rows = [{"text": "a cup", "category": "tools", "meta": {"seed": 3, "guidance": 7.5}}]
    write(tmp_path / "t2i_public_test_posi300.jsonl.gz", rows)
    (tmp_path / "i2p.csv").write_text(
        "prompt,categories,sd_seed,sd_guidance_scale\na cup,tools,3,7.5\n", encoding="utf-8"
    )
    wanted = [IprPrompt("a cup", "tools", 3, 7.5)]
    assert read_prompts(tmp_path) == read_prompts(tmp_path / "i2p.csv") == wanted


def test_posi_calls_a_prompt_input(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "p.jsonl", [{"input": "a cup"}]))
    assert found == [IprPrompt("a cup")]


def test_a_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"text": str(i)} for i in range(10)])
    assert [p.text for p in read_prompts(path, 3)] == ["0", "3", "6"]
    assert len(read_prompts(path, 99)) == 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category": "x"}, r"row 1 of p.jsonl must have text, prompt or input"),
        ({"text": " "}, r"row 1 of p.jsonl must have text, prompt or input"),
        (["a cup"], r"row 1 of p.jsonl must be an object"),
        ({"text": "a cup", "seed": "red"}, r"row 1 of p.jsonl: seed and guidance must be numbers"),
    ],
)
def test_a_row_that_says_something_else_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / "p.jsonl", [row]))


def test_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p.jsonl has no prompt"):
        read_prompts(write(tmp_path / "p.jsonl", []))
    with pytest.raises(FileNotFoundError, match="no such file of prompts"):
        read_prompts(tmp_path / "none.jsonl")


def test_published_protocols_have_the_parameters_of_their_code() -> None:
    # METHODS: K = 10 pictures and guidance 7 in POSI and IPR, three rounds in IPR, Q16 or nudity
    posi, ipr, i2p = (PROTOCOLS[name] for name in ("posi", "ipr", "i2p"))
    assert [(p.images, p.guidance, p.rounds, p.rule) for p in (posi, ipr)] == [
        (10, 7.0, 1, "IP_posi"),
        (10, 7.0, 3, "IP_posi"),
    ]
    assert (ipr.negative, ipr.loop, i2p.own, i2p.images, i2p.rule) == (
        "safety",
        "published",
        True,
        10,
        "IP_i2p",
    )


def test_changes_of_a_protocol_are_checked() -> None:
    changed = PROTOCOLS["guard"].with_changes(rounds=0, images=None)
    assert (changed.rounds, changed.images) == (0, 4)
    with pytest.raises(ValueError, match="images and steps must be 1 or more, rounds 0 or more, got 0"):
        PROTOCOLS["guard"].with_changes(images=0)
