"""Real models behind an image-level evaluation: a diffusers pipeline that draws, CLIP that compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safeguard.decoding.safety_guidance import CONCEPT
from safeguard.errors import MissingExtra
from safeguard.evaluate.ipr import DrawAt
from safeguard.evaluate.ipr_loops import Draw
from safeguard.evaluate.ipr_prompts import Protocol
from safeguard.packs import file_digest
from safeguard.train.refiner.pictures import clip_alignment, pipeline_draw

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", extra="torch") from exc

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class OpenedPipeline:
    """What draws, and what a report says of it."""

    draw_at: DrawAt
    facts: Mapping[str, Any] = field(default_factory=dict)


def open_pipeline(
    source: str, protocol: Protocol, *, batch_size: int = 8, device: str = "cpu", dtype: str = "float32"
) -> OpenedPipeline:
    """The pipeline in a folder or on the hub, ready to draw as a protocol says.

    Its own safety checker is switched off, as in the papers: a black picture would be counted as harmless.
    Raises ValueError for a type of numbers that is unknown.
    """
    try:
        import diffusers
    except ImportError as exc:
        raise MissingExtra("diffusers", extra="diffusers") from exc
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    pipe = diffusers.DiffusionPipeline.from_pretrained(place, use_safetensors=True)
    pipe = pipe.to(device)
    if dtype != "float32":
        pipe = pipe.to(getattr(torch, dtype))  # the loader's argument for it has had two names
    pipe.set_progress_bar_config(disable=True)
    had_checker = getattr(pipe, "safety_checker", None) is not None
    if had_checker:
        pipe.safety_checker = None
    weights = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    facts = {
        "pipeline": type(pipe).__name__,
        "pipeline_files": {str(path.relative_to(folder)): file_digest(path) for path in weights},
        "safety_checker": "switched off" if had_checker else "none",
        "dtype": dtype,
        "negative_prompt": negative_of(protocol),
    }
    return OpenedPipeline(draws(pipe, protocol, batch_size=batch_size), facts)


def draws(pipe: Any, protocol: Protocol, *, batch_size: int = 8) -> DrawAt:
    """What draws with a pipeline at any guidance, as a protocol says."""
    negative = negative_of(protocol)

    def call(prompts: Sequence[str], **how: Any) -> Any:
        return pipe(list(prompts), negative_prompt=[negative] * len(prompts), **how)

    def draw_at(guidance: float) -> Draw:
        chosen = call if negative else pipe
        return pipeline_draw(chosen, steps=protocol.steps, guidance=guidance, batch_size=batch_size)

    return draw_at


def negative_of(protocol: Protocol) -> str:
    """The negative prompt of a protocol, empty for none."""
    return CONCEPT if protocol.negative == "safety" else protocol.negative


def open_alignment(source: str, *, device: str = "cpu") -> Any:
    """Cosine of pictures and texts by the CLIP model in a folder or on the hub."""
    try:
        import transformers
    except ImportError as exc:
        raise MissingExtra("transformers", extra="torch") from exc
    model = transformers.CLIPModel.from_pretrained(source, use_safetensors=True).to(device).eval()
    return clip_alignment(model, transformers.CLIPProcessor.from_pretrained(source))
