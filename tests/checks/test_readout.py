from __future__ import annotations

import math

import numpy as np
import pytest

from safeguard.checks.readout import Readout


def test_sigmoid_adds_the_bias_then_divides_by_the_temperature() -> None:
    readout = Readout(["a", "b"], temperatures={"a": 2.0}, biases={"a": 1.0})

    scores = readout(np.array([[3.0, 0.0]], np.float32), 1)

    # a: sigmoid((3 + 1) / 2) = 1 / (1 + e^-2); b: sigmoid(0)
    np.testing.assert_allclose(scores, [[1 / (1 + math.exp(-2)), 0.5]], rtol=1e-12)


def test_softmax_runs_over_all_columns_and_ignored_ones_are_left_out() -> None:
    readout = Readout(["safe", "bad"], ignored=["safe"], activation="softmax")

    scores = readout(np.array([[0.0, math.log(3)]]), 1)

    np.testing.assert_allclose(scores, [[0.75]])  # e^ln3 / (e^0 + e^ln3) = 3 / 4
    assert readout.labels == ("bad",)


def test_softmax_of_two_heads_is_taken_in_each() -> None:
    readout = Readout(["a", "b", "c", "d"], activation="softmax", heads={"x": ["a", "c"], "y": ["d", "b"]})

    scores = readout(np.array([[0.0, math.log(3), math.log(4), 0.0]]), 1)

    np.testing.assert_allclose(scores, [[0.2, 0.75, 0.8, 0.25]])  # a : c = 1 : 4 and d : b = 1 : 3


def test_own_probabilities_are_kept_and_rounding_is_clipped() -> None:
    readout = Readout(["a", "b"], activation="none")

    np.testing.assert_array_equal(readout(np.array([[1.0001, 0.25]]), 1), [[1.0, 0.25]])


def test_an_output_that_is_no_probability_becomes_nan() -> None:
    readout = Readout(["a", "b"], activation="none")

    np.testing.assert_array_equal(readout(np.array([[1.5, -0.5]]), 1), [[np.nan, np.nan]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_becomes_nan(value: float) -> None:
    scores = Readout(["a", "b"])(np.array([[value, 0.0]]), 1)

    np.testing.assert_array_equal(scores, [[np.nan, 0.5]])


def test_huge_logits_do_not_overflow() -> None:
    np.testing.assert_array_equal(Readout(["a", "b"])(np.array([[1e30, -1e30]]), 1), [[1.0, 0.0]])


def test_a_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \(2, 2\)"):
        Readout(["a", "b"])(np.zeros((1, 2)), 2)


def test_a_wrong_number_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(1, 2\)"):
        Readout(["a", "b"])(np.zeros((1, 3)), 1)


def test_unknown_and_repeated_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="no label named c; known: a, b"):
        Readout(["a", "b"], ignored=["c"])
    with pytest.raises(ValueError, match="labels must be unique"):
        Readout(["a", "a"])


def test_ignoring_every_label_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        Readout(["a"], ignored=["a"])
