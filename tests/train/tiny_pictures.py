"""Folders of tiny labelled pictures: red ones are inappropriate, blue ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PARTS = ("train",) * 12 + ("validation",) * 6 + ("test",) * 6


def picture(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """16 x 16 pixels of one colour with a little noise, so that no two files are the same."""
    noise = np.random.default_rng(seed).integers(0, 40, (16, 16, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pictures(folder: Path, parts: tuple[str, ...] = PARTS) -> Path:
    """Half of the pictures of each part red, in a folder with its labels.jsonl."""
    rows: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        red = i % 2
        name = f"pictures/{i:02}.png"
        picture(folder / name, (180, 40, 40) if red else (40, 40, 180), seed=i)
        rows.append({"file": name, "label": red, "split": part, "category": "red" if red else "blue"})
    write_labels(folder, rows)
    return folder


def write_labels(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """labels.jsonl in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
