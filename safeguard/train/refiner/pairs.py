"""Pairs (prompt, what it should become) for the refiner: read, filtered, mixed.

Reads the data pack, JSON-lines files with one of four namings of their columns, and ToxiClean-IT as it lies
on the hub. A target of None means that the prompt stays as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra
from safeguard.train.text_data import hard_rows, read_jsonl, sha256_of

PAIRS, PROMPTS, REINFORCED, DETOX, TEST = (
    "t2i_refine_pairs.jsonl.gz",
    "t2i_prompts.jsonl.gz",
    "t2i_rl_prompts.jsonl.gz",
    "detox_pairs.jsonl.gz",
    "t2i_public_test_posi300.jsonl.gz",
)
"""Files of the data pack."""
METADATA = "metadata.jsonl"
"""File of a folder in ToxiClean-IT's form, as `datasets` reads folders of pictures."""

_NAMES = (("text", "target"), ("query", "response"), ("input", "output"), ("prompt", "rewrite"))
"""Columns of prompt and rewrite: the data pack, ToxiClean-IT, POSI, ours."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and its safe rewrite; target None where it stays as it is. image: what it drew, if known."""

    prompt: str = field(repr=False)
    target: str | None = field(repr=False)
    source: str = ""
    split: str = "train"
    image: Any = field(default=None, repr=False)


def read_pack_pairs(folder: Path, split: str, *, detox: bool = False) -> list[Pair]:
    """The data pack's pairs of one split; detox: sentences (toxic, neutral) as well.

    Pairs whose target says the same as the prompt are left out: an unsafe prompt is no example of "keep".
    """
    files = [PAIRS, *([DETOX] if detox else [])]
    rows = [row for name in files for row in read_jsonl(folder / name) if row["split"] == split]
    pairs = (Pair(row["text"], row["target"], row["source"], split) for row in rows)
    return [pair for pair in pairs if _usable(pair)]


def read_pack_benign(folder: Path, split: str, *, hard: bool = False) -> list[Pair]:
    """The data pack's safe image prompts of one split, and with `hard` our own look-alikes: all stay."""
    rows = read_jsonl(folder / PROMPTS)
    pairs = [
        Pair(row["text"], None, row["source"], split)
        for row in rows
        if row["split"] == split and row["label"] == 0 and row["text"].strip()
    ]
    if hard:
        pairs += [
            Pair(row.text, None, row.source, split)
            for row in hard_rows("hard_text.toml" if split == "train" else "hard_text_validation.toml")
            if row.targets.get("t2i_prompt") == 0
        ]
    return pairs


def read_reinforced(folder: Path, split: str = "train") -> list[Pair]:
    """The data pack's prompts for reinforcement, safe and unsafe unmarked; they have no target."""
    rows = read_jsonl(folder / REINFORCED)
    return [Pair(r["text"], None, r["source"], split) for r in rows if r["split"] == split]


def read_pairs(path: Path, *, keep: str = "keep", source: str = "") -> list[Pair]:
    """Pairs of a JSON-lines file (gzipped or not) or a JSON list.

    Columns: text and target, query and response (ToxiClean-IT), input and output (POSI), prompt and rewrite.
    A picture is a path, beside the file where it is relative, in `image` or `file_name`. A rewrite that is
    the keep word, in any case, null, or the prompt itself, means that the prompt stays.
    Raises ValueError naming the row that has none of them.
    """
    raw = path.read_bytes()
    content = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    if content.lstrip().startswith("["):
        rows = json.loads(content)
    else:
        rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    pairs = [
        _pair(row, f"row {i} of {path.name}", keep, source or path.name) for i, row in enumerate(rows, 1)
    ]
    beside = path.parent
    return [replace(p, image=str(beside / p.image)) if isinstance(p.image, str) else p for p in pairs]


def is_pack(data: Path) -> bool:
    """Whether a path is a folder with the data pack."""
    return data.is_dir() and any((data / name).is_file() for name in (PAIRS, PROMPTS, REINFORCED))


def read_rows(data: Path) -> list[Pair]:
    """Pairs of a file, or of a folder in ToxiClean-IT's form."""
    return read_toxiclean(str(data)) if data.is_dir() else read_pairs(data)


def read_toxiclean(name: str, *, split: str = "train", keep: str = "keep") -> list[Pair]:
    """ToxiClean-IT (`KEVIN04087/ToxiClean-IT`) or a data set of its form: image, query, response.

    name: on the hub, or a folder that `datasets` can read. Images are handed on as stored, undecoded.
    """
    try:
        import datasets
    except ImportError as exc:
        raise MissingExtra("datasets", extra="train") from exc
    table = datasets.load_dataset(name, split=split)
    if isinstance(table.features.get("image"), datasets.Image):
        table = table.cast_column("image", datasets.Image(decode=False))
    source = Path(name).name if Path(name).is_dir() else name
    return [_pair(row, f"row {i} of {source}", keep, source) for i, row in enumerate(table, 1)]


def _pair(row: Any, where: str, keep: str, source: str) -> Pair:
    if isinstance(row, dict):
        for prompt, rewrite in _NAMES:
            if isinstance(row.get(prompt), str) and isinstance(row.get(rewrite, 0), str | None):
                target = row[rewrite]
                stays = target is None or target.strip().lower() in (keep, row[prompt].strip().lower())
                return Pair(
                    row[prompt],
                    None if stays else target,
                    str(row.get("source") or source),
                    str(row.get("split") or "train"),
                    row.get("image", row.get("file_name")),
                )
    known = ", ".join(f"{prompt} and {rewrite}" for prompt, rewrite in _NAMES)
    raise ValueError(f"{where} must have one of: {known}")


def _usable(pair: Pair) -> bool:
    target = (pair.target or "").strip()
    return bool(pair.prompt.strip() and target) and target.lower() != pair.prompt.strip().lower()


def filter_pairs(
    pairs: Sequence[Pair],
    *,
    similarity: Callable[[Sequence[str], Sequence[str]], list[float]] | None = None,
    minimum: float = 0.0,
    risk: Callable[[Sequence[str]], Sequence[float]] | None = None,
    maximum: float = 1.0,
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs whose rewrite is close enough and safe enough, and how many were left out for which reason.

    similarity: of prompts and rewrites, at least `minimum`. risk: of rewrites, below `maximum`. Both skip
    pairs that stay. A rewrite that tells another story teaches to change the subject, and one that is itself
    flagged teaches nothing: both are common in data written by a language model.
    """
    at = [i for i, pair in enumerate(pairs) if pair.target is not None]
    out: dict[int, str] = {}
    if similarity is not None and at:
        close = similarity([pairs[i].prompt for i in at], [str(pairs[i].target) for i in at])
        out.update({i: "far" for i, value in zip(at, close, strict=True) if not value >= minimum})
        at = [i for i in at if i not in out]
    if risk is not None and at:
        risks = risk([str(pairs[i].target) for i in at])
        out.update({i: "flagged" for i, value in zip(at, risks, strict=True) if not value < maximum})
    counts = {why: sum(value == why for value in out.values()) for why in ("far", "flagged")}
    return [pair for i, pair in enumerate(pairs) if i not in out], counts


def mix(
    rewritten: Sequence[Pair],
    kept: Sequence[Pair],
    *,
    keep_share: float,
    repeats: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[Pair]:
    """One shuffled list in which `keep_share` of the pairs stay as they are, as far as there are enough.

    repeats: source -> how often its rows come, 1 where absent; a fraction draws that share of them.
    """
    rng = random.Random(f"{seed}/mix")
    rewritten, kept = (_repeated(rows, repeats or {}, rng) for rows in (rewritten, kept))
    wanted = round(keep_share / (1 - keep_share) * len(rewritten))
    chosen = rng.sample(kept, min(wanted, len(kept)))
    mixed = [*rewritten, *chosen]
    rng.shuffle(mixed)
    return mixed


def restyled(pairs: Sequence[Pair], share: float, *, seed: int = 0) -> list[Pair]:
    """The pairs, a share of them in the other style of writing, at random.

    Rewritten prompts of the public data are sentences with a capital and a full stop, prompts that stay are
    captions without: a model learns to tell them by that. So sentences become captions (prompt and rewrite
    alike), and captions sentences. share: probability for each pair, 0 to 1.
    """
    rng = random.Random(f"{seed}/style")
    return [_other_style(pair) if rng.random() < share else pair for pair in pairs]


def _other_style(pair: Pair) -> Pair:
    caption = pair.prompt[:1].isupper() or pair.prompt.endswith(".")
    change = _as_caption if caption else _as_sentence
    target = None if pair.target is None else change(pair.target)
    return replace(pair, prompt=change(pair.prompt), target=target)


def _as_caption(text: str) -> str:
    """Without a full stop; the first letter small where the word is no abbreviation or "I"."""
    word = text.split(" ", 1)[0]
    text = text[:1].lower() + text[1:] if word[1:].islower() or word == "A" else text
    return text.removesuffix(".")


def _as_sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?" else ".")


def _repeated(pairs: Iterable[Pair], repeats: Mapping[str, float], rng: random.Random) -> list[Pair]:
    out: list[Pair] = []
    for pair in pairs:
        times = repeats.get(pair.source, 1.0)
        out += [pair] * (int(times) + (rng.random() < times % 1))
    return out


def digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 of prompts and targets in order, 64 hex digits."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(json.dumps([pair.prompt, pair.target]).encode())
    return found.hexdigest()


def file_digests(data: Path) -> dict[str, str]:
    """File name -> SHA-256 of the pack's files that the refiner reads, or of the one file."""
    paths = [data] if data.is_file() else [data / name for name in (PAIRS, PROMPTS, REINFORCED, METADATA)]
    return {path.name: sha256_of(path) for path in paths if path.is_file()}
