from __future__ import annotations

import math

import numpy as np
import pytest

from safeguard.train.q16_fit import Sample, class_means, gain_of, logits_of, with_gain

AXES = np.eye(2)  # harmless along the first axis, harmful along the second


def sample(rows: list[list[float]], index: list[list[int]], truth: list[bool]) -> Sample:
    return Sample(np.array(rows, np.float32), np.array(index), np.array(truth))


def test_logit_is_scale_times_the_difference_of_the_cosines() -> None:
    found = logits_of(AXES, sample([[0.6, 0.8], [1.0, 0.0]], [[0], [1]], [True, False]), 100.0)
    assert found == pytest.approx([20.0, -100.0])  # 100 * (0.8 - 0.6), 100 * (0 - 1)


def test_worst_view_of_a_picture_counts() -> None:
    found = logits_of(AXES, sample([[1.0, 0.0], [0.0, 1.0]], [[0, 1]], [True]), 10.0)
    assert found == pytest.approx([10.0])


def test_a_gain_multiplies_every_logit() -> None:
    part = sample([[0.6, 0.8], [1.0, 0.0]], [[0], [1]], [True, False])
    prompts, gain = with_gain(AXES, 0.5)
    assert gain == 0.5
    assert np.linalg.norm(prompts, axis=1) == pytest.approx([1.0, 1.0])
    assert logits_of(prompts, part, 100.0) == pytest.approx([10.0, -50.0])  # half of the above


def test_a_gain_that_no_unit_prompts_have_is_the_largest_possible() -> None:
    prompts, gain = with_gain(AXES, 10.0)
    assert gain == pytest.approx(math.sqrt(2))  # 2 apart at most, these are sqrt(2) apart
    assert prompts[1] == pytest.approx(-prompts[0])


def test_opposite_prompts_are_closed_as_well() -> None:
    part = sample([[0.6, 0.8]], [[0]], [True])
    prompts, gain = with_gain(np.array([[-1.0, 0.0], [1.0, 0.0]]), 0.25)
    assert gain == 0.25
    assert np.linalg.norm(prompts, axis=1) == pytest.approx([1.0, 1.0])
    assert logits_of(prompts, part, 100.0) == pytest.approx([30.0])  # a quarter of 100 * 2 * 0.6


def test_prompts_of_one_direction_stay_as_they_are() -> None:
    same = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert with_gain(same, 2.0)[1] == 1.0


def test_overconfident_logits_get_a_small_gain() -> None:
    # logits of 10 that are wrong in one of four: log(3) / 10 makes them 0.75, but for the ridge
    logits = np.array([10.0] * 4 + [-10.0] * 4)
    truth = np.array([True] * 3 + [False] * 4 + [True])
    assert gain_of(logits, truth) == pytest.approx(math.log(3) / 10, rel=0.02)


def test_separable_logits_get_a_finite_gain() -> None:
    found = gain_of(np.array([1.0, -1.0]), np.array([True, False]))
    assert 1.0 < found < 20.0


def test_means_of_a_class_are_those_of_its_views() -> None:
    part = sample([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [[0, 1], [2, 2]], [False, True])
    assert class_means(part) == pytest.approx(np.array([[math.sqrt(0.5)] * 2, [0.0, 1.0]]))


def test_samples_with_different_numbers_of_views_are_joined() -> None:
    one = sample([[1.0, 0.0]], [[0]], [False])
    two = sample([[0.0, 1.0], [1.0, 0.0]], [[0, 1]], [True])
    both = one.with_more(two)
    assert both.index.tolist() == [[0, 0], [1, 2]]
    assert logits_of(AXES, both, 1.0) == pytest.approx([-1.0, 1.0])
