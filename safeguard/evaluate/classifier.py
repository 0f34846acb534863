"""How good a text check is: per source, at its operating points, over identity groups and under disguise.

Scores are taken as the guard takes them: of each view of a text (as it is, normalised), the largest counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from safeguard.evaluate.metrics import auroc, calibration_error, rate_at
from safeguard.text import views
from safeguard.types import Check, Finding

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LabelledCheck(Check[str], Protocol):
    """A text check that names its labels and its calibrated operating points."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def operating_points(self) -> Mapping[str, Mapping[str, float]]: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled text of a test. groups: identity groups named in it, for the table of bias."""

    text: str
    unsafe: bool
    source: str = ""
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceResult:
    """What was measured on one source for one label; NaN where it cannot be: one class only, or no items.

    recall: share of unsafe items at or over the threshold. false_positives: the same of harmless ones.
    """

    source: str
    label: str
    unsafe: int
    harmless: int
    threshold: float
    auroc: float
    recall: float
    false_positives: float
    calibration_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data with None for NaN, ready for JSON."""
        return _plain(asdict(self))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All results for one label of a check."""

    check: str
    label: str
    threshold: float
    results: tuple[SourceResult, ...]
    bias: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "check": self.check,
            "label": self.label,
            "threshold": self.threshold,
            "results": [result.to_dict() for result in self.results],
            "bias": {group: _plain(values) for group, values in self.bias.items()},
        }

    def to_markdown(self) -> str:
        """The tables per source and, where groups are named, per identity group."""
        parts = [f"{self.check}, {self.label} at {self.threshold:.3f}", "", table(self.results)]
        if self.bias:
            parts += ["", "| group | items | false positives | recall | AUROC |", "|---|---|---|---|---|"]
            for group, v in self.bias.items():
                cells = (_cell(v["false_positives"]), _cell(v["recall"]), _cell(v["auroc"]))
                parts.append(f"| {group} | {int(v['items'])} | {' | '.join(cells)} |")
        return "\n".join(parts)


def evaluate(
    check: LabelledCheck, items: Sequence[Item], label: str, *, threshold: float | None = None
) -> Evaluation:
    """Measures one label of a check on labelled texts.

    threshold: by default that of the check's operating point "standard", 0.5 where it has none.
    """
    if not items:
        raise ValueError("evaluate needs at least one item")
    standard = check.operating_points.get("standard", {})
    cut = threshold if threshold is not None else standard.get(label, 0.5)
    scores = score_label(check, [item.text for item in items], label)
    return Evaluation(
        check.name, label, cut, tuple(measure(items, scores, label, cut)), group_bias(items, scores, cut)
    )


def read_items(path: Path) -> list[Item]:
    """Items of a JSON-lines file: text, label (0 or 1), and optionally source and groups (a list of names).

    Raises ValueError naming the line that says something else.
    """
    items = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                items.append(_item(json.loads(line), f"line {number} of {path.name}"))
    return items


def _item(row: Any, where: str) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or row.get("label") not in (0, 1):
        raise ValueError(f"{where} must have text and label 0 or 1")
    groups = row.get("groups") or []
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise ValueError(f"{where}: groups must be a list of names")
    return Item(row["text"], bool(row["label"]), str(row.get("source") or ""), tuple(groups))


def score_texts(check: LabelledCheck, texts: Sequence[str], *, batch: int = 256) -> NDArray[np.float64]:
    """Scores (text, label) in the order of `check.labels`, the largest over the views of each text."""
    labels = check.labels
    out = np.zeros((len(texts), len(labels)))
    for start in range(0, len(texts), batch):
        owners, seen = [], []
        for i, text in enumerate(texts[start : start + batch], start):
            for view in dict.fromkeys([text, *(v.text for v in views(text))]):
                owners.append(i)
                seen.append(view)
        for owner, result in zip(owners, check(seen), strict=True):
            scores = result.scores if isinstance(result, Finding) else result
            out[owner] = np.maximum(out[owner], [scores[label] for label in labels])
    return out


def score_label(check: LabelledCheck, texts: Sequence[str], label: str) -> NDArray[np.float64]:
    """Scores (text,) of one label. Raises ValueError when the check gives no such label."""
    labels = check.labels
    if label not in labels:
        raise ValueError(f"check {check.name!r} gives no label {label!r}; it gives {', '.join(labels)}")
    return score_texts(check, texts)[:, labels.index(label)]


def measure(
    items: Sequence[Item], scores: NDArray[np.float64], label: str, threshold: float
) -> list[SourceResult]:
    """One result per source in the order of appearance, and one over all as "all" where there are several.

    scores: (item,) in [0, 1].
    """
    names = list(dict.fromkeys(item.source for item in items))
    unsafe = np.array([item.unsafe for item in items], bool)
    where = {name: np.array([item.source == name for item in items], bool) for name in names}
    if len(names) > 1:
        where["all"] = np.ones(len(items), bool)
    return [_measure(name, label, unsafe[at], scores[at], threshold) for name, at in where.items()]


def _measure(
    name: str, label: str, unsafe: NDArray[np.bool_], scores: NDArray[np.float64], threshold: float
) -> SourceResult:
    both = bool(unsafe.any() and not unsafe.all())
    return SourceResult(
        name,
        label,
        int(unsafe.sum()),
        int((~unsafe).sum()),
        threshold,
        auroc(unsafe, scores) if both else math.nan,
        rate_at(scores[unsafe], threshold),
        rate_at(scores[~unsafe], threshold),
        calibration_error(unsafe, scores) if both else math.nan,
    )


def group_bias(
    items: Sequence[Item], scores: NDArray[np.float64], threshold: float
) -> dict[str, dict[str, float]]:
    """Identity group -> false positives, recall, AUROC on the items that name it, and their number."""
    groups = sorted({group for item in items for group in item.groups})
    unsafe = np.array([item.unsafe for item in items], bool)
    table = {}
    for group in groups:
        at = np.array([group in item.groups for item in items], bool)
        result = _measure(group, "", unsafe[at], scores[at], threshold)
        table[group] = {
            "items": float(at.sum()),
            "false_positives": result.false_positives,
            "recall": result.recall,
            "auroc": result.auroc,
        }
    return table


def evasion(
    check: LabelledCheck,
    unsafe: Sequence[str],
    harmless: Sequence[str],
    label: str,
    threshold: float,
    disguises: Mapping[str, Callable[[str, int], str]],
) -> dict[str, dict[str, float]]:
    """Disguise -> share of flagged unsafe texts still flagged after it, and the rise of false positives.

    disguises: name -> (text, seed) -> text.
    """
    flagged = [t for t, s in zip(unsafe, score_label(check, unsafe, label), strict=True) if s >= threshold]
    before = rate_at(score_label(check, harmless, label), threshold)
    table = {}
    for name, change in disguises.items():
        kept = rate_at(score_label(check, [change(t, i) for i, t in enumerate(flagged)], label), threshold)
        after = rate_at(score_label(check, [change(t, i) for i, t in enumerate(harmless)], label), threshold)
        table[name] = {"still_flagged": kept, "false_positive_rise": after - before}
    return table


def ranked_pairs(unsafe: NDArray[np.float64], safe: NDArray[np.float64]) -> float:
    """Share of pairs whose unsafe text scores above its harmless twin."""
    return float((unsafe > safe).mean())


def table(results: Sequence[SourceResult]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| source | label | unsafe | harmless | AUROC | recall | false positives | calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = (_cell(r.auroc), _cell(r.recall), _cell(r.false_positives), _cell(r.calibration_error))
        lines.append(f"| {r.source or '-'} | {r.label} | {r.unsafe} | {r.harmless} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
