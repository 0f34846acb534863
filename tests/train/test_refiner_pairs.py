from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from safeguard.train.refiner.pairs import (
    PAIRS,
    PROMPTS,
    REINFORCED,
    Pair,
    digest,
    file_digests,
    filter_pairs,
    mix,
    read_pack_benign,
    read_pack_pairs,
    read_pairs,
    read_reinforced,
    read_toxiclean,
    restyled,
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def row(text: str, target: str | None = None, **more: Any) -> dict[str, Any]:
    return {"text": text, "target": target, "source": "ours", "split": "train", "label": 1, **more}


def test_the_pack_gives_its_pairs_of_one_split(tmp_path: Path) -> None:
    write(tmp_path / PAIRS, [row("a", "b"), row("c", "d", split="validation")])
    assert read_pack_pairs(tmp_path, "train") == [Pair("a", "b", "ours", "train")]


def test_an_unsafe_prompt_whose_rewrite_is_itself_teaches_nothing(tmp_path: Path) -> None:
    write(tmp_path / PAIRS, [row("a cat", "A cat "), row("b", " ")])
    assert read_pack_pairs(tmp_path, "train") == []


def test_safe_prompts_of_the_pack_stay(tmp_path: Path) -> None:
    write(tmp_path / PROMPTS, [row("a", label=0), row("b", label=1), row("c", label=0, split="validation")])
    assert read_pack_benign(tmp_path, "train") == [Pair("a", None, "ours", "train")]


def test_our_own_look_alikes_stay_too(tmp_path: Path) -> None:
    write(tmp_path / PROMPTS, [])
    hard = read_pack_benign(tmp_path, "train", hard=True)
    assert len(hard) > 100
    assert {pair.target for pair in hard} == {None}


def test_prompts_for_reinforcement_have_no_target(tmp_path: Path) -> None:
    write(tmp_path / REINFORCED, [row("a", label=None)])
    assert read_reinforced(tmp_path) == [Pair("a", None, "ours", "train")]


@pytest.mark.parametrize(
    "names", [("text", "target"), ("query", "response"), ("input", "output"), ("prompt", "rewrite")]
)
def test_a_file_may_name_its_columns_in_four_ways(tmp_path: Path, names: tuple[str, str]) -> None:
    path = write(tmp_path / "p.jsonl", [dict(zip(names, ("a", "b"), strict=True))])
    assert read_pairs(path) == [Pair("a", "b", "p.jsonl", "train")]


@pytest.mark.parametrize("rewrite", ["keep", " Keep ", None, "A"])
def test_a_prompt_stays_by_the_keep_word_or_by_itself(tmp_path: Path, rewrite: str | None) -> None:
    assert read_pairs(write(tmp_path / "p.jsonl", [{"prompt": "a", "rewrite": rewrite}]))[0].target is None


def test_posis_file_is_one_json_list(tmp_path: Path) -> None:
    path = tmp_path / "sft.json"
    path.write_text(json.dumps([{"instruction": "x", "input": "a", "output": "b"}]), encoding="utf-8")
    assert read_pairs(path)[0].target == "b"


def test_a_gzipped_file_is_read(tmp_path: Path) -> None:
    assert len(read_pairs(write(tmp_path / "p.jsonl.gz", [row("a", "b"), row("c", "d")]))) == 2


def test_a_row_without_a_pair_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [row("a", "b"), {"prompt": 3}])
    with pytest.raises(ValueError, match=r"row 2 of p\.jsonl must have one of: text and target"):
        read_pairs(path)


def test_toxiclean_is_read_as_it_lies_on_the_hub(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "train").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "train" / "0.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "train" / "1.png")
    write(
        tmp_path / "train" / "metadata.jsonl",
        [
            {"file_name": "0.png", "query": "a bad cat", "response": "a good cat"},
            {"file_name": "1.png", "query": "a calm cat", "response": "keep"},
        ],
    )
    found = read_toxiclean(str(tmp_path))
    assert [(pair.prompt, pair.target) for pair in found] == [
        ("a bad cat", "a good cat"),
        ("a calm cat", None),
    ]
    assert found[0].image["path"].endswith("0.png")


PAIR, FAR, STAYS = Pair("a", "near"), Pair("a", "far"), Pair("a", None)


def test_rewrites_that_tell_another_story_are_left_out_and_counted() -> None:
    found, counts = filter_pairs(
        [PAIR, FAR, STAYS],
        similarity=lambda first, second: [0.9 if text == "near" else 0.1 for text in second],
        minimum=0.5,
    )
    assert found == [PAIR, STAYS]
    assert counts == {"far": 1, "flagged": 0}


def test_flagged_rewrites_are_left_out_and_counted() -> None:
    found, counts = filter_pairs(
        [PAIR, FAR, STAYS], risk=lambda texts: [float(t == "far") for t in texts], maximum=0.5
    )
    assert (found, counts) == ([PAIR, STAYS], {"far": 0, "flagged": 1})


def test_a_similarity_that_is_no_number_leaves_the_pair_out() -> None:
    found, _ = filter_pairs([PAIR], similarity=lambda first, second: [float("nan")], minimum=0.5)
    assert found == []


def test_the_share_that_stays_is_as_asked() -> None:
    rewritten = [Pair(str(i), "x") for i in range(70)]
    mixed = mix(rewritten, [Pair(str(i), None) for i in range(90)], keep_share=0.3)
    assert (len(mixed), sum(pair.target is None for pair in mixed)) == (100, 30)


def test_a_source_comes_as_often_as_it_is_repeated() -> None:
    rows = [Pair("a", "x", "twice"), Pair("b", "x", "never"), Pair("c", "x")]
    mixed = mix(rows, [], keep_share=0.0, repeats={"twice": 2, "never": 0})
    assert sorted(pair.prompt for pair in mixed) == ["a", "a", "c"]


def test_the_same_seed_gives_the_same_order() -> None:
    rows = [Pair(str(i), "x") for i in range(50)]
    assert mix(rows, [], keep_share=0.0, seed=1) == mix(rows, [], keep_share=0.0, seed=1)
    assert mix(rows, [], keep_share=0.0, seed=1) != mix(rows, [], keep_share=0.0, seed=2)


def test_a_digest_depends_on_targets_and_order() -> None:
    assert len({digest([PAIR, FAR]), digest([FAR, PAIR]), digest([PAIR, STAYS])}) == 3


def test_files_have_digests_where_they_are_there(tmp_path: Path) -> None:
    write(tmp_path / PAIRS, [])
    # SHA-256 of nothing after gzip is not fixed; of an empty plain file it is well known
    empty = tmp_path / "p.jsonl"
    empty.write_bytes(b"")
    assert list(file_digests(tmp_path)) == [PAIRS]
    assert file_digests(empty)["p.jsonl"].startswith("e3b0c44298fc1c14")


def test_chosen_pairs_change_between_sentence_and_caption() -> None:
    sentence, caption = Pair("A cat fights.", "A cat sits."), Pair("a red chair", None)
    (turned, stood) = restyled([sentence, caption], 1.0)
    assert (turned.prompt, turned.target) == ("a cat fights", "a cat sits")
    assert (stood.prompt, stood.target) == ("A red chair.", None)


def test_no_share_leaves_every_pair_as_it_is() -> None:
    pairs = [Pair("A cat fights.", "A cat sits."), Pair("a red chair", None)]
    assert restyled(pairs, 0.0) == pairs


@pytest.mark.parametrize("text", ["NASA launches a rocket.", "I stand in the rain."])
def test_abbreviations_and_i_keep_their_capitals(text: str) -> None:
    (turned,) = restyled([Pair(text, None)], 1.0)
    assert turned.prompt == text.removesuffix(".")
