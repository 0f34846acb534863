"""Builds a data set in ToxiClean-IT's form without a hub: prompts, what they draw, and `keep` or a rewrite.

Every prompt is drawn, an image check and a text check say whether prompt and picture are safe, and a refiner
writes the answer where they are not. A rewrite is taken only when it is another text, close in meaning, safe
by the text check and, where asked for, by the pictures it draws. What lies between safe and unsafe is left
out. `metadata.jsonl` and `images/` are read by `datasets` (columns image, query, response), `read_toxiclean`
and `read_pairs`. Source of the form: IPR (EMNLP 2025), whose labels a multimodal language model wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, NonNegativeFloat, PositiveInt

from safeguard.errors import MissingExtra, RefinerError
from safeguard.files import write_whole
from safeguard.images import to_array
from safeguard.train.recipe import Recipe, versions
from safeguard.train.refiner.pairs import (
    METADATA,
    Pair,
    digest,
    is_pack,
    read_pack_benign,
    read_pack_pairs,
    read_reinforced,
)
from safeguard.train.refiner.picture_rewards import Draw, Drawings, Inappropriate
from safeguard.train.refiner.rewards import Risky, Similarity
from safeguard.train.refiner.runs import METRICS, open_run
from safeguard.train.text_data import read_jsonl
from safeguard.types import Refiner, RefineRequest

try:
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra("tqdm", "train") from exc

log = logging.getLogger(__name__)

IMAGES, BUILD, JOURNAL = "images", ".build", "journal.jsonl"
"""Folders of pictures, and of what is no data (hidden: `datasets` skips it); batches done so far."""
_PROMPT_NAMES = ("text", "query", "input", "prompt")


class ToxicleanConfig(Recipe):
    """How prompts become labelled pictures."""

    seed: int = 0
    images_per_prompt: PositiveInt = 1
    batch_size: PositiveInt = 8
    """Prompts at a time; they are drawn from the same noises."""
    inference_steps: PositiveInt = 20
    guidance: NonNegativeFloat = 7.0  # IPR and POSI
    unsafe_from: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Score of the image check from which a picture is unsafe."""
    safe_below: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Score under which it is safe; what lies between is left out."""
    minimum_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.6
    draw_rewrites: bool = True
    """Whether a rewrite must draw safe pictures too."""
    benign_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Of the prompts taken from the data pack."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    check: str = "text-guard-s"
    label: str = "t2i_prompt"
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None


@dataclass(frozen=True, slots=True)
class Labellers:
    """What draws, what judges pictures and texts, how close texts are, and what writes the answers.

    names: what is told of them in the records of the build, such as digests.
    """

    draw: Draw
    inappropriate: Inappropriate
    risk: Risky
    similarity: Similarity
    refiner: Refiner
    names: dict[str, str]


def read_texts(data: Path, config: ToxicleanConfig) -> list[Pair]:
    """Prompts of the data pack, a JSON-lines file (text, query, input or prompt) or a text file of lines.

    Of the pack: the prompts for reinforcement, and safe ones. Each text comes once. Raises ValueError where
    there is none, and naming the row that holds no prompt.
    """
    if is_pack(data):
        unsafe = read_reinforced(data) + read_pack_pairs(data, "train")
        benign = read_pack_benign(data, "train", hard=True)
        wanted = round(config.benign_share / (1 - config.benign_share) * len(unsafe))
        rng = random.Random(f"{config.seed}/prompts")
        pairs = unsafe + rng.sample(benign, min(wanted, len(benign)))
        rng.shuffle(pairs)
    elif data.name.removesuffix(".gz").endswith(".jsonl"):
        pairs = [
            _text(row, f"row {i} of {data.name}", data.name) for i, row in enumerate(read_jsonl(data), 1)
        ]
    else:
        pairs = [Pair(line, None, data.name) for line in data.read_text(encoding="utf-8").split("\n")]
    found = {pair.prompt.strip(): pair for pair in pairs if pair.prompt.strip()}
    if not found:
        raise ValueError(f"{data.name} holds no prompt")
    return [Pair(text, None, pair.source) for text, pair in found.items()]


def _text(row: Any, where: str, source: str) -> Pair:
    if isinstance(row, dict):
        for name in _PROMPT_NAMES:
            if isinstance(row.get(name), str):
                return Pair(row[name], None, str(row.get("source") or source))
    raise ValueError(f"{where} must have one of: {', '.join(_PROMPT_NAMES)}")


def build_toxiclean(
    config: ToxicleanConfig,
    prompts: Sequence[Pair],
    out: Path,
    labellers: Labellers,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the data set to `out` and returns its counts.

    Batches are recorded as they are done, and a build that was cut off goes on with the next one.
    Raises ValueError for thresholds the wrong way round, a folder that holds another build, and scores or
    pictures that are missing.
    """
    if config.safe_below > config.unsafe_from:
        raise ValueError(
            f"safe_below must be at most unsafe_from, got {config.safe_below} and {config.unsafe_from}"
        )
    facts = {
        "recipe": "refiner-data",
        "config": config.model_dump(mode="json"),
        "prompts": digest(prompts),
        "models": labellers.names,
    }
    open_run(out / BUILD, facts, steps=0, resume=resume)
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    journal = out / BUILD / JOURNAL
    done = _done(journal)
    starts = range(0, len(prompts), config.batch_size)
    with tqdm(
        total=len(prompts),
        initial=min(len(done) * config.batch_size, len(prompts)),
        disable=not progress,
        unit="prompt",
    ) as bar:
        for number in range(len(done), len(starts)):
            part = prompts[starts[number] : starts[number] + config.batch_size]
            batch = _label(config, part, number, out, labellers)
            _append(journal, batch)
            done.append(batch)
            bar.update(len(part))
    return _finish(config, out, done, facts)


def _done(journal: Path) -> list[dict[str, Any]]:
    """Batches of an earlier start; a last line that was cut off is taken away."""
    if not journal.is_file():
        return []
    whole = journal.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        os.truncate(journal, len(kept))
    return [json.loads(line) for line in kept.decode("utf-8").split("\n") if line]


def _append(journal: Path, batch: dict[str, Any]) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(batch, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _label(
    config: ToxicleanConfig, part: Sequence[Pair], number: int, out: Path, labellers: Labellers
) -> dict[str, Any]:
    """The rows of one batch of prompts, their pictures written, and how many were left out and why."""
    drawings = Drawings(labellers.draw, count=config.images_per_prompt, seed=config.seed)
    seeds = drawings.seeds(number)
    texts = [pair.prompt for pair in part]
    drawn = drawings.images(texts, seeds)
    flagged = [risk >= labellers.risk.threshold for risk in labellers.risk(texts)]
    scores = iter(_scores(labellers.inappropriate, [image for images in drawn for image in images]))
    found = [
        (pair, image, seed, bad, next(scores))
        for pair, images, bad in zip(part, drawn, flagged, strict=True)
        for image, seed in zip(images, seeds, strict=True)
    ]
    unsafe = [i for i, (_, _, _, bad, score) in enumerate(found) if bad or score >= config.unsafe_from]
    requests = [
        RefineRequest(p.prompt, ("unsafe",), (), image, 1, p.prompt, (image,))
        for p, image, *_ in (found[i] for i in unsafe)
    ]
    answers = dict(zip(unsafe, _rewrites(config, requests, drawings, seeds, labellers), strict=True))
    rows, dropped = [], Counter[str]()
    for i, (pair, image, seed, bad, score) in enumerate(found):
        answer, why = answers.get(i, ("keep", "" if score < config.safe_below else "unsure"))
        if why:
            dropped[why] += 1
            continue
        name = f"{IMAGES}/{number * config.batch_size * config.images_per_prompt + i:08d}.png"
        rows.append(
            {
                "file_name": name,
                "query": pair.prompt,
                "response": answer,
                "source": pair.source,
                "split": _split(config, pair.prompt),
                "seed": seed,
                "image_risk": round(score, 6),
                "flagged": bad,
                "sha256": _write(out / name, image),
            }
        )
    return {"rows": rows, "dropped": dict(dropped)}


def _rewrites(
    config: ToxicleanConfig,
    requests: Sequence[RefineRequest],
    drawings: Drawings,
    seeds: Sequence[int],
    labellers: Labellers,
) -> Iterator[tuple[str, str]]:
    """For each request the rewrite, and why it is not taken, empty where it is."""
    if not requests:
        return iter(())
    texts = labellers.refiner(list(requests))
    if isinstance(texts, str) or len(texts) != len(requests):
        raise RefinerError(f"refiner {labellers.refiner.name!r} gave {len(texts)} texts for {len(requests)}")
    prompts = [request.prompt for request in requests]
    whys = [
        "" if text.strip() and text.strip().lower() not in (prompt.strip().lower(), "keep") else "unchanged"
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    _refuse(
        whys,
        "far",
        lambda at: [
            not near >= config.minimum_similarity
            for near in labellers.similarity([prompts[i] for i in at], [texts[i] for i in at])
        ],
    )
    _refuse(
        whys,
        "flagged",
        lambda at: [not risk < labellers.risk.threshold for risk in labellers.risk([texts[i] for i in at])],
    )
    if config.draw_rewrites:
        _refuse(
            whys,
            "drawn_unsafe",
            lambda at: [
                not max(_scores(labellers.inappropriate, images)) < config.unsafe_from
                for images in drawings.images([texts[i] for i in at], seeds)
            ],
        )
    return zip((text.strip() for text in texts), whys, strict=True)


def _refuse(whys: list[str], why: str, judge: Callable[[list[int]], list[bool]]) -> None:
    """Notes `why` for those of the texts still taken that `judge`, given their places, refuses."""
    at = [i for i, found in enumerate(whys) if not found]
    for i, refused in zip(at, judge(at) if at else [], strict=True):
        whys[i] = why if refused else ""


def _scores(inappropriate: Inappropriate, images: Sequence[Any]) -> list[float]:
    scores = [float(score) for score in inappropriate(images)]
    if len(scores) != len(images) or not all(0 <= score <= 1 for score in scores):
        raise ValueError(
            f"the image check must give {len(images)} scores in [0, 1], got {len(scores)} values"
        )
    return scores


def _split(config: ToxicleanConfig, prompt: str) -> str:
    """By the text alone: a prompt never is in both."""
    share = int(hashlib.sha256(f"{config.seed}/{prompt}".encode()).hexdigest()[:8], 16) / 16**8
    return "validation" if share < config.validation_share else "train"


def _write(path: Path, image: Any) -> str:
    """Writes a picture as PNG; returns the SHA-256 of the file."""
    Image.fromarray(to_array(image)).save(path, format="PNG")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _finish(
    config: ToxicleanConfig, out: Path, done: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    rows = [row for batch in done for row in batch["rows"]]
    if not rows:
        raise ValueError("no prompt gave a row; look at the counts in the journal and at the thresholds")
    dropped = sum((Counter(batch["dropped"]) for batch in done), Counter[str]())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    kept = sum(row["response"] == "keep" for row in rows)
    measured = {
        "rows": len(rows),
        "kept": kept,
        "rewritten": len(rows) - kept,
        "dropped": dict(sorted(dropped.items())),
        "sources": dict(sorted(Counter(row["source"] for row in rows).items())),
        "metadata_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "prompts_digest": facts["prompts"],
        "models": facts["models"],
        "seed": config.seed,
        "versions": versions("torch", "transformers", "diffusers", "pillow"),
    }
    write_whole(out / METADATA, text)
    write_whole(out / "README.md", _card(measured))
    write_whole(out / BUILD / METRICS, json.dumps(measured, indent=1, sort_keys=True, allow_nan=False) + "\n")
    log.info("data set built: rows=%d kept=%d", len(rows), kept)
    return measured


def _card(measured: dict[str, Any]) -> str:
    models = "\n".join(f"| {name} | {value} |" for name, value in sorted(measured["models"].items()))
    sources = "\n".join(f"| {name} | {count} |" for name, count in measured["sources"].items())
    left = ", ".join(f"{why} {count}" for why, count in measured["dropped"].items()) or "nothing"
    return (
        "# Prompts, pictures, and what to answer\n\n"
        "In the form of ToxiClean-IT: `image`, `query`, `response` (`keep`, or the rewritten prompt). "
        "Labels were written by models, not by people: they are training data, no test set. Prompts and "
        "pictures may be offensive.\n\n"
        f"{measured['rows']} rows, of which {measured['kept']} keep their prompt. Left out: {left}.\n\n"
        f"| made with | |\n| --- | --- |\n{models}\n\n"
        f"| source of prompts | rows |\n| --- | --- |\n{sources}\n"
    )
