"""Calibration of a check on labelled texts: temperature and bias, thresholds for wanted false-positive rates.

Works on any check and any rows (text, label); `write_calibration` stores the result in a model pack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.evaluate.metrics import auroc, calibration_error, rate_at, threshold_for
from safeguard.manifest import Manifest
from safeguard.packs import read_pack, seal
from safeguard.types import Check, Finding

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

FALSE_POSITIVE_RATES: Mapping[str, float] = {"lenient": 0.005, "standard": 0.01, "strict": 0.03}
"""Operating point -> share of harmless texts that it may flag."""
_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration found for one label.

    probability = sigmoid(slope * logit + offset), where the logit is that of the check's own probability.
    thresholds: operating point -> threshold on the calibrated probability. error_before, error: expected
    calibration error of the check as it is, and calibrated. recall: operating point -> share of unsafe texts
    flagged.
    """

    label: str
    slope: float
    offset: float
    thresholds: Mapping[str, float]
    recall: Mapping[str, float]
    auroc: float
    error_before: float
    error: float
    unsafe: int
    harmless: int


def fit_scaling(logits: ArrayLike, truth: ArrayLike, *, ridge: float = 1e-3) -> tuple[float, float]:
    """Slope and offset for which sigmoid(slope * logit + offset) is most likely, by Newton's method.

    logits: (item,). truth: (item,), in [0, 1]. ridge pulls the slope towards 1 and the offset towards 0, so
    that separable data stays finite. The slope is never below 0.01. Source: Platt 1999; Guo et al. 2017.
    """
    z, y = np.asarray(logits, np.float64), np.asarray(truth, np.float64)
    if z.shape != y.shape or not len(z):
        raise ValueError(f"fit_scaling needs as many truths as logits, got {y.shape} and {z.shape}")
    design = np.stack([z, np.ones_like(z)], axis=1)  # (item, 2)
    prior = np.array([1.0, 0.0])
    value = prior.copy()

    def cost(at: NDArray[np.float64]) -> float:
        score = design @ at
        return float((np.logaddexp(0.0, score) - y * score).mean() + 0.5 * ridge * ((at - prior) ** 2).sum())

    for _ in range(_ROUNDS):
        p = _sigmoid(design @ value)
        gradient = design.T @ (p - y) / len(z) + ridge * (value - prior)
        hessian = (design * (p * (1 - p))[:, None]).T @ design / len(z) + (ridge + 1e-9) * np.eye(2)
        change = np.linalg.solve(hessian, gradient)
        while cost(value - change) > cost(value) and float(np.abs(change).max()) > 1e-9:
            change = change / 2  # far from the optimum a whole step overshoots
        value = value - change
        if float(np.abs(change).max()) < 1e-9:
            break
    return max(0.01, float(value[0])), float(value[1])


def scale(probabilities: ArrayLike, slope: float, offset: float) -> NDArray[np.float64]:
    """sigmoid(slope * logit(p) + offset) for each probability; 0 and 1 stay what they are up to rounding."""
    return _sigmoid(slope * _logit(np.asarray(probabilities, np.float64)) + offset)


def calibrate(
    check: Check[str],
    texts: Sequence[str],
    truth: Sequence[int],
    label: str,
    *,
    rates: Mapping[str, float] = FALSE_POSITIVE_RATES,
    refit: bool = True,
) -> Calibration:
    """Calibrates one label of a check on texts of which it is known whether they are unsafe (1) or not (0).

    refit: False keeps the check's probabilities and only chooses thresholds.
    Raises ValueError when one of the classes is missing or the check gives no such label.
    """
    if len(texts) != len(truth):
        raise ValueError(f"calibrate needs as many truths as texts, got {len(truth)} and {len(texts)}")
    return calibrate_scores(label, scores_of(check, texts, label), truth, rates=rates, refit=refit)


def scores_of(check: Check[str], texts: Sequence[str], label: str, *, batch: int = 64) -> NDArray[np.float64]:
    """The check's score of one label for each text (text,)."""
    found: list[float] = []
    for start in range(0, len(texts), batch):
        for result in check(texts[start : start + batch]):
            scores = result.scores if isinstance(result, Finding) else result
            if label not in scores:
                raise ValueError(
                    f"check {check.name!r} gives no label {label!r}; it gives {', '.join(scores)}"
                )
            found.append(float(scores[label]))
    return np.array(found)


def calibrate_scores(
    label: str,
    scores: ArrayLike,
    truth: ArrayLike,
    *,
    rates: Mapping[str, float] = FALSE_POSITIVE_RATES,
    refit: bool = True,
    floors: Mapping[str, float] | None = None,
    counted: ArrayLike | None = None,
) -> Calibration:
    """As `calibrate`, from scores (item,) that are already there.

    floors: operating point -> lowest threshold, where these texts are easier than those to come. counted:
    booleans (item,), which harmless items the rates speak of, all by default.
    """
    values, known = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    unsafe = known > 0.5
    if not unsafe.any() or unsafe.all():
        raise ValueError(
            f"calibrating {label!r} needs unsafe and harmless items, got {unsafe.sum()} and {(~unsafe).sum()}"
        )
    slope, offset = fit_scaling(_logit(values), known) if refit else (1.0, 0.0)
    new = scale(values, slope, offset) if refit else values
    lowest = floors or {}
    harmless = new[~unsafe if counted is None else ~unsafe & np.asarray(counted, bool)]
    if not len(harmless):
        raise ValueError(f"calibrating {label!r} needs harmless items among those that are counted, got none")
    thresholds = {
        point: max(threshold_for(harmless, rate), lowest.get(point, 0.0)) for point, rate in rates.items()
    }
    return Calibration(
        label,
        slope,
        offset,
        thresholds,
        {point: rate_at(new[unsafe], threshold) for point, threshold in thresholds.items()},
        auroc(unsafe, values),
        calibration_error(unsafe, values),
        calibration_error(unsafe, new),
        int(unsafe.sum()),
        int((~unsafe).sum()),
    )


def calibrated_fields(manifest: Manifest, found: Sequence[Calibration]) -> dict[str, Any]:
    """The manifest's temperatures, biases and operating points with these calibrations worked in."""
    if manifest.activation != "sigmoid":
        raise ValueError(
            f"only sigmoid outputs can be recalibrated, {manifest.name} has {manifest.activation}"
        )
    temperatures, biases = dict(manifest.temperatures), dict(manifest.biases)
    points = {point: dict(values) for point, values in manifest.operating_points.items()}
    for one in found:
        old_temperature, old_bias = temperatures.get(one.label, 1.0), biases.get(one.label, 0.0)
        temperatures[one.label] = old_temperature / one.slope
        biases[one.label] = old_bias + one.offset * old_temperature / one.slope
        for point, threshold in one.thresholds.items():
            points.setdefault(point, {})[one.label] = round(threshold, 6)
    return {"temperatures": temperatures, "biases": biases, "operating_points": points}


def write_calibration(folder: Path, found: Sequence[Calibration]) -> Manifest:
    """Rewrites the `safeguard.json` of a pack with these calibrations; its other files stay as they are."""
    manifest = read_pack(folder).manifest
    fields = manifest.model_dump(mode="json", exclude={"files"}) | calibrated_fields(manifest, found)
    return seal(folder, fields, files=list(manifest.files))


def read_labelled(path: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of a JSON-lines file with the keys text and label (0 or 1); other keys are ignored.

    Raises ValueError naming the line that says something else.
    """
    texts: list[str] = []
    truth: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
            if not isinstance(text, str) or label not in (0, 1):
                raise ValueError(f"line {number} of {path.name} must have text and label 0 or 1")
            texts.append(text)
            truth.append(int(label))
    return texts, truth


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(p, 1e-12, 1 - 1e-12)
    return np.log(inside) - np.log1p(-inside)
