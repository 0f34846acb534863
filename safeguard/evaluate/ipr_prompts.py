"""Prompts of an image-level evaluation, and the protocols that were published for them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safeguard.train.refiner.pairs import TEST
from safeguard.train.text_data import read_jsonl

Loop = Literal["guard", "published"]
Rule = Literal["IP_posi", "IP_i2p"]


@dataclass(frozen=True, slots=True)
class IprPrompt:
    """One prompt. seed, guidance: its own, where a protocol draws each prompt with those of its row."""

    text: str = field(repr=False)
    category: str = ""
    seed: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Protocol:
    """What decides the pictures and how they are counted.

    images: of each prompt. rounds: after round 0. steps: of the sampler. negative: "safety" is the concept of
    Safe Latent Diffusion as a negative prompt of every generation. own: seed and guidance of each row.
    seeds: "shared" gives every prompt the same noise. rule: which published count of inappropriate pictures
    this protocol has.
    """

    name: str
    loop: Loop
    rounds: int
    images: int
    steps: int
    guidance: float
    negative: str = ""
    own: bool = False
    seeds: Literal["own", "shared"] = "own"
    rule: Rule | None = None

    def with_changes(self, **changes: Any) -> Protocol:
        """The protocol with what is not None in place of its own. Raises ValueError for counts too small."""
        made = replace(self, **{key: value for key, value in changes.items() if value is not None})
        if made.images < 1 or made.rounds < 0 or made.steps < 1:
            raise ValueError(
                "images and steps must be 1 or more, rounds 0 or more, "
                f"got {made.images}, {made.steps} and {made.rounds}"
            )
        return made


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("guard", "guard", rounds=3, images=4, steps=20, guidance=7.0),
        Protocol(
            "posi", "published", rounds=1, images=10, steps=50, guidance=7.0, seeds="shared", rule="IP_posi"
        ),
        Protocol(
            "ipr",
            "published",
            rounds=3,
            images=10,
            steps=50,
            guidance=7.0,
            negative="safety",
            rule="IP_posi",
        ),
        Protocol("i2p", "published", rounds=0, images=10, steps=50, guidance=7.5, own=True, rule="IP_i2p"),
    )
}
"""guard: ours. posi: one refinement of the text. ipr: three rounds that look at the picture; the released
code has the negative prompt, so report both arms. i2p: the pipeline as it is, or refined with more rounds;
the authors draw twice five pictures from one generator, here each picture has a seed of its own. Steps are
those of the Stable Diffusion pipelines, which the papers' code leaves alone."""


def read_prompts(path: Path, limit: int | None = None) -> list[IprPrompt]:
    """Prompts of a JSON-lines file (gzipped or not) or a CSV; of a data pack the 300 of POSI and IPR.

    Columns: text, prompt or input; category or categories; seed or sd_seed; guidance or sd_guidance_scale;
    the last two may stand in `meta`. limit: so many, spread evenly over the file, whose order is often that
    of the categories. Raises ValueError naming the row without a text, FileNotFoundError for no such file.
    """
    path = path / TEST if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(2, "no such file of prompts", str(path))
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        rows = read_jsonl(path)
    found = [_prompt(row, f"row {number} of {path.name}") for number, row in enumerate(rows, 1)]
    if not found:
        raise ValueError(f"{path.name} has no prompt")
    if limit is not None and limit < len(found):
        return [found[i * len(found) // limit] for i in range(limit)]
    return found


def _prompt(row: Any, where: str) -> IprPrompt:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with text or prompt")
    text = next((row[key] for key in ("text", "prompt", "input") if row.get(key)), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} must have text, prompt or input")
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    both = {**meta, **row}
    try:
        seed, guidance = _first(both, "seed", "sd_seed"), _first(both, "guidance", "sd_guidance_scale")
        return IprPrompt(
            text,
            str(row.get("category") or row.get("categories") or ""),
            None if seed is None else int(float(seed)),
            None if guidance is None else float(guidance),
        )
    except (TypeError, ValueError) as exc:
        raise ValueError(f"{where}: seed and guidance must be numbers") from exc


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)
