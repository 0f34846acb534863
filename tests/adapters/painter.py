"""A diffusers pipeline without weights, whose pictures are as bright as its prompt says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from safeguard import Guard, Policy
from safeguard.policy import OutputRules, Rules
from safeguard.testing import BrightCheck, WordCheck
from safeguard.types import Action

SIDE = 8
SHADES = {"white": 1.0, "grey": 0.25, "broken": float("nan")}


@dataclass
class PainterOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """Pictures, what the pipeline withheld itself, and a sound for each picture."""

    images: Any
    nsfw_content_detected: list[bool] | None = None
    sounds: Any = None


class Painter(DiffusionPipeline):  # type: ignore[misc]
    """Paints one shade for each prompt: 1.0 for `white`, 0.25 for `grey`, a draw for `dice`, else 0.

    Its first parameter is not the prompt, as in Flux 2. It keeps what it was called with in `calls`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_to_config()
        self.calls: list[dict[str, Any]] = []
        self.rewrite = ""

    def upsample_prompt(self, prompt: str | list[str]) -> list[str]:
        """Put a text of its own behind each prompt."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return [text + self.rewrite for text in prompts]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(
        self,
        image: Any = None,
        prompt: Any = None,
        prompt_2: Any = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        complex_human_instruction: list[str] = ["Rewrite the user's words."],  # noqa: B006  # as Sana has it
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> PainterOutput | tuple[Any, ...]:
        """Paint."""
        self.calls.append({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [""])
        prompts = self.upsample_prompt(prompts) if self.rewrite else prompts
        texts = [text for text in prompts for _ in range(num_images_per_prompt)]
        generators = generator if isinstance(generator, list) else [generator] * len(texts)
        shades = [_shade(text, g) for text, g in zip(texts, generators, strict=True)]
        pictures = torch.tensor(shades).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE).clone()
        made = _as_type(pictures, output_type)
        sounds = torch.ones(len(texts), 4)
        if not return_dict:
            return made, None, sounds
        return PainterOutput(images=made, sounds=sounds)


def _shade(text: str, generator: torch.Generator | None) -> float:
    if "dice" in text:
        return float(torch.rand((), generator=generator))
    return next((shade for word, shade in SHADES.items() if word in text), 0.0)


def _as_type(pictures: torch.Tensor, output_type: str) -> Any:
    if output_type in ("pt", "latent"):
        return pictures
    array = pictures.permute(0, 2, 3, 1).numpy()  # (picture, height, width, channel)
    if output_type == "np":
        return array
    return [Image.fromarray(np.round(np.nan_to_num(a) * 255).astype(np.uint8)) for a in array]


def guarded(*words: str, refiner: Any = None, **policy: Any) -> Any:
    """A guarded painter: `knife` and the words are refused in prompts, shades of 0.5 and more in pictures."""
    guard = Guard([WordCheck("knife", *words)], [BrightCheck()], refiner, Policy(**policy))
    return guard(Painter())


def image_rules(action: Action) -> OutputRules:
    """Rules by which a bright picture gets this action."""
    return OutputRules(image=Rules(action=action))
