"""Texts to train on: rows of the user's JSON-lines files, chosen by source, label, split and group."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeguard.train.text_data import read_jsonl, sha256_of
from safeguard.train.unidetox.config import Corpus

PUBLISHED = "lm_unidetox_distilled.jsonl.gz"
"""File of the data pack with the 640 texts that were distilled from GPT-2 XL and published."""


def toxic_texts(corpus: Corpus, data: Path) -> tuple[list[str], dict[str, str]]:
    """The chosen texts, each once, in the order of the files, and the SHA-256 of every file.

    Raises ValueError where no row is left, FileNotFoundError for a missing file.
    """
    texts: dict[str, None] = {}
    digests: dict[str, str] = {}
    for name in corpus.files:
        path = _file(name, data)
        digests[path.name] = sha256_of(path)
        for row in read_jsonl(path):
            if _is_chosen(row, corpus):
                texts[_text_of(row, path)] = None
    kept = list(texts)[: corpus.limit]
    if not kept:
        raise ValueError(f"no text of {', '.join(corpus.files)} is chosen by the corpus settings")
    return kept, digests


def _is_chosen(row: dict[str, Any], corpus: Corpus) -> bool:
    if corpus.source is not None and row.get("source") != corpus.source:
        return False
    if corpus.label is not None and row.get("label") != corpus.label:
        return False
    if corpus.splits is not None and row.get("split") not in corpus.splits:
        return False
    return set(str(row.get("category", "")).split("|")).isdisjoint(corpus.without)


def read_texts(path: Path) -> list[str]:
    """Texts of a JSON-lines file (column `text`) or of the published CSV file (column `Text`)."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and "Text" not in rows[0]:
            raise ValueError(f"{path.name} must have a column 'Text'; it has {', '.join(rows[0])}")
        return [row["Text"] for row in rows]
    return [_text_of(row, path) for row in read_jsonl(path)]


def texts_file(name: str, data: Path, own: Path) -> Path:
    """The file behind "own", "published" or a name inside the data folder or a path."""
    if name == "own":
        if not own.is_file():
            raise FileNotFoundError(2, "no texts yet; run the stage distil first", str(own))
        return own
    return _file(PUBLISHED if name == "published" else name, data)


def digest_of(text: str) -> str:
    """SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order, 64 hex digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _file(name: str, data: Path) -> Path:
    for path in (data / name, Path(name)):
        if path.is_file():
            return path
    raise FileNotFoundError(2, "no such file, and none in the data folder", name)


def _text_of(row: Any, path: Path) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"every row of {path.name} must be an object with a string 'text'")
    return text
