"""Labelled pictures: a folder, a file of labels, and the parts that train, choose and test a picture head."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from safeguard.packs import canonical_digest, file_digest

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
_NAMES: dict[str, Part] = {
    "": "train",
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "held_out": "test",
    "public_test": "test",
}


@dataclass(frozen=True, slots=True)
class LabelledPicture:
    """One picture. group: what may not be in two parts, such as all drawings of one thing."""

    path: Path = field(repr=False)
    name: str
    unsafe: bool
    part: Part
    group: str = ""
    category: str = ""


@dataclass(frozen=True, slots=True)
class PictureSet:
    """Pictures in their parts, of which no two parts share a file's content or a group.

    duplicates: how many were left out because another part has the same file. digest: of names, labels, parts
    and contents.
    """

    pictures: tuple[LabelledPicture, ...]
    duplicates: int
    digest: str

    def part(self, part: Part) -> list[LabelledPicture]:
        """The pictures of one part, in the order of the file."""
        return [picture for picture in self.pictures if picture.part == part]

    def counts(self) -> dict[str, dict[str, int]]:
        """Part -> how many pictures are inappropriate and harmless."""
        unsafe = {part: sum(p.unsafe for p in self.part(part)) for part in PARTS}
        return {
            part: {"inappropriate": unsafe[part], "harmless": len(self.part(part)) - unsafe[part]}
            for part in PARTS
        }


def read_pictures(
    folder: Path,
    labels: Path,
    *,
    harmless_rating: float = 3.5,
    inappropriate_rating: float = 2.5,
    validation_fraction: float = 0.15,
    seed: int = 0,
) -> PictureSet:
    """The pictures that a CSV or JSON-lines file names, in their parts.

    Columns: file (relative to the folder), label (0 or 1) or rating (above harmless_rating is 0, below
    inappropriate_rating is 1, between them left out: SMID's moral rating), and where wanted split (train,
    validation, test), group and category. Without validation rows a share of the training groups becomes
    validation, drawn by the seed. A picture whose file stands in a later part too is left out.

    Raises ValueError naming the row that says something else, FileNotFoundError for a picture that is not
    there, ValueError for a group in two parts.
    """
    rate = _rating(harmless_rating, inappropriate_rating)
    found = [picture for picture in (_picture(folder, *row, rate) for row in _rows(labels)) if picture]
    if not found:
        raise ValueError(f"{labels.name} names no picture")
    if not any(picture.part == "validation" for picture in found):
        found = _with_validation(found, validation_fraction, seed)
    _refuse_shared_groups(found)
    kept, contents = _without_duplicates(found)
    facts = [[p.name, int(p.unsafe), p.part, content] for p, content in zip(kept, contents, strict=True)]
    return PictureSet(tuple(kept), len(found) - len(kept), canonical_digest(facts))


def _rows(labels: Path) -> Iterable[tuple[dict[str, Any], str]]:
    """Rows of the file, each with the words that name its place."""
    if labels.suffix.lower() == ".csv":
        with labels.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                yield {key: value for key, value in row.items() if key}, f"line {number} of {labels.name}"
        return
    with labels.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"line {number} of {labels.name}"
                try:
                    row = json.loads(line)
                except ValueError as exc:
                    raise ValueError(f"{where} is no JSON: {exc}") from exc
                if not isinstance(row, dict):
                    raise ValueError(f"{where} must be an object with file and label")
                yield row, where


def _rating(harmless: float, inappropriate: float) -> Callable[[float], bool | None]:
    if not inappropriate <= harmless:
        raise ValueError(
            f"inappropriate_rating must be at most harmless_rating, got {inappropriate} and {harmless}"
        )
    return lambda value: True if value < inappropriate else False if value > harmless else None


def _picture(
    folder: Path, row: dict[str, Any], where: str, rate: Callable[[float], bool | None]
) -> LabelledPicture | None:
    name = row.get("file")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} must have file, the place of a picture in the folder")
    unsafe = _label(row, where, rate)
    if unsafe is None:
        return None
    split = str(row.get("split") or "").strip().lower()
    if split not in _NAMES:
        raise ValueError(f"{where}: split must be train, validation or test, got {split!r}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise ValueError(f"{where}: file must be a relative path inside the folder, got {name!r}")
    path = folder / relative
    if not path.is_file():
        raise FileNotFoundError(2, f"no such picture ({where})", str(path))
    group, category = (str(row.get(key) or "") for key in ("group", "category"))
    return LabelledPicture(path, name, unsafe, _NAMES[split], group, category)


def _label(row: dict[str, Any], where: str, rate: Callable[[float], bool | None]) -> bool | None:
    """Whether a row is inappropriate; None for a rating between the two thresholds."""
    label, rating = row.get("label"), row.get("rating")
    if label not in (None, ""):
        if isinstance(label, bool | int) and label in (0, 1):
            return bool(label)
        if str(label).strip() in ("0", "1"):
            return str(label).strip() == "1"
        raise ValueError(f"{where}: label must be 0 or 1, got {label!r}")
    try:
        value = float(str(rating))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} must have label 0 or 1, or a rating")
    return rate(value)


def _with_validation(pictures: list[LabelledPicture], fraction: float, seed: int) -> list[LabelledPicture]:
    """Some training groups as validation, the same share of both labels; pictures without one stand alone."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        if picture.part == "train":
            groups[picture.group or f"\0{picture.name}"].append(i)
    chosen: set[int] = set()
    for label in (False, True):
        names = sorted(n for n, at in groups.items() if any(pictures[i].unsafe for i in at) == label)
        random.Random(f"{seed}/validation/{int(label)}").shuffle(names)
        wanted = fraction * sum(len(groups[n]) for n in names)
        taken = 0
        for name in names[:-1]:  # one group at least stays for training
            if taken >= wanted:
                break
            chosen.update(groups[name])
            taken += len(groups[name])
    return [replace(p, part="validation") if i in chosen else p for i, p in enumerate(pictures)]


def _refuse_shared_groups(pictures: Sequence[LabelledPicture]) -> None:
    parts: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        if picture.group:
            parts[picture.group].add(picture.part)
    shared = sorted(group for group, found in parts.items() if len(found) > 1)
    if shared:
        raise ValueError(
            f"{len(shared)} groups stand in more than one split, such as {shared[0]!r}; "
            "keep each in one, or the test says nothing"
        )


def _without_duplicates(
    pictures: Sequence[LabelledPicture],
) -> tuple[list[LabelledPicture], list[str]]:
    """Those whose file stands in no later part, and the digests of their files."""
    contents = [file_digest(picture.path) for picture in pictures]
    last: Counter[str] = Counter()
    for picture, content in zip(pictures, contents, strict=True):
        last[content] = max(last[content], PARTS.index(picture.part))
    at = [i for i, p in enumerate(pictures) if PARTS.index(p.part) == last[contents[i]]]
    return [pictures[i] for i in at], [contents[i] for i in at]


def digest_of_arrays(arrays: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 over named arrays, in order: name, type, shape and bytes."""
    found = hashlib.sha256()
    for name, array in arrays:
        found.update(f"{name}:{array.dtype}:{array.shape};".encode())
        found.update(array.tobytes())
    return found.hexdigest()
