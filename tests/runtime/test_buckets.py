from __future__ import annotations

import pytest

from safeguard.runtime.buckets import Buckets, Run, plan_runs

SMALL = Buckets(lengths=(4, 8), rows=(1, 2, 4))


def test_rows_of_similar_length_share_a_run_as_long_as_its_longest() -> None:
    # sorted 3, 3, 3, 5, 8: 4 rows of 5 are more than 12, and so are 2 of 8
    assert plan_runs([3, 8, 3, 3, 5], 12) == [Run((0, 2, 3), 3, 3), Run((4,), 1, 5), Run((1,), 1, 8)]


def test_without_a_budget_each_row_is_alone_and_unpadded() -> None:
    assert plan_runs([5, 3], 0) == [Run((1,), 1, 3), Run((0,), 1, 5)]


def test_a_row_beyond_the_budget_still_runs() -> None:
    assert plan_runs([100], 12) == [Run((0,), 1, 100)]


def test_no_rows_are_no_runs() -> None:
    assert plan_runs([], 12) == []


def test_buckets_round_rows_and_lengths_up() -> None:
    # lengths 4, 4, 4, 8: three rows become four, one stays one
    assert plan_runs([3, 4, 2, 5], 64, SMALL) == [Run((0, 1, 2), 4, 4), Run((3,), 1, 8)]


def test_rows_of_different_buckets_never_share_a_run() -> None:
    assert [run.length for run in plan_runs([4, 5], 64, SMALL)] == [4, 8]


def test_a_run_holds_no_more_rows_than_the_largest_bucket() -> None:
    assert [run.indices for run in plan_runs([3] * 5, 1000, SMALL)] == [(0, 1, 2, 3), (4,)]


def test_the_budget_counts_the_rows_that_are_only_padding() -> None:
    # three rows of 4 would be padded to four of them: 16 tokens, more than 15
    assert [run.indices for run in plan_runs([4, 4, 4], 15, SMALL)] == [(0, 1), (2,)]


def test_what_is_longer_than_the_largest_bucket_keeps_its_length() -> None:
    assert plan_runs([9], 64, SMALL) == [Run((0,), 1, 9)]


def test_shapes_name_every_run_that_can_come() -> None:
    assert SMALL.shapes(6, 16) == [(1, 4), (2, 4), (4, 4), (1, 8), (2, 8)]


def test_fine_buckets_pad_to_the_next_step_and_add_no_rows() -> None:
    # steps of 4 up to 10: 3 and 4 become 4, 5 becomes 8, 9 becomes 10; 3 rows of 4 are 12 tokens
    found = plan_runs([3, 9, 4, 4, 5], 12, Buckets.fine(4, 10, 8))

    assert found == [Run((0, 2, 3), 3, 4), Run((4,), 1, 8), Run((1,), 1, 10)]


def test_of_fine_buckets_the_shortest_and_the_longest_row_are_enough_to_be_warm() -> None:
    assert Buckets.fine(4, 10, 8).up_to(10).shapes(10, 100) == [(1, 4), (1, 10)]


@pytest.mark.parametrize("sizes", [(), (0, 1), (4, 4), (8, 4)])
def test_sizes_of_buckets_must_ascend(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="lengths of buckets must be positive and ascend"):
        Buckets(lengths=sizes)


def test_the_longest_row_of_a_model_becomes_the_last_length() -> None:
    assert Buckets((16, 32, 64), (1, 2)).up_to(40) == Buckets((16, 32, 40), (1, 2))
    assert Buckets((16, 32), (1,)).up_to(32).lengths == (16, 32)
    assert Buckets((16, 32), (1,)).up_to(100).lengths == (16, 32, 100)
