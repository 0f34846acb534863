"""How good a learned pair of prompts is: figures of one part, thresholds, cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.checks.clip_heads import PromptPair
from safeguard.evaluate.metrics import auroc, calibration_error, rate_at, threshold_for
from safeguard.train.q16_data import LabelledPicture, Part, PictureSet
from safeguard.train.q16_fit import Sample, class_means, fit_prompts, logits_of, unit_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.train.q16 import Q16Config


def _scores(head: PromptPair, sample: Sample) -> NDArray[np.float64]:
    return head.probability(logits_of(unit_rows(head.prompts), sample, head.scale))


def operating_points(
    head: PromptPair, sample: Sample, rates: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Point -> category -> the threshold at which that share of these harmless pictures is flagged."""
    harmless = _scores(head, sample)[~sample.truth]
    return {point: {head.category: threshold_for(harmless, rate)} for point, rate in rates.items()}


def measured(
    head: PromptPair,
    sample: Sample,
    pictures: Sequence[LabelledPicture],
    points: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """Figures of one part at 0.5 and at operating points; None where there are no such pictures."""
    truth = sample.truth
    if not len(truth):
        return None
    scores = _scores(head, sample)
    both = bool(truth.any() and not truth.all())
    cuts = {"half": 0.5} | {point: found[head.category] for point, found in points.items()}
    return {
        "inappropriate": int(truth.sum()),
        "harmless": int((~truth).sum()),
        "auroc": auroc(truth, scores) if both else None,
        "accuracy": float(((scores >= 0.5) == truth).mean()),
        "calibration_error": calibration_error(truth, scores),
        "brier": float(((scores - truth) ** 2).mean()),
        "at": {
            name: {
                "threshold": cut,
                "recall": _rate(scores[truth], cut),
                "false_positives": _rate(scores[~truth], cut),
            }
            for name, cut in cuts.items()
        },
        "flagged_by_category": _by_category(scores, pictures, 0.5),
    }


def _rate(scores: NDArray[np.float64], cut: float) -> float | None:
    return rate_at(scores, cut) if len(scores) else None


def _by_category(
    scores: NDArray[np.float64], pictures: Sequence[LabelledPicture], cut: float
) -> dict[str, dict[str, float]]:
    """Category -> pictures, and the share of them that is flagged."""
    table = {}
    for name in sorted({picture.category for picture in pictures if picture.category}):
        at = np.array([picture.category == name for picture in pictures])
        table[name] = {"pictures": float(at.sum()), "flagged": rate_at(scores[at], cut)}
    return table


def cross_validate(
    config: Q16Config, samples: Mapping[Part, Sample], pictures: PictureSet
) -> dict[str, Any] | None:
    """Accuracy and AUROC over folds of train and validation; groups stay together. None for no folds.

    Each is tested on one fold; the next one chooses the epoch, the others train, none of them mirrored.
    """
    if not config.folds:
        return None
    every = samples["train"].with_more(samples["validation"])
    listed = pictures.part("train") + pictures.part("validation")
    names = sorted({p.group or p.name for p in listed})
    np.random.default_rng(config.seed).shuffle(names)
    place = {name: i % config.folds for i, name in enumerate(names)}
    fold = np.array([place[p.group or p.name] for p in listed])
    accuracies, areas = [], []
    for number in range(config.folds):
        test, check = fold == number, fold == (number + 1) % config.folds
        train, chosen, held = every.take(~test & ~check), every.take(check), every.take(test)
        if not all(0 < s.truth.sum() < len(s.truth) for s in (train, chosen, held)):
            raise ValueError(f"fold {number} of {config.folds} lacks one of the labels; take fewer folds")
        found = fit_prompts(class_means(train), train, chosen, config).prompts
        logits = logits_of(found, held, config.scale)
        accuracies.append(float(((logits >= 0) == held.truth).mean()))
        areas.append(auroc(held.truth, logits))
    return {
        "folds": config.folds,
        "accuracy": [float(np.mean(accuracies)), float(np.std(accuracies))],
        "auroc": [float(np.mean(areas)), float(np.std(areas))],
    }
