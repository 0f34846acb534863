"""Measures of a classifier, in numpy: ranking, rates at a threshold, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def auroc(truth: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a random positive scores above a random negative, ties counting half.

    truth, scores: (item,). Raises ValueError when one of the classes is missing.
    """
    positive = np.asarray(truth, bool)
    values = np.asarray(scores, np.float64)
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        raise ValueError("auroc needs both classes")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse]  # mean rank of tied values, from 1
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def rate_at(scores: ArrayLike, threshold: float) -> float:
    """Share of the scores at or above the threshold; NaN of none."""
    values = np.asarray(scores, np.float64)
    return float((values >= threshold).mean()) if len(values) else float("nan")


def calibration_error(truth: ArrayLike, probabilities: ArrayLike, *, bins: int = 15) -> float:
    """Expected calibration error: |share of positives - mean probability| over equal bins, by their size.

    truth: (item,) 0 or 1. probabilities: (item,) in [0, 1].
    Source: Guo et al. 2017, On Calibration of Modern Neural Networks.
    """
    labels = np.asarray(truth, np.float64)
    values = np.asarray(probabilities, np.float64)
    if not len(values):
        raise ValueError("calibration_error needs at least one item")
    place = np.minimum((values * bins).astype(int), bins - 1)
    gaps = [abs(labels[place == b].sum() - values[place == b].sum()) for b in np.unique(place)]
    return float(sum(gaps) / len(values))


def threshold_for(negatives: ArrayLike, rate: float) -> float:
    """Smallest threshold in [0, 1] at which at most `rate` of these harmless items' scores reach it."""
    values = np.sort(np.asarray(negatives, np.float64))[::-1]
    if not len(values):
        raise ValueError("threshold_for needs at least one harmless item")
    allowed = int(rate * len(values) + 1e-9)
    if allowed >= len(values):
        return 0.0
    return float(min(1.0, np.nextafter(values[allowed], np.inf)))
