from __future__ import annotations

import pytest

from safeguard.bench.timing import (
    ContenderFailed,
    Sample,
    Spread,
    interleave,
    quantile,
    ratio,
    spread,
)


def test_every_contender_runs_once_in_each_repeat() -> None:
    seen: list[tuple[int, str]] = []

    def contender(name: str, turn: int) -> Sample:
        seen.append((turn, name))
        return Sample(1.0)

    interleave({n: lambda t, n=n: contender(n, t) for n in "abc"}, 4, warmups=1)  # type: ignore[misc]

    rounds = [sorted(name for turn, name in seen if turn == now) for now in (-1, 0, 1, 2, 3)]
    assert rounds == [["a", "b", "c"]] * 5


def test_rounds_come_one_after_another_and_not_contender_by_contender() -> None:
    seen: list[int] = []

    def contender(turn: int) -> Sample:
        seen.append(turn)
        return Sample(1.0)

    interleave({"a": contender, "b": contender}, 2, warmups=1)

    assert seen == [-1, -1, 0, 0, 1, 1]


def test_the_order_within_a_round_changes() -> None:
    seen: list[str] = []

    def contender(name: str) -> Sample:
        seen.append(name)
        return Sample(1.0)

    interleave({n: lambda _, n=n: contender(n) for n in "ab"}, 20, warmups=0)  # type: ignore[misc]

    assert {"".join(seen[i : i + 2]) for i in range(0, 40, 2)} == {"ab", "ba"}


def test_warm_up_rounds_are_not_kept() -> None:
    outcome = interleave({"a": lambda turn: Sample(100.0 if turn < 0 else 1.0)}, 3, warmups=2)

    assert outcome.per_item("a") == [1.0, 1.0, 1.0]


def test_a_contender_that_fails_is_out_and_the_others_go_on() -> None:
    def broken(turn: int) -> Sample:
        if turn == 1:
            raise ContenderFailed("b", "out of memory")
        return Sample(1.0)

    outcome = interleave({"a": lambda _: Sample(2.0), "b": broken}, 3)

    assert outcome.failed == {"b": "out of memory"}
    assert outcome.per_item("a") == [2.0, 2.0, 2.0]
    assert "b" not in outcome.samples


def test_times_are_per_item() -> None:
    outcome = interleave({"a": lambda _: Sample(4.0, items=8)}, 1)

    assert outcome.per_item("a") == [0.5]


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be 1 or more and warmups 0 or more, got 0 and 1"):
        interleave({}, 0)


def test_median_and_quartiles_lie_between_neighbours() -> None:
    # sorted 1 2 3 10: places 0.75, 1.5 and 2.25, so 1.75, 2.5 and 3 + 0.25 * 7
    assert spread([10.0, 1.0, 3.0, 2.0]) == Spread(2.5, 1.75, 4.75, 4)


def test_one_run_is_its_own_median_and_quartiles() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_the_largest_value_is_the_last_quantile() -> None:
    assert quantile([5.0, 1.0], 1.0) == 5.0


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_what_has_no_median_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="a median needs numbers"):
        spread(values)


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_what_has_no_quantile_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match=r"a quantile needs values and a share in \[0, 1\]"):
        quantile(values, share)


def test_ratios_are_taken_within_each_repeat() -> None:
    # a busy second repeat slows both: 4/2, 40/20 and 6/2 give 2, 2, 3; the ratio of medians would be 3
    assert ratio([4.0, 40.0, 6.0], [2.0, 20.0, 2.0]).median == 2.0


def test_ratios_of_unequal_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])
