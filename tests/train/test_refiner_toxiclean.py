"""Data with pictures built from hand-made prompts, a painter of plain colours and checks of known scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl")

from PIL import Image

from safeguard.testing import SwapRefiner
from safeguard.train.refiner.pairs import Pair, read_pairs, read_toxiclean
from safeguard.train.refiner.toxiclean import (
    Labellers,
    ToxicleanConfig,
    build_toxiclean,
    read_texts,
)
from tests.train.tiny_refiner import bad_words, halves

PROMPTS = ["a calm cat", "a bad cat", "a grey cat", "a bad dog", "a red cat", "a bad red cat"]
CONFIG = ToxicleanConfig(batch_size=2, minimum_similarity=0.5, validation_share=0.0)


def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Image.Image]]:
    """Red for red things, grey for grey ones, else black."""
    shades = [200 if "red" in p else 80 if "grey" in p else 0 for p in prompts]
    return [[Image.new("RGB", (8, 8), (shade, 0, 0)) for _ in seeds] for shade in shades]


def redness(images: Sequence[Any]) -> list[float]:
    return [image.getpixel((0, 0))[0] / 200 for image in images]


LABELLERS = Labellers(
    draw, redness, bad_words(), halves, SwapRefiner({"bad": "good", "a red": "a blue"}), {"refiner": "swap"}
)


def build(out: Path, **more: Any) -> dict[str, Any]:
    pairs = [Pair(text, None, "mine") for text in more.pop("prompts", PROMPTS)]
    return build_toxiclean(
        more.pop("config", CONFIG), pairs, out, more.pop("labellers", LABELLERS), progress=False, **more
    )


def rows(out: Path) -> list[tuple[str, str]]:
    found = map(json.loads, (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["query"], row["response"]) for row in found]


def test_safe_ones_are_kept_unsafe_ones_rewritten_and_the_rest_left_out(tmp_path: Path) -> None:
    measured = build(tmp_path)
    # grey scores .4, between safe (.2) and unsafe (.5); the rewrite of the bad red cat is drawn red again
    assert rows(tmp_path) == [
        ("a calm cat", "keep"),
        ("a bad cat", "a good cat"),
        ("a bad dog", "a good dog"),
        ("a red cat", "a blue cat"),
    ]
    assert measured["dropped"] == {"drawn_unsafe": 1, "unsure": 1}


def test_it_is_read_back_as_the_hub_s_form_and_as_pairs(tmp_path: Path) -> None:
    build(tmp_path)
    hub, file = read_toxiclean(str(tmp_path)), read_pairs(tmp_path / "metadata.jsonl")
    assert [(p.prompt, p.target) for p in hub] == [(p.prompt, p.target) for p in file]
    assert (hub[0].target, hub[1].target) == (None, "a good cat")
    assert Path(file[1].image).read_bytes() == (
        hub[1].image["bytes"] or Path(hub[1].image["path"]).read_bytes()
    )


def test_a_build_that_was_cut_off_goes_on_and_equals_an_unbroken_one(tmp_path: Path) -> None:
    build(tmp_path / "whole")
    calls: list[int] = []

    def failing(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Image.Image]]:
        calls.append(len(calls))
        if "a red cat" in prompts:
            raise OSError("device lost")
        return draw(prompts, seeds)

    with pytest.raises(OSError, match="device lost"):
        build(tmp_path / "broken", labellers=replace(LABELLERS, draw=failing))
    journal = tmp_path / "broken" / ".build" / "journal.jsonl"
    journal.write_text(journal.read_text(encoding="utf-8") + '{"rows": [{"que', encoding="utf-8")
    build(tmp_path / "broken", resume=True)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_another_build_in_the_folder_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(ValueError, match="holds a run already"):
        build(tmp_path)
    with pytest.raises(ValueError, match="had other prompts"):
        build(tmp_path, prompts=["a calm cow"], resume=True)


def test_a_far_a_flagged_and_an_unchanged_rewrite_are_left_out(tmp_path: Path) -> None:
    table = {"bad cat": "bad cow", "bad dog": "far dog", "bad hen": "bad hen"}

    def close(first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [0.1 if "far" in text else 0.9 for text in second]

    labellers = replace(LABELLERS, refiner=SwapRefiner(table), similarity=close)
    measured = build(
        tmp_path, labellers=labellers, prompts=["a calm cat", "a bad cat", "a bad dog", "a bad hen"]
    )
    assert measured["dropped"] == {"far": 1, "flagged": 1, "unchanged": 1}


def test_a_score_that_is_no_probability_is_an_error(tmp_path: Path) -> None:
    broken = replace(LABELLERS, inappropriate=lambda images: [float("nan") for _ in images])
    with pytest.raises(ValueError, match=r"must give 2 scores in \[0, 1\]"):
        build(tmp_path, labellers=broken)


def test_thresholds_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"safe_below must be at most unsafe_from, got 0\.9 and 0\.5"):
        build(tmp_path, config=ToxicleanConfig(safe_below=0.9))


def test_nothing_that_gives_a_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompt gave a row"):
        build(tmp_path, prompts=["a grey cat"])


def test_prompts_come_from_lines_and_from_rows_each_once(tmp_path: Path) -> None:
    lines, table = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("a cat\n\na dog\na cat\n", encoding="utf-8")
    table.write_text('{"query": "a cat", "source": "x"}\n{"prompt": "a dog"}\n', encoding="utf-8")
    assert [p.prompt for p in read_texts(lines, CONFIG)] == ["a cat", "a dog"]
    assert [(p.prompt, p.source) for p in read_texts(table, CONFIG)] == [("a cat", "x"), ("a dog", "p.jsonl")]


def test_a_row_without_a_prompt_is_named(tmp_path: Path) -> None:
    table = tmp_path / "p.jsonl"
    table.write_text('{"words": "a cat"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 1 of p\.jsonl must have one of: text, query, input, prompt"):
        read_texts(table, CONFIG)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"p\.txt holds no prompt"):
        read_texts(tmp_path / "p.txt", CONFIG)
