"""Harmless prompts that people wrote for language models, from evaluation packages on PyPI: hard negatives.

`pip download --no-deps evals==3.0.1.post1 inspect-evals==0.26.0` fetches the wheels; nothing of them is part
of this package. A wheel is only read as an archive: nothing in it is imported or run. Sources: OpenAI Evals
(MIT; system messages and questions of some 400 tasks) and, from Inspect Evals, WritingBench (Apache-2.0;
long writing tasks) and SWE-Lancer (MIT; issues of a real project).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safeguard.train.text_data import Row, clean

_REGISTRY = "evals/registry/data/"
_WRITING = "inspect_evals/writingbench/benchmark_all.jsonl"
_ISSUES = "inspect_evals/swe_lancer/data/all_swelancer_tasks.csv"
_NOT_HARMLESS = re.compile(
    r"inject|override|jailbreak|hate|toxic|naughty|hshd|security|cyber|reverse-shell|human-safety|adultery|medication"
)
"""Tasks of OpenAI Evals that hold attacks, abuse or requests somebody could call harmful."""
_PER_TASK = 24
_MOST_CHARACTERS = 3000
_VALIDATION_SHARE = 0.15


def prompt_rows(wheels: Sequence[Path], split: str = "train", *, seed: int = 0) -> list[Row]:
    """Rows that are harmless for the heads of requests and jailbreaks; other heads learn nothing from them.

    split: "train" or "validation"; a whole task of OpenAI Evals is in one of them. Raises ValueError for a
    file that is not one of the wheels.
    """
    targets = {**clean("llm"), **clean("jailbreak")}
    return [
        Row(text, source, split, targets, 1.0, group)
        for wheel in wheels
        for source, group, text in _texts(wheel, seed)
        if (_in_validation(source, group) == (split == "validation")) and _english(text)
    ]


def _texts(wheel: Path, seed: int) -> Iterator[tuple[str, str, str]]:
    """(source, group, text) of one wheel."""
    if not wheel.is_file():
        raise FileNotFoundError(2, "no such wheel", str(wheel))
    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"{wheel.name} is no wheel; give the files that pip download wrote")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if any(name.startswith(_REGISTRY) for name in names):
            yield from _openai_evals(archive, seed)
        elif _WRITING in names:
            yield from _inspect_evals(archive, names)
        else:
            raise ValueError(f"{wheel.name} holds neither OpenAI Evals nor Inspect Evals with WritingBench")


def _openai_evals(archive: zipfile.ZipFile, seed: int) -> Iterator[tuple[str, str, str]]:
    by_task: dict[str, list[zipfile.ZipInfo]] = {}
    for info in archive.infolist():
        if info.filename.startswith(_REGISTRY) and info.filename.endswith(".jsonl") and info.file_size < 20e6:
            by_task.setdefault(info.filename.split("/")[3], []).append(info)
    for task, files in sorted(by_task.items()):
        if _NOT_HARMLESS.search(task.lower()):
            continue
        rng = random.Random(f"{seed}/{task}")
        texts: list[str] = []
        for info in files:
            lines = archive.read(info).decode("utf-8", "replace").splitlines()
            for line in rng.sample(lines, min(len(lines), _PER_TASK)):
                texts.extend(_messages(line))
        unique = sorted(set(texts))
        for text in rng.sample(unique, min(len(unique), _PER_TASK)):
            yield "openai_evals", task, text


def _messages(line: str) -> list[str]:
    """What the system and the user say in one sample; a prompt is both together, too."""
    try:
        sample = json.loads(line)
    except json.JSONDecodeError:  # a pointer of git-lfs
        return []
    given: Any = sample.get("input") if isinstance(sample, dict) else None
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        return []
    said = [m for m in given if isinstance(m, dict) and isinstance(m.get("content"), str)]
    parts = [m["content"] for m in said if m.get("role") != "assistant"]
    whole = ["\n\n".join(parts[:2])] if len(parts) > 1 else []
    return [*parts, *whole]


def _inspect_evals(archive: zipfile.ZipFile, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for line in archive.read(_WRITING).decode("utf-8").splitlines():
        sample = json.loads(line)
        yield "writingbench", str(sample["domain2"]), sample["query"]
    if _ISSUES in names:
        limit = csv.field_size_limit(10**8)
        try:
            for row in csv.DictReader(io.StringIO(archive.read(_ISSUES).decode("utf-8"))):
                yield "swe_lancer", str(row["question_id"]), str(row["description"])
        finally:
            csv.field_size_limit(limit)


def _in_validation(source: str, group: str) -> bool:
    digest = hashlib.sha256(f"{source}/{group}".encode()).digest()
    return digest[0] < 256 * _VALIDATION_SHARE


def _english(text: str) -> bool:
    """Whether nearly all is ASCII, with enough letters, and of a length that can be a prompt."""
    if len(text.strip()) < 12:
        return False
    head = text[:_MOST_CHARACTERS]
    plain = sum(c < "\x7f" for c in head) / len(head)
    return plain > 0.95 and sum(c.isalpha() for c in head) > 0.4 * len(head)
