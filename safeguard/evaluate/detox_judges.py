"""Judges of continuations: any text check of ours, one from the hub, or the six-label toxicity teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.types import Finding

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOXICITY_LABELS = ("toxicity", "toxic")
"""Labels that are taken where none is named, in this order."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A name for the column, and what gives the probabilities (text,) that texts are toxic."""

    name: str
    score: Callable[[Sequence[str]], NDArray[np.float32]] = field(repr=False)
    digest: str = ""

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities (text,). A text without a word is not toxic and is not shown to the judge."""
        out = np.zeros(len(texts), np.float32)
        said = [i for i, text in enumerate(texts) if text.strip()]
        if said:
            found = np.asarray(self.score([texts[i] for i in said]), np.float32)
            if found.shape != (len(said),):
                raise ValueError(
                    f"judge {self.name!r} gave scores of shape {found.shape} for {len(said)} texts"
                )
            out[said] = found
        return out


def load_judge(spec: str, *, device: str = "cpu") -> Judge:
    """The judge that a string names.

    "teacher:<folder>": the six-label teacher, label `toxic`. Else a check as policies name it (a pack, or
    kind:argument such as hub:unitary/toxic-bert), with "@<label>" behind it where it is not `toxicity` or
    `toxic`. Raises ValueError for a label that the check does not have or a check of pictures.
    """
    if spec.startswith("teacher:"):
        return teacher(Path(spec.removeprefix("teacher:")))
    from safeguard.checks.loading import load_check

    name, _, label = spec.partition("@")
    loaded: Any = load_check(str(Path(name).resolve()) if Path(name).is_dir() else name, device=device)
    if loaded.modality != "text":
        raise ValueError(f"{name!r} judges pictures; a judge of continuations reads text")
    known = tuple(getattr(loaded, "labels", ()))
    label = label or next((wanted for wanted in TOXICITY_LABELS if wanted in known), "")
    if label not in known:
        raise ValueError(f"{name!r} has no label {label or 'toxicity'!r}; known: {', '.join(known)}")
    return of_check(loaded, label)


def of_check(check: Any, label: str, *, batch: int = 256) -> Judge:
    """One label of a text check as a judge."""

    def score(texts: Sequence[str]) -> NDArray[np.float32]:
        rows: list[float] = []
        for at in range(0, len(texts), batch):
            for found in check(list(texts[at : at + batch])):
                scores = found.scores if isinstance(found, Finding) else found
                rows.append(float(scores[label]))
        return np.asarray(rows, np.float32)

    return Judge(f"{check.name}:{label}", score, str(getattr(check, "digest", "") or ""))


def teacher(folder: Path) -> Judge:
    """The small independent model that the data pack brings: its probability of `toxic`."""
    from safeguard.packs import file_digest
    from safeguard.train.toxicity_teacher import teacher_scores

    digest = file_digest(folder / "model.onnx")
    return Judge(folder.name, lambda texts: teacher_scores(folder, texts)[:, 0], digest)
