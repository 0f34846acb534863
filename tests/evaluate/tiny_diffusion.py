"""A pipeline that draws a plain colour after its prompt, and a tiny real Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"knife": (220, 0, 0), "cup": (0, 0, 220), "fork": (150, 0, 0)}


def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Image.Image]]:
    """16 x 16 pictures: red for a knife or fork, blue for a cup, else grey; seeds in the green."""
    return [[_picture(prompt, seed) for seed in seeds] for prompt in prompts]


def _picture(prompt: str, seed: int) -> Image.Image:
    red, _, blue = next((c for word, c in COLOURS.items() if word in prompt), (90, 90, 90))
    return Image.new("RGB", (16, 16), (red, seed % 50, blue))


def stable_diffusion(folder: Path) -> Path:
    """A random StableDiffusionPipeline of the real classes, saved; 32 x 32 pictures."""
    import torch
    import transformers
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from tests.exporters.tiny import tokenizer

    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=60,
        max_position_embeddings=40,
        bos_token_id=1,
        eos_token_id=2,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": transformers.CLIPTextModel(text),
        "tokenizer": tokenizer(),
        "unet": unet,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder
