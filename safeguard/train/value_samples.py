"""What a language model writes after prompts, and how a check scores it: the data of the value model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from safeguard.decoding.sampling import continued, end_tokens
from safeguard.errors import MissingExtra
from safeguard.train.recipe import Recipe
from safeguard.train.text_data import read_jsonl
from safeguard.types import Finding

try:
    import torch
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc


class SampleSettings(Recipe):
    """How continuations are drawn and scored."""

    prompts: PositiveInt = 10_000
    """At most so many, drawn at random where there are more."""
    prompt_tokens: PositiveInt = 20
    """Prompts are cut to so many tokens."""
    continuations: Annotated[int, Field(ge=2, le=1000)] = 25
    new_tokens: PositiveInt = 20
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompts_at_once: PositiveInt = 8
    check: str = "text-guard-s"
    """Pack or `kind:argument` of the check that scores continuations."""
    categories: Annotated[tuple[str, ...], Field(min_length=1)] = ("toxicity",)
    """The largest of these scores counts."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. number: of its prompt. prompt, next: tokens. score: 0 to 1, higher is worse."""

    number: int
    prompt: tuple[int, ...]
    next: tuple[int, ...]
    score: float


def read_prompts(path: Path, tokenizer: Any, settings: SampleSettings, seed: int) -> list[tuple[int, ...]]:
    """Prompts of a JSON-lines file (`text` or `prompt`), each once, cut to their first tokens.

    Raises ValueError for a file without any.
    """
    texts = [row.get("text", row.get("prompt")) for row in read_jsonl(path)]
    found = dict.fromkeys(
        tuple(tokenizer(text)["input_ids"][: settings.prompt_tokens])
        for text in texts
        if isinstance(text, str) and text.strip()
    )
    prompts = [ids for ids in found if ids]
    if not prompts:
        raise ValueError(f"{path.name} has no rows with a 'text' or a 'prompt'")
    random.Random(f"{seed}/prompts").shuffle(prompts)
    return prompts[: settings.prompts]


def kept(samples: Sequence[Sample]) -> list[Sample]:
    """Of each prompt the least and the most harmful sample."""
    by_prompt: dict[int, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.number, []).append(sample)
    return [pick(found, key=lambda s: s.score) for found in by_prompt.values() for pick in (min, max)]


def sample_all(
    model: Any,
    tokenizer: Any,
    check: Any,
    prompts: Sequence[tuple[int, ...]],
    settings: SampleSettings,
    seed: int,
    out: Path,
    *,
    progress: bool | None = None,
) -> list[Sample]:
    """All samples of all prompts, kept in samples.jsonl batch by batch.

    Those that are there are not drawn again. Raises ValueError for a file of other prompts or settings.
    """
    path = out / "samples.jsonl"
    told = json.dumps([settings.model_dump(mode="json"), seed, prompts], sort_keys=True)
    header = json.dumps({"settings": hashlib.sha256(told.encode()).hexdigest()})
    lines = _whole_lines(path)
    if lines and lines[0] != header:
        raise ValueError(f"{out.name}/{path.name} is of other prompts or settings; give a new folder")
    batches = [
        range(i, min(i + settings.prompts_at_once, len(prompts)))
        for i in range(0, len(prompts), settings.prompts_at_once)
    ]
    if len(lines) < 1 + len(batches):
        lines = lines or [header]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")  # without a torn last line
        disable = None if progress is None else not progress
        with path.open("a", encoding="utf-8") as file:
            for batch in tqdm(batches[len(lines) - 1 :], disable=disable, desc="sampling"):
                line = json.dumps(_draw(model, tokenizer, check, prompts, batch, settings, seed))
                file.write(line + "\n")
                file.flush()
                lines.append(line)
    rows = (row for line in lines[1:] for row in json.loads(line))
    return [Sample(n, prompts[n], tuple(ids), score) for n, ids, score in rows]


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _draw(
    model: Any,
    tokenizer: Any,
    check: Any,
    prompts: Sequence[tuple[int, ...]],
    batch: range,
    settings: SampleSettings,
    seed: int,
) -> list[tuple[int, list[int], float]]:
    """(number of the prompt, tokens, score) of one batch, which depends on its place alone."""
    width = max(len(prompts[n]) for n in batch)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompts[n])) + list(prompts[n]) for n in batch])
    mask = torch.tensor([[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in batch])
    made = continued(
        model,
        ids,
        mask,
        copies=settings.continuations,
        new_tokens=settings.new_tokens,
        pad=pad,
        generator=torch.Generator().manual_seed(seed * 1_000_003 + batch.start),
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    stops = set(end_tokens(model))
    taken = [_until(row, stops) for row in made.tolist()]
    texts = tokenizer.batch_decode(taken, skip_special_tokens=True)
    scores = _scores(check(texts), settings.categories)
    if len(scores) != len(taken):
        raise ValueError(f"check {check.name!r} gave {len(scores)} scores for {len(taken)} texts")
    numbers = [n for n in batch for _ in range(settings.continuations)]
    return [(n, t, s) for n, t, s in zip(numbers, taken, scores, strict=True) if t]


def _until(ids: list[int], stops: set[Any]) -> list[int]:
    """Tokens up to the first that ends the text, with it."""
    for i, token in enumerate(ids):
        if token in stops:
            return ids[: i + 1]
    return ids


def _scores(findings: Sequence[Finding | Mapping[str, float]], categories: Sequence[str]) -> list[float]:
    found = []
    for finding in findings:
        scores = finding.scores if isinstance(finding, Finding) else finding
        missing = [c for c in categories if c not in scores]
        if missing:
            raise ValueError(f"the check gives no {missing[0]!r}; it gives: {', '.join(sorted(scores))}")
        worst = [float(scores[c]) for c in categories]
        if not all(0 <= score <= 1 for score in worst):
            raise ValueError(f"the check must give scores in [0, 1], got {worst}")
        found.append(max(worst))
    return found
