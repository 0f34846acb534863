"""A text check as a number per text: the risk that rewards, filters and measurements of refiners read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeguard.checks.loading import load_check
from safeguard.text import views
from safeguard.train.toxicity_teacher import KINDS, teacher_scores
from safeguard.types import Finding, Modality, Scores

_BATCH = 256


class Risk:
    """Scores of one label of a check, the largest over the views of each text, as the guard judges it.

    threshold: from which a text is flagged.
    """

    def __init__(self, check: Any, label: str, threshold: float | None = None) -> None:
        self._check, self.label = check, label
        points = getattr(check, "operating_points", None) or {}
        self.threshold = threshold if threshold is not None else points.get("standard", {}).get(label, 0.5)
        self.name = f"{check.name}/{label}"
        self.digest: str | None = getattr(check, "digest", None)

    def __call__(self, texts: Sequence[str], /) -> list[float]:
        """One probability per text. Raises ValueError for a score that is missing or not in [0, 1]."""
        found: dict[str, float] = dict.fromkeys(texts, 0.0)
        shown = [(text, view) for text in found for view in {text: 0, **{v.text: 0 for v in views(text)}}]
        for start in range(0, len(shown), _BATCH):
            part = shown[start : start + _BATCH]
            for (text, _), result in zip(part, self._check([view for _, view in part]), strict=True):
                scores = result.scores if isinstance(result, Finding) else result
                score = float(scores.get(self.label, -1))
                if not 0 <= score <= 1:
                    raise ValueError(f"{self.name} must give a score in [0, 1] to every text, got {score}")
                found[text] = max(found[text], score)
        return [found[text] for text in texts]

    def flagged(self, texts: Sequence[str], /) -> list[bool]:
        """Whether each text reaches the threshold."""
        return [score >= self.threshold for score in self(texts)]


class TeacherCheck:
    """The six-label toxicity teacher (`toxicity_teacher`) as a check: no refiner trains with it."""

    name = "toxicity_teacher"
    modality: Modality = "text"
    labels = KINDS

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, batch: Sequence[str], /) -> list[Scores]:
        rows = teacher_scores(self._folder, batch).tolist()
        return [dict(zip(KINDS, row, strict=True)) for row in rows]


def load_risk(
    spec: str, label: str | None = None, threshold: float | None = None, *, device: str = "cpu"
) -> Risk:
    """The risk that a text check sees.

    spec: pack, kind:argument, or "teacher:folder" for the six-label toxicity teacher. label may be left out
    where there is one.

    Raises ValueError for an image check and an unknown label.
    """
    kind, _, folder = spec.partition(":")
    check: Any
    if kind == "teacher" and Path(folder).is_dir():
        check = TeacherCheck(Path(folder))
    else:
        check = load_check(str(Path(spec).resolve()) if Path(spec).is_dir() else spec, device=device)
    if check.modality != "text":
        raise ValueError(f"{spec!r} judges pictures; a text check is wanted here")
    known = tuple(getattr(check, "labels", ()))
    if label is None and len(known) == 1:
        label = known[0]
    if label is None or label not in known:
        said = "give a label" if label is None else f"check {check.name!r} has no label {label!r}"
        raise ValueError(f"{said}; known: {', '.join(known)}")
    return Risk(check, label, threshold)
