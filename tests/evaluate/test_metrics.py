from __future__ import annotations

import math

import numpy as np
import pytest

from safeguard.evaluate.metrics import auroc, calibration_error, rate_at, threshold_for


def test_auroc_counts_ordered_pairs() -> None:
    # positives .8 and .4, negatives .6 and .2: of four pairs, .8 beats both and .4 beats .2: 3/4
    assert auroc([1, 1, 0, 0], [0.8, 0.4, 0.6, 0.2]) == pytest.approx(0.75)


def test_auroc_counts_a_tie_as_half() -> None:
    # pairs (.5, .5) and (.5, .1): (0.5 + 1) / 2
    assert auroc([1, 0, 0], [0.5, 0.5, 0.1]) == pytest.approx(0.75)


def test_auroc_of_a_perfect_ranking_is_one() -> None:
    assert auroc([0, 0, 1], [0.1, 0.2, 0.3]) == 1.0


def test_auroc_refuses_one_class() -> None:
    with pytest.raises(ValueError, match="both classes"):
        auroc([1, 1], [0.1, 0.2])


def test_rate_counts_scores_at_the_threshold() -> None:
    assert rate_at([0.2, 0.5, 0.9], 0.5) == pytest.approx(2 / 3)


def test_rate_of_nothing_is_not_a_number() -> None:
    assert math.isnan(rate_at([], 0.5))


def test_calibration_error_weighs_gaps_by_the_size_of_the_bins() -> None:
    # two bins: [.0, .5) holds .2 and .4 with truths 0 and 1: |1 - .6| / 4 = .1;
    # [.5, 1] holds .9 and .7 with truths 1 and 1: |2 - 1.6| / 4 = .1
    assert calibration_error([0, 1, 1, 1], [0.2, 0.4, 0.9, 0.7], bins=2) == pytest.approx(0.2)


def test_calibration_error_takes_one_into_the_last_bin() -> None:
    assert calibration_error([1], [1.0]) == 0.0


def test_calibration_error_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        calibration_error([], [])


def test_threshold_lets_through_what_was_wanted() -> None:
    # of ten harmless items 20 % are two: .9 and .8 may be flagged, .7 may not
    scores = np.arange(10) / 10
    threshold = threshold_for(scores, 0.2)
    assert threshold > 0.7
    assert threshold < 0.8


def test_threshold_for_no_false_positive_lies_above_all() -> None:
    assert threshold_for([0.1, 0.3], 0.0) > 0.3


def test_threshold_never_leaves_the_probabilities() -> None:
    assert threshold_for([1.0, 1.0], 0.0) == 1.0
    assert threshold_for([0.3], 1.0) == 0.0
