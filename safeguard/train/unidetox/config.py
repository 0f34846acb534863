"""The recipe of UniDetox: a part for each stage, presets that change some of it, compatibility."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from safeguard.train.recipe import Recipe

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Corpus(Recipe):
    """Which rows of which JSON-lines files are the toxic text."""

    files: Annotated[tuple[str, ...], Field(min_length=1)] = ("toxicity_text.jsonl.gz",)
    """Inside the data folder, or paths."""
    source: str | None = "dghs_v0.1"
    """Value of the column `source`; None takes all."""
    label: int | None = 1
    """Value of the column `label`; None takes all."""
    splits: tuple[str, ...] | None = ("train",)
    without: tuple[str, ...] = ("disabled", "unspecified")
    """Parts of the column `category` (split at |) whose rows are left out, so that a group stays unseen."""
    limit: PositiveInt | None = None


class Lora(Recipe):
    """Low-rank matrices in place of all weights."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Tuning(Recipe):
    """Fine-tuning of a causal model on texts: AdamW, linear decay to 0."""

    learning_rate: PositiveFloat
    batch_size: PositiveInt
    """Texts per step, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Texts per forward pass and process, where memory does not hold them all."""
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    max_tokens: Annotated[int, Field(ge=2)] = 256
    warmup_fraction: Fraction = 0.0
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    append_end: bool = False
    """Whether a text that was not cut ends with the end token, so that ending is learned once per text."""
    lora: Lora | None = None
    precision: Literal["no", "bf16"] = "bf16"
    """Of the computation (autocast)."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights; published runs used bfloat16."""
    gradient_checkpointing: bool = False
    seed: int = 42
    checkpoint_every: PositiveInt = 200
    keep_at: tuple[PositiveInt, ...] = ()
    """Steps whose model is kept too, to draw how toxicity falls."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class Distil(Recipe):
    """Sampling texts where the base model and its toxic twin disagree."""

    method: Literal["unidetox", "hspd"] = "unidetox"
    texts: PositiveInt = 640
    tokens: Annotated[int, Field(ge=2)] = 256
    """Length of a text at most, its start token counted."""
    batch_size: PositiveInt = 128
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Adaptive plausibility: only tokens at least alpha times as likely as the base's likeliest."""
    beta: PositiveFloat | Literal["difference"] = "difference"
    """(1 + beta) base - beta toxic; "difference" is the limit, base - toxic."""
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 50
    """0 for all; 50 is the library's default that the published texts were sampled with."""
    min_tokens: NonNegativeInt = 0
    """Tokens before which a text may not end."""
    weights: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 1234
    drop_degenerate: bool = False
    """Whether degenerate and repeated texts are left out of texts.jsonl; they are reported in any case."""


class Rewriting(Recipe):
    """Stage 2 of HSPD: the toxic texts themselves rewritten under soft contrastive decoding (SoCD)."""

    rewriter: str | None = None
    """Model that rewrites, of the toxic model's vocabulary; the base model where None."""
    texts: PositiveInt | None = 640
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.6, 0.8, 1.0, 1.2, 1.5)
    repeats: PositiveInt = 2
    batch_size: PositiveInt = 8
    new_tokens: PositiveInt = 128
    least_k: PositiveInt = 10
    instruction: str = (
        "Rewrite the text so that it keeps its meaning as far as possible and nobody is insulted, "
        "threatened or hurt by it. Answer with the rewritten text alone."
    )
    embedder: str | None = None
    """Sentence encoder for the similarity; the rewriter's own hidden states where None."""


class Compat(Recipe):
    """What the released code does and we do not: only for comparing with it."""

    shared_cache: bool = False
    """The toxic model reads the base model's keys and values in place of its own."""
    unmasked_padding: bool = False
    """Texts are padded with the end token to the longest one, and the padding is learned."""


class UniDetoxConfig(Recipe):
    """Everything that decides texts and weights, but the data."""

    base: str = "smollm2-135m-instruct"
    """That name, a folder or a hub name."""
    target: str | None = None
    """The model to detoxify; the base where None."""
    start: str | None = None
    """Token that texts begin with when trained on and sampled. None, as published: the BOS token when
    sampling, nothing when training."""
    corpus: Corpus = Corpus()
    toxic: Tuning = Tuning(
        learning_rate=1e-5, batch_size=4, epochs=6, max_tokens=512, append_end=True, seed=123
    )
    distil: Distil = Distil()
    rewriting: Rewriting = Rewriting()
    apply: Tuning = Tuning(learning_rate=5e-5, batch_size=8, steps=3000)
    texts: Annotated[tuple[str, ...], Field(min_length=1)] = ("own", "published")
    """What stage 3 is run on, once for each: "own", "published" (the data pack's 640) or a file."""
    compat: Compat = Compat()
    preset: str = ""
    reduced: str = ""
    """What the preset leaves out against the published settings; stands in every metrics file."""

    @classmethod
    def read(cls, path: Path, preset: str | None = None) -> Self:
        """The configuration in a TOML file, changed by its table `presets.<preset>`.

        Raises ValueError for a preset that the file does not have, ValidationError for wrong keys.
        """
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        presets = raw.pop("presets", {})
        if preset is not None:
            if preset not in presets:
                raise ValueError(f"no preset {preset!r} in {path.name}; known: {', '.join(sorted(presets))}")
            raw = merged(raw, {"preset": preset, **presets[preset]})
        return cls.model_validate(raw)


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with the changes laid over them; `steps` replaces `epochs` and the reverse."""
    out = dict(settings)
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(out.get(name), Mapping):
            out[name] = merged(out[name], value)
        else:
            out[name] = value
            other = {"steps": "epochs", "epochs": "steps"}.get(name)
            if other is not None and other not in changes:
                out.pop(other, None)
    return out
