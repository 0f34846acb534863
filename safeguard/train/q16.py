"""A learned pair of prompts on a frozen picture encoder: the head of Q16, from labelled pictures.

Two vectors of the embedding space, harmless and harmful, learned by cross-entropy on softmax(scale * cosine);
the encoder never changes, so pictures are embedded once. Source: Q16 (Schramowski et al., FAccT 2022). Beyond
it: early stopping on a validation part, calibration, thresholds for wanted false-positive rates, and the loss
is on the worst view of a picture, as the check judges it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from safeguard.calibrate import FALSE_POSITIVE_RATES
from safeguard.checks.clip_heads import PromptPair, read_arrays, write_heads
from safeguard.errors import PackError
from safeguard.files import write_whole
from safeguard.packs import canonical_digest, file_digest
from safeguard.train.q16_data import PARTS, LabelledPicture, PictureSet, read_pictures
from safeguard.train.q16_encoder import Embedded, PictureEncoder, embed
from safeguard.train.q16_fit import (
    Sample,
    class_means,
    fit_prompts,
    gain_of,
    logits_of,
    unit_rows,
    with_gain,
)
from safeguard.train.q16_measure import cross_validate, measured, operating_points
from safeguard.train.recipe import Recipe, versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

HEADS, PROMPTS = "heads.npz", "prompts.npz"
Init = Literal["means", "text"]


class Q16Config(Recipe):
    """Everything that decides the head, but encoder and pictures."""

    category: Annotated[str, Field(pattern=r"^[^:]+$")] = "inappropriate"
    """What the head calls it."""
    seed: int = 0
    init: Init = "means"
    """Prompts to start from: means of the embeddings of each label, or, as in the paper, the words below."""
    harmless_text: str = "This image is about something positive"
    harmful_text: str = "This image is about something negative"
    scale: PositiveFloat = 100.0
    epochs: NonNegativeInt = 200
    """At most; 0 measures the prompts that were there."""
    batch: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-3
    patience: PositiveInt = 20
    """Epochs without a better validation loss after which training ends."""
    balanced: bool = False
    """Both labels count the same, however many pictures they have; probabilities are then those of a world
    with as many of both."""
    mirrored: bool = True
    """Training pictures are shown turned left to right as well."""
    calibrate: bool = True
    false_positive_rates: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: dict(FALSE_POSITIVE_RATES)
    )
    """Operating point -> share of harmless validation pictures that it may flag."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Of the training groups, where the labels name no validation part."""
    folds: Annotated[int, Field(ge=0, le=50)] = 0
    """Cross-validation over train and validation as well, from 3 on; 0 for none. The paper has 10."""
    harmless_rating: float = 3.5
    inappropriate_rating: float = 2.5
    """For files with ratings in the place of labels: Q16's thresholds on SMID."""

    @field_validator("folds")
    @classmethod
    def _folds_for_three_parts(cls, folds: int) -> int:
        if folds in (1, 2):
            raise ValueError(f"folds must be 0, or 3 or more: one tests and one chooses, got {folds}")
        return folds


@dataclass(frozen=True, slots=True)
class Q16Result:
    """The head, where it lies, and what was measured."""

    head: PromptPair
    folder: Path
    metrics: Mapping[str, Any]


def train_q16(
    config: Q16Config,
    encoder: PictureEncoder,
    folder: Path,
    labels: Path,
    out: Path,
    *,
    start: Path | None = None,
    pack: bool = False,
) -> Q16Result:
    """Trains the head and writes heads.npz, prompts.npz, config.json and metrics.json.

    folder, labels: see `safeguard.train.q16_data.read_pictures`. start: a file of prompts to begin with
    (released Q16 prompts, or heads of ours), in place of what the recipe says. heads.npz is for
    `safeguard export onnx --heads`; prompts.npz has the form of the released prompts, for scale 100. pack:
    also writes `pack`, encoder and head together, which loads as a check.

    Raises ValueError where train or validation lack one of the labels, FileExistsError for a run in `out`.
    """
    started = time.monotonic()
    if (out / HEADS).exists() or (out / "pack").exists():
        raise FileExistsError(17, "holds a head already; give a new folder", str(out))
    pictures = read_pictures(
        folder,
        labels,
        harmless_rating=config.harmless_rating,
        inappropriate_rating=config.inappropriate_rating,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
    )
    _refuse_one_label(pictures)
    samples = {part: _sample(encoder, pictures.part(part)) for part in PARTS}
    shown = samples["train"]
    if config.mirrored and config.epochs:
        shown = shown.with_more(_sample(encoder, pictures.part("train"), mirrored=True))
    first = _first_prompts(config, encoder, shown, start)
    fitted = fit_prompts(first, shown, samples["validation"], config)
    prompts, gain = fitted.prompts, 1.0
    if config.calibrate:
        known = samples["validation"]
        prompts, gain = with_gain(prompts, gain_of(logits_of(prompts, known, config.scale), known.truth))
    head = PromptPair(config.category, prompts.astype(np.float32), config.scale)
    points = operating_points(head, samples["validation"], config.false_positive_rates)
    metrics: dict[str, Any] = {
        **_sources(config, encoder, pictures, labels, start),
        "prompts": canonical_digest(head.prompts.tolist()),
        "epochs": fitted.epochs,
        "best_epoch": fitted.best,
        "validation_loss": fitted.losses,
        "gain": gain,
        "operating_points": points,
        "held_out": measured(head, samples["test"], pictures.part("test"), points),
        "validation": measured(head, samples["validation"], pictures.part("validation"), points),
        "before_training": measured(
            PromptPair(config.category, first, config.scale), samples["test"], pictures.part("test")
        ),
        "folds": cross_validate(config, samples, pictures),
        "versions": versions("torch", "numpy"),
        "wall_s": round(time.monotonic() - started, 1),
    }
    _write(out, head, config, metrics)
    if pack:
        encoder.write(head, out / "pack", {"operating_points": points})
    log.info("head trained: category=%s epochs=%d best=%d", config.category, fitted.epochs, fitted.best)
    return Q16Result(head, out, metrics)


def read_prompts(path: Path, category: str | None = None) -> PromptPair:
    """Prompts from a released file (.npz with `prompts`, or .npy: rows harmless, harmful) or from our heads.

    category: which head of ours, where there are several. Raises PackError for a file that has none.
    """
    arrays = read_arrays(path)
    for key in ("prompts", "array"):
        found = arrays.get(key)
        if found is not None and found.ndim == 2 and len(found) == 2:
            return PromptPair(category or "inappropriate", found.astype(np.float32))
    heads = {key.split(":")[0]: key for key in arrays if key.endswith(":prompts:prompts")}
    if category is None and len(heads) == 1:
        category = next(iter(heads))
    if category not in heads:
        has = f"it has {', '.join(heads)}" if heads else "it has none"
        raise PackError(f"{path.name} has no pair of prompts for {category!r}; {has}")
    key = heads[category].removesuffix("prompts")
    return PromptPair(str(category), arrays[f"{key}prompts"], float(arrays[f"{key}scale"].item()))


def released_form(head: PromptPair) -> NDArray[np.float32]:
    """The prompts (2, dimension) for scale 100, the only one that the released form knows.

    Raises ValueError for a scale so large that no two unit vectors lie far enough apart.
    """
    made, gain = with_gain(unit_rows(head.prompts), head.scale / 100.0)
    if not np.isclose(gain, head.scale / 100.0):
        raise ValueError(f"scale {head.scale} of {head.category!r} cannot be told in prompts of scale 100")
    return made.astype(np.float32)


def _sample(encoder: PictureEncoder, pictures: list[LabelledPicture], *, mirrored: bool = False) -> Sample:
    found: Embedded = embed(encoder, pictures, mirrored=mirrored)
    return Sample(found.rows, found.index(), np.array([picture.unsafe for picture in pictures], bool))


def _refuse_one_label(pictures: PictureSet) -> None:
    for part, count in pictures.counts().items():
        if part != "test" and not all(count.values()):
            raise ValueError(
                f"{part} needs pictures of both labels, got {count['inappropriate']} inappropriate "
                f"and {count['harmless']} harmless"
            )


def _first_prompts(
    config: Q16Config, encoder: PictureEncoder, train: Sample, start: Path | None
) -> NDArray[np.float64]:
    """Unit prompts (2, dimension) to begin with."""
    dimension = train.rows.shape[1]
    if start is not None:
        pair = read_prompts(start)
        if pair.dimension != dimension:
            raise ValueError(
                f"{start.name} has prompts of {pair.dimension} numbers, "
                f"{encoder.name} gives embeddings of {dimension}"
            )
        return unit_rows(released_form(pair) if pair.scale != config.scale else pair.prompts)
    if config.init == "text":
        if encoder.texts is None:
            raise ValueError(f"{encoder.name} has no text half, so init must be 'means'")
        return unit_rows(encoder.texts([config.harmless_text, config.harmful_text]))
    return class_means(train)


def _sources(
    config: Q16Config, encoder: PictureEncoder, pictures: PictureSet, labels: Path, start: Path | None
) -> dict[str, Any]:
    """What a run was made of."""
    return {
        "recipe": "q16",
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "encoder": {"name": encoder.name, "digest": encoder.digest},
        "data": {
            "labels": {labels.name: file_digest(labels)},
            "pictures": pictures.digest,
            "counts": pictures.counts(),
            "duplicates_left_out": pictures.duplicates,
        },
        "start": None if start is None else {start.name: file_digest(start)},
    }


def _write(out: Path, head: PromptPair, config: Q16Config, metrics: Mapping[str, Any]) -> None:
    """The files of a run; heads.npz last, since it says that the run is whole."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", config.model_dump_json(indent=1) + "\n")
    write_whole(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    with (out / PROMPTS).open("wb") as file:
        np.savez(file, allow_pickle=False, prompts=released_form(head).astype(np.float16))
    write_heads(out / HEADS, [replace(head, prompts=head.prompts.astype(np.float32))])
