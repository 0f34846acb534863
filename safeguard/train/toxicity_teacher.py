"""The six kinds of toxicity where no human said which: probabilities of a small teacher, computed once."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from safeguard.errors import MissingExtra
from safeguard.train.text_data import HEADS, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

KINDS = HEADS["toxicity"][1:]
HATE_ONLY = frozenset({"dghs_v0.1", "hatemojibuild", "toxigen_annotated"})
"""Sources whose harmless rows may be insults, since their label means hatred of groups."""
ABUSE_FROM = 0.5
"""Probability from which the teacher's insult or threat is believed."""
_TOXICITY = frozenset(HEADS["toxicity"])
_LENGTH = 100  # tokens, the teacher's input width
_STRIP = re.compile(r"[!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\t\n]")  # Keras' Tokenizer filters


def teacher_ids(texts: Sequence[str], vocabulary: dict[str, int]) -> NDArray[np.int64]:
    """Word ids (text, 100): unknown words left out, padded and cut in front, as Keras does."""
    ids = np.zeros((len(texts), _LENGTH), np.int64)
    for i, text in enumerate(texts):
        words = [vocabulary[w] for w in _STRIP.sub(" ", text.lower()).split() if w in vocabulary][-_LENGTH:]
        if words:
            ids[i, -len(words) :] = words
    return ids


def teacher_scores(folder: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """Probabilities (text, 6) in the order toxic, severe_toxic, obscene, threat, insult, identity_hate."""
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingExtra("onnxruntime", "onnx") from exc
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = teacher_ids(texts, vocabulary)
    if not len(ids):
        return np.zeros((0, len(KINDS)), np.float32)
    parts = [session.run(["probs"], {"input_ids": ids[i : i + 256]})[0] for i in range(0, len(ids), 256)]
    return np.concatenate(parts).astype(np.float32)


def add_teacher(rows: Sequence[Row], folder: Path, *, cache: Path | None = None) -> list[Row]:
    """The rows, with the teacher's six probabilities where a toxic text says nothing of them.

    A source whose label means hatred of groups calls insults and threats to single people harmless; where the
    teacher finds one there, the row no longer speaks of toxicity, only of `identity_hate`. cache: a file that
    keeps the scores for the next time.
    """
    wanted = [i for i, row in enumerate(rows) if row.targets.get("toxicity", 0.0) >= 0.5 or _hate_only(row)]
    if cache is not None and cache.is_file():
        scores = np.load(cache, allow_pickle=False)["scores"]
    else:
        scores = teacher_scores(folder, [rows[i].text for i in wanted])
        if cache is not None:
            np.savez(cache, scores=scores)
    if cache is not None and len(scores) != len(wanted):
        raise ValueError(f"{cache.name} holds {len(scores)} scores for {len(wanted)} texts; delete it")
    out = list(rows)
    for i, row_scores in zip(wanted, scores, strict=True):
        known = {kind: float(score) for kind, score in zip(KINDS, row_scores, strict=True)}
        if not _hate_only(rows[i]):
            out[i] = replace(rows[i], targets={**known, **rows[i].targets})
        elif max(known["insult"], known["threat"]) >= ABUSE_FROM:
            kept = {k: v for k, v in rows[i].targets.items() if k not in _TOXICITY or k == "identity_hate"}
            out[i] = replace(rows[i], targets=kept)
    return out


def _hate_only(row: Row) -> bool:
    return row.source in HATE_ONLY and row.targets.get("toxicity", 1.0) < 0.5
