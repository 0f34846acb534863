"""Batches of like length in which prompts that stay are dealt to all alike."""

from __future__ import annotations

import pytest

from safeguard.train.refiner.ordering import batch_order

# 70 rewrites of 10 to 79 tokens and 30 prompts that stay, all shorter: sorted, they would fill batches alone
LENGTHS = [*range(10, 80), *[5] * 30]
KEPT = [False] * 70 + [True] * 30


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_every_batch_holds_the_same_share_of_prompts_that_stay() -> None:
    for batch in batches(batch_order(LENGTHS, KEPT, size=10, batches=30), 10):
        assert sum(KEPT[i] for i in batch) == 3  # 30 of 100, in tens


def test_an_epoch_shows_every_example_once() -> None:
    assert sorted(batch_order(LENGTHS, KEPT, size=10, batches=10)) == list(range(100))


def test_rewrites_of_a_batch_are_alike_in_length() -> None:
    for batch in batches(batch_order(LENGTHS, KEPT, size=10, batches=10), 10):
        rewrites = [LENGTHS[i] for i in batch if not KEPT[i]]
        # at random seven of 10..79 span 52 on average; sorted without noise they span 6
        assert max(rewrites) - min(rewrites) < 35


def test_long_and_short_batches_come_in_no_order() -> None:
    made = batches(batch_order(LENGTHS, KEPT, size=10, batches=10), 10)
    longest = [max(LENGTHS[i] for i in batch) for batch in made]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_the_same_seed_gives_the_same_order_and_another_seed_another() -> None:
    first = batch_order(LENGTHS, KEPT, size=10, batches=20, seed=1)
    assert first == batch_order(LENGTHS, KEPT, size=10, batches=20, seed=1)
    assert first != batch_order(LENGTHS, KEPT, size=10, batches=20, seed=2)


@pytest.mark.parametrize("kept", [[True] * 3, [False] * 3])
def test_examples_of_one_kind_fill_the_batches_alone(kept: list[bool]) -> None:
    order = batch_order([4, 5, 6], kept, size=2, batches=5)
    assert len(order) == 10
    assert set(order) == {0, 1, 2}


def test_fewer_examples_than_a_batch_come_more_than_once() -> None:
    assert sorted(batch_order([4, 5], [False, False], size=4, batches=1)) == [0, 0, 1, 1]


def test_no_example_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="per example"):
        batch_order([], [], size=4, batches=1)
