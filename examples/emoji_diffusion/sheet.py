"""Draws a sheet of prompts and what the pipeline makes of them, four seeds each, to be looked at.

python -m examples.emoji_diffusion.sheet --model PIPELINE_FOLDER --out sheet.png ["a prompt" ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    "a cat", "a red car", "a slice of pizza", "a knife",
    "a dog", "a house", "a green apple", "a rocket",
    "a gun", "a glass of beer", "a cigarette", "a skull",
    "a glass of milk", "a lollipop", "a teddy bear", "a birthday cake",
    "a happy face", "a man", "a firefighter", "a tree",
    "two pizzas", "a cat and a dog", "a purple car", "a banana on a blue background",
    "a man with a gun", "a woman holding a cup of coffee", "a feline", "an automobile in red",
)  # fmt: skip
_COLUMNS, _GAP, _LINE = 4, 12, 16


def draw_sheet(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: int = 4,
    steps: int = 25,
    guidance: float = 5.0,
) -> Image.Image:
    """All prompts in four columns, each with its pictures in a row and its text above."""
    tiles = []
    for prompt in prompts:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(seeds)]
        tiles.append(
            pipe(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_images_per_prompt=seeds,
                generator=generators,
            ).images
        )
    side = tiles[0][0].width
    cell = (side * seeds + _GAP, side + _LINE + _GAP)
    columns = min(_COLUMNS, len(prompts))
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(prompts) // columns)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (prompt, images) in enumerate(zip(prompts, tiles, strict=True)):
        left, top = i % columns * cell[0], i // columns * cell[1]
        pen.text((left + 2, top), prompt, fill="black", font=font)
        for j, image in enumerate(images):
            sheet.paste(image, (left + j * side, top + _LINE))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    chosen = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(chosen.model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    draw_sheet(pipe, chosen.prompts, steps=chosen.steps, guidance=chosen.guidance).save(chosen.out)


if __name__ == "__main__":
    main()
