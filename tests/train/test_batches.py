from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from safeguard.train.batches import Batches, Example, target_array
from safeguard.train.classifier import ClassifierConfig, read_trunk_tokenizer
from safeguard.train.text_data import LABELS, Row, clean, read_pack
from tests.train.tiny_text import write_pack, write_trunk


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    rows = read_pack(write_pack(tmp_path / "data"), "train")
    settings = ClassifierConfig(tokens_per_batch=200, max_tokens=24)
    return Batches(rows, read_trunk_tokenizer(write_trunk(tmp_path / "trunk")), settings)


def test_cut_keeps_the_special_tokens() -> None:
    assert Example.cut([1, 5, 6, 7, 8, 2], 4) == [1, 5, 6, 2]


def test_cut_from_a_place_gives_that_window() -> None:
    assert Example.cut([1, 5, 6, 7, 8, 2], 4, 2) == [1, 7, 8, 2]


def test_padding_is_zero_and_masked() -> None:
    ids, mask = Example.pad([[1, 2], [1, 5, 2]])
    assert ids.tolist() == [[1, 2, 0], [1, 5, 2]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_unknown_targets_are_not_a_number() -> None:
    targets = target_array([Row("x", "s", "train", {"jailbreak": 1.0})])
    assert targets[0, LABELS.index("jailbreak")] == 1.0
    assert np.isnan(targets).sum() == len(LABELS) - 1


def test_batches_hold_no_more_tokens_than_allowed(batches: Batches) -> None:
    assert all(batch.input_ids.size <= 200 for batch, _ in islice(batches.from_place((0, 0, 0)), 10))


def test_same_seed_gives_the_same_batches(batches: Batches) -> None:
    first = [batch.input_ids.tolist() for batch, _ in islice(batches.from_place((0, 0, 0)), 6)]
    second = [batch.input_ids.tolist() for batch, _ in islice(batches.from_place((0, 0, 0)), 6)]
    assert first == second


def test_a_run_can_be_entered_at_any_place(batches: Batches) -> None:
    whole = list(islice(batches.from_place((0, 0, 0)), 12))
    resumed = list(islice(batches.from_place(whole[7][1]), 4))
    assert [b.input_ids.tolist() for b, _ in resumed] == [b.input_ids.tolist() for b, _ in whole[8:]]


def test_a_pair_shares_a_batch_and_names_its_label(batches: Batches) -> None:
    batch = next(b for b, _ in batches.from_place((0, 0, 0)) if len(b.pairs))
    unsafe, safe, label = batch.pairs[0]
    assert LABELS[label] == "t2i_prompt"
    assert (batch.targets[unsafe, label], batch.targets[safe, label]) == (1.0, 0.0)


def test_sources_are_repeated_as_asked(tmp_path: Path) -> None:
    rows = [Row(f"a cat {i}", "twice", "train", clean("t2i")) for i in range(3)]
    rows += [Row("a dog", "never", "train", clean("t2i"))]
    settings = ClassifierConfig(repeats={"twice": 2, "never": 0}, disguised=0, normalised=0)
    batch, _ = next(
        Batches(rows, read_trunk_tokenizer(write_trunk(tmp_path)), settings).from_place((0, 0, 0))
    )
    assert len(batch.weights) == 6


def test_unsafe_emoji_are_never_shown_as_unknown_tokens(tmp_path: Path) -> None:
    rows = [Row("you are \U0001f400", "s", "train", {"toxicity": 1.0})]
    tokenizer = read_trunk_tokenizer(write_trunk(tmp_path))
    settings = ClassifierConfig(disguised=0, normalised=0)
    batch, _ = next(Batches(rows, tokenizer, settings).from_place((0, 0, 0)))
    assert tokenizer.token_to_id("[UNK]") not in batch.input_ids


def views(tmp_path: Path, target: float) -> set[str]:
    """What is shown of one text in zero-width disguise, decoded."""
    rows = [Row("you are awful", "s", "train", {"toxicity": target})]
    settings = ClassifierConfig(disguised=1, normalised=0, repeats={"s": 400})
    batches = Batches(rows, read_trunk_tokenizer(write_trunk(tmp_path)), settings)
    rng = random.Random(0)
    return {batches._view(rows[0], rng) for _ in range(400)}


def test_an_unsafe_text_is_never_shown_in_a_disguise_that_is_taken_off(tmp_path: Path) -> None:
    assert not any("\u200b" in view for view in views(tmp_path, 1.0))


def test_a_harmless_text_is_shown_in_disguise_too(tmp_path: Path) -> None:
    assert any("\u200b" in view for view in views(tmp_path, 0.0))
