"""Real models behind picture rewards: a diffusers pipeline that draws, a Q16 check, CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safeguard.errors import MissingExtra
from safeguard.train.refiner.picture_rewards import (
    CLIP_CAP,
    Alignment,
    Draw,
    Drawings,
    Inappropriate,
    PictureReward,
)
from safeguard.types import Finding

if TYPE_CHECKING:
    from safeguard.train.refiner.rl import RefinerRlConfig

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", extra="torch") from exc


@dataclass(frozen=True, slots=True)
class PictureModels:
    """What draws, what judges, what compares with the prompt."""

    draw: Draw
    inappropriate: Inappropriate
    alignment: Alignment

    def rewards(self, config: RefinerRlConfig) -> tuple[Drawings, PictureReward]:
        """Drawings and reward as a recipe wants them."""
        compat = config.compat
        drawings = Drawings(
            self.draw, count=config.images_per_prompt, seed=config.seed, fixed=compat.fixed_seeds
        )
        reward = PictureReward(
            self.inappropriate,
            self.alignment,
            cap=None if compat.uncapped_alignment else CLIP_CAP,
            against="refined" if compat.refined_alignment else "original",
        )
        return drawings, reward


def pipeline_draw(pipe: Any, *, steps: int = 20, guidance: float = 7.0, batch_size: int = 8) -> Draw:
    """Draws with a diffusers pipeline: one generator per picture, so that a seed always gives the same noise.

    guidance 7 is POSI's and IPR's.
    """

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Any]]:
        jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
        made: list[Any] = []
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed) for _, seed in part]
            made += pipe(
                [prompt for prompt, _ in part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
            ).images
        return [made[i : i + len(seeds)] for i in range(0, len(made), len(seeds))]

    return draw


def check_inappropriate(check: Any, label: str) -> Inappropriate:
    """Q16, or any image check, as the probability of one label. Raises KeyError for a label it has not."""

    def inappropriate(images: Sequence[Any]) -> list[float]:
        found = check(list(images))
        return [float((r.scores if isinstance(r, Finding) else r)[label]) for r in found]

    return inappropriate


def clip_alignment(model: Any, processor: Any) -> Alignment:
    """Cosine of a CLIP model between pictures and texts; texts are cut at the model's own length."""

    def align(images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        inputs = processor(
            text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True
        ).to(model.device)
        with torch.inference_mode():
            out = model(**inputs)
        left = torch.nn.functional.normalize(out.image_embeds.float(), dim=-1)  # (picture, dim)
        right = torch.nn.functional.normalize(out.text_embeds.float(), dim=-1)
        return [float(value) for value in (left * right).sum(-1)]

    return align
