"""How well verdicts hold when texts are rewritten to slip past: a table per transformation.

Beside the share of flagged texts that stay flagged stands what that costs: harmless texts that are flagged,
as they are and under the same transformation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safeguard.evaluate.classifier import Item, LabelledCheck, score_label
from safeguard.evaluate.transformations import TRANSFORMATIONS, transform

Flag = Callable[[Sequence[str]], Sequence[bool | None]]
"""Texts to whether each is flagged, None where it could not be judged."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one transformation does to verdicts; shares are NaN where there is nothing to measure on.

    kept: share of the `flagged` texts still flagged after it. false_positives: share of the `harmless` texts
    flagged after it. changed: share of all these that it changes at all. unjudged: how many could not be
    judged; they count as flagged, as a guard blocks them.
    """

    transformation: str
    flagged: int
    kept: float
    harmless: int
    false_positives: float
    changed: float
    unjudged: int


@dataclass(frozen=True, slots=True)
class Evasion:
    """The whole table, and what it was made with: two with the same digests and seed are equal.

    judge says what judged; digest is that of its model or policy. unsafe: texts of label 1, `recall` the
    share of them that is flagged as they are. false_positives: the same for the harmless ones.
    """

    judge: str
    digest: str | None
    data: str
    seed: int
    unsafe: int
    harmless: int
    recall: float
    false_positives: float
    unjudged: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with None for NaN, ready for JSON."""
        found = asdict(self)
        found["rows"] = [_plain(row) for row in found["rows"]]
        return _plain(found)

    def to_markdown(self) -> str:
        """A table, with what it was measured on above it."""
        lines = [
            f"{self.judge}, seed {self.seed}, data {self.data[:12]}",
            f"as they are: {_cell(self.recall)} of {self.unsafe} unsafe flagged, "
            f"{_cell(self.false_positives)} of {self.harmless} harmless, {self.unjudged} not judged",
            "",
            "| transformation | flagged | still flagged | harmless | false positives | changed | unjudged |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = (
                row.transformation,
                row.flagged,
                _cell(row.kept),
                row.harmless,
                _cell(row.false_positives),
            )
            lines.append(f"| {' | '.join(map(str, cells))} | {_cell(row.changed)} | {row.unjudged} |")
        return "\n".join(lines)


def measure_evasion(
    flag: Flag,
    items: Sequence[Item],
    *,
    judge: str = "check",
    digest: str | None = None,
    seed: int = 0,
    transformations: Sequence[str] = tuple(TRANSFORMATIONS),
) -> Evasion:
    """Judges texts as they are and under each transformation.

    Raises ValueError without items, UnknownName for a transformation that there is not.
    """
    if not items:
        raise ValueError("evasion needs at least one item")
    unsafe = [item.text for item in items if item.unsafe]
    harmless = [item.text for item in items if not item.unsafe]
    before, clean = _judged(flag, unsafe), _judged(flag, harmless)
    flagged = [text for text, verdict in zip(unsafe, before, strict=True) if verdict is True]
    rows = tuple(_row(flag, name, flagged, harmless, seed) for name in transformations)
    return Evasion(
        judge,
        digest,
        digest_of(items),
        seed,
        len(unsafe),
        len(harmless),
        _share(before),
        _share(clean),
        [*before, *clean].count(None),
        rows,
    )


def flag_by(check: LabelledCheck, label: str, threshold: float) -> Flag:
    """Flags by one label of a check, over all readings of a text as the guard takes them."""

    def flag(texts: Sequence[str]) -> list[bool]:
        return [bool(score >= threshold) for score in score_label(check, texts, label)]

    return flag


def digest_of(items: Sequence[Item]) -> str:
    """SHA-256 of the texts and labels, in order."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps([item.text, item.unsafe]).encode() + b"\n")
    return found.hexdigest()


def _row(flag: Flag, name: str, flagged: Sequence[str], harmless: Sequence[str], seed: int) -> Row:
    changed = transform(name, flagged, seed), transform(name, harmless, seed)
    kept, wrong = (_judged(flag, texts) for texts in changed)
    moved = [a != b for a, b in zip([*flagged, *harmless], [*changed[0], *changed[1]], strict=True)]
    return Row(
        name,
        len(flagged),
        _share(kept),
        len(harmless),
        _share(wrong),
        _share(moved),
        [*kept, *wrong].count(None),
    )


def _judged(flag: Flag, texts: Sequence[str]) -> list[bool | None]:
    if not texts:
        return []
    found = list(flag(texts))
    if len(found) != len(texts):
        raise ValueError(f"the judge gave {len(found)} verdicts for {len(texts)} texts")
    return found


def _share(verdicts: Sequence[bool | None]) -> float:
    """Share of what is flagged; what could not be judged counts as that, as a guard blocks it."""
    return sum(verdict is not False for verdict in verdicts) / len(verdicts) if verdicts else math.nan


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
