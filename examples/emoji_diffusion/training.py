"""What the three trainings of the example share: batches by step, the schedule, checkpoints, digests."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import torch


def step_rng(seed: int, step: int, rank: int = 0) -> tuple[random.Random, torch.Generator]:
    """The random numbers of one step: a resumed run draws what an unbroken one would have drawn."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:6], "big")
    return random.Random(number), torch.Generator().manual_seed(number)  # a batch, not a secret


def warmup_cosine(step: int, steps: int, *, warmup: int, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear from 0, then half a cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Tensors and numbers to one file, in its place only when whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, on the CPU, or None where there is nothing to resume."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, indented, with a final line end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
