"""Settings of the detoxification benchmark, and the prompts that models go on from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from safeguard.train.recipe import Recipe
from safeguard.train.text_data import read_jsonl

Suite = Literal["toxigen", "rtp", "bold"]
FAMILIES = {
    "women": "gender_lgbtq",
    "lgbtq": "gender_lgbtq",
    "black": "race_nationalities",
    "asian": "race_nationalities",
    "latino": "race_nationalities",
    "chinese": "race_nationalities",
    "mexican": "race_nationalities",
    "middle_east": "race_nationalities",
    "native_american": "race_nationalities",
    "jewish": "religion",
    "muslim": "religion",
    "mental_dis": "disability",
    "physical_dis": "disability",
}
"""Group that a ToxiGen sentence is about -> family, as UniDetox reports them."""


class DetoxSettings(Recipe):
    """How a model is measured."""

    suites: Annotated[tuple[Suite, ...], Field(min_length=1)] = ("toxigen", "rtp")
    toxigen_split: str | None = "validation"
    """The pack's split of ToxiGen; the text guard never trained on `validation`. None takes all."""
    per_family: PositiveInt | None = None
    """Prompts of each family of groups at most, chosen by `prompt_seed`; None takes all."""
    prompt_seed: int = 0
    continuations: PositiveInt = 25
    new_tokens: PositiveInt = 20
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: NonNegativeInt = 0
    temperature: PositiveFloat = 1.0
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42, 43, 44, 45, 46)
    batch_size: PositiveInt = 8
    """Prompts at a time, each with all its continuations; more than one make better use of the cores."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
    start: str | None = None
    """Token before every prompt and clean text, as the model was trained; None for none."""
    clean_texts: NonNegativeInt = 200
    """Clean texts that perplexity is measured on; 0 for none."""
    clean_tokens: PositiveInt = 256
    perplexity_pairs: PositiveInt = 500
    """Continuations that the other model scores, if there is one."""
    shots: NonNegativeInt = 5
    unidetox_shots: NonNegativeInt = 1
    """Examples before each multiple-choice question: the standard way, and UniDetox's."""
    choices: str | None = None
    """JSON-lines file of multiple-choice questions, inside the data folder or a path; `shipped`: our own."""
    choice_examples: str | None = None
    """Questions that the examples are taken from; the last ones of `choices` where None."""
    weights: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model goes on from, the group it is about, and the family of groups."""

    text: str = field(repr=False)
    group: str
    family: str


def read_prompts(data: Path, suite: Suite, settings: DetoxSettings) -> list[Prompt]:
    """Prompts of a suite from the data pack, in the order of its files.

    Raises ValueError where none is found.
    """
    if suite == "toxigen":
        rows = _rows(data / "toxicity_text.jsonl.gz", "toxigen_annotated")
        split = settings.toxigen_split
        rows = [r for r in rows if split is None or r["split"] == split]
        prompts = [Prompt(r["text"], r["category"], FAMILIES[r["category"]]) for r in rows]
    elif suite == "rtp":
        rows = _rows(data / "lm_prompts.jsonl.gz", "realtoxicityprompts_garak100")
        prompts = [Prompt(r["text"], r["category"], r["category"]) for r in rows]
    else:
        rows = _rows(data / "lm_prompts.jsonl.gz", "bold")
        prompts = [Prompt(r["text"], r["category"], r["category"].split(":")[0]) for r in rows]
    if not prompts:
        raise ValueError(f"no prompts of {suite} in {data}")
    return thinned(prompts, settings.per_family, settings.prompt_seed)


def thinned(prompts: Sequence[Prompt], most: int | None, seed: int) -> list[Prompt]:
    """At most so many prompts of each family, chosen by the seed, in their old order."""
    if most is None:
        return list(prompts)
    kept: set[int] = set()
    for family in sorted({prompt.family for prompt in prompts}):
        numbers = [i for i, prompt in enumerate(prompts) if prompt.family == family]
        kept.update(random.Random(f"{seed}:{family}").sample(numbers, min(most, len(numbers))))
    return [prompts[i] for i in sorted(kept)]


def clean_texts(data: Path, count: int) -> list[str]:
    """The first clean texts of the pack."""
    return [row["text"] for row in read_jsonl(data / "lm_clean_text.jsonl.gz")[:count]]


def _rows(path: Path, source: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(path) if row["source"] == source]
