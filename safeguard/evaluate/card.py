"""The tables of the text guard's model card, measured on the data pack and on our own test templates.

Everything is scored through the public check, at the pack's operating point "standard".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.evaluate.classifier import (
    Item,
    LabelledCheck,
    evasion,
    group_bias,
    measure,
    ranked_pairs,
    score_label,
    score_texts,
)
from safeguard.evaluate.metrics import calibration_error, rate_at
from safeguard.train.augment import DISGUISES, disguise
from safeguard.train.public_prompts import prompt_rows
from safeguard.train.text_data import JUDGED, NOISY, Row, hard_rows, read_pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOXICITY_SOURCES = (
    "dghs_v0.1",
    "toxigen_annotated",
    "hatemojibuild",
    "wikipedia_toxicity",
    "surge_toxicity",
    "openai_moderation",
)


def card_metrics(
    check: LabelledCheck, data: Path, *, prompts: Sequence[Path] = (), evasion_texts: int = 120
) -> dict[str, Any]:
    """All figures of the card as plain data. data: folder of the pack. prompts: wheels, as in training."""
    validation, public = read_pack(data, "validation"), read_pack(data, "public_test")
    standard = check.operating_points["standard"]
    scored = _Scored(check, [*validation, *prompt_rows(prompts, "validation"), *public])
    return {
        "operating_points": {k: dict(v) for k, v in check.operating_points.items()},
        "sources": _per_source(scored, standard),
        "pairs": _pairs(check, validation),
        "hard_test": _hard(check, standard),
        "calibration_error": _calibration(check, validation),
        "evasion": _evasion(check, validation, standard, evasion_texts),
        "bias": _bias(check, data, standard["toxicity"]),
    }


class _Scored:
    """Rows with their scores of every judged label."""

    def __init__(self, check: LabelledCheck, rows: Sequence[Row]) -> None:
        self.rows = rows
        scores = score_texts(check, [row.text for row in rows])
        self.scores = {label: scores[:, check.labels.index(label)] for label in JUDGED}

    def known(self, label: str) -> tuple[list[Item], NDArray[np.float64]]:
        """Items and scores of the rows that know a label; sources carry their split."""
        at = [i for i, row in enumerate(self.rows) if label in row.targets]
        rows = [self.rows[i] for i in at]
        items = [Item(r.text, r.targets[label] > 0.45, f"{r.source} ({r.split})") for r in rows]
        return items, self.scores[label][at]


def _per_source(scored: _Scored, thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for label in JUDGED:
        items, scores = scored.known(label)
        results.extend(r.to_dict() for r in measure(items, scores, label, thresholds[label]))
    return results


def _pairs(check: LabelledCheck, rows: Sequence[Row]) -> dict[str, float]:
    found = {}
    for source, label in (
        ("coprov2_train", "t2i_prompt"),
        ("posi_sft", "t2i_prompt"),
        ("paradetox", "toxicity"),
    ):
        mine = [row for row in rows if row.source == source and row.twin is not None]
        if not mine:
            continue
        unsafe = score_label(check, [row.text for row in mine], label)
        safe = score_label(check, [row.twin.text for row in mine if row.twin is not None], label)
        found[source] = ranked_pairs(unsafe, safe)
    return found


def _hard(check: LabelledCheck, thresholds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Judged label -> false positives and recall on our own test templates, and false positives per group."""
    rows = hard_rows("hard_text_test.toml")
    scores = score_texts(check, [row.text for row in rows])
    found: dict[str, dict[str, float]] = {}
    for label in JUDGED:
        column = scores[:, check.labels.index(label)]
        unsafe = np.array([row.targets.get(label, 0.0) > 0.5 for row in rows])
        safe = np.array([row.targets.get(label, 1.0) < 0.5 for row in rows])
        found[label] = {
            "false_positives": rate_at(column[safe], thresholds[label]),
            "recall": rate_at(column[unsafe], thresholds[label]),
        }
        for group in dict.fromkeys(row.group for row in rows):
            at = safe & np.array([row.group == group for row in rows])
            if at.any():
                found[label][group] = rate_at(column[at], thresholds[label])
    return found


def _calibration(check: LabelledCheck, rows: Sequence[Row]) -> dict[str, float]:
    rows = [row for row in rows if row.source not in NOISY]
    twins = [row.twin for row in rows if row.twin is not None]
    scored = _Scored(check, [*rows, *twins])
    found = {}
    for label in JUDGED:
        items, scores = scored.known(label)
        found[label] = calibration_error([item.unsafe for item in items], scores)
    return found


def _evasion(
    check: LabelledCheck, rows: Sequence[Row], thresholds: Mapping[str, float], most: int
) -> dict[str, dict[str, dict[str, float]]]:
    rng = random.Random(0)
    table = {}
    for label, sources in (
        ("toxicity", _TOXICITY_SOURCES),
        ("t2i_prompt", ("coprov2_train", "coco2014_captions", "diffusiondb_imagereward")),
        ("llm_request", ("ailuminate_demo", "awesome_chatgpt_prompts")),
    ):
        mine = [row for row in rows if row.source in sources and label in row.targets and len(row.text) < 400]
        if label == "llm_request":
            mine += [row for row in hard_rows("hard_text_test.toml") if label in row.targets]
        rng.shuffle(mine)
        unsafe = [row.text for row in mine if row.targets[label] > 0.5]
        unsafe.sort(key=lambda text: -float(score_label(check, [text], label)[0] >= thresholds[label]))
        safe = [row.text for row in mine if row.targets[label] < 0.45]
        changes: dict[str, Callable[[str, int], str]] = {
            name: partial(_disguised, name=name) for name in DISGUISES
        }
        table[label] = evasion(check, unsafe[:most], safe[:most], label, thresholds[label], changes)
    return table


def _disguised(text: str, seed: int, *, name: str) -> str:
    return disguise(text, seed, name=name, variety="test")


def _bias(check: LabelledCheck, data: Path, threshold: float) -> dict[str, dict[str, float]]:
    """Identity group (the last word of a madlib) -> rates; these sentences were partly trained on."""
    rows = [row for row in read_pack(data, "train") if row.source == "bias_madlibs"]
    items = [
        Item(row.text, row.targets["toxicity"] > 0.5, groups=(row.text.split()[-1].strip(".").lower(),))
        for row in rows
    ]
    scores = score_label(check, [item.text for item in items], "toxicity")
    found = group_bias(items, scores, threshold)
    return {group: values for group, values in found.items() if values["items"] >= 20}
