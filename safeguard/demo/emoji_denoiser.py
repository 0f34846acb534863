"""The closed-form denoiser of a set of captioned emoji: no weights, no training, not a text-to-image model.

For data that are known pictures x_i, the denoiser that diffusion models are trained towards can be written:

    E[x0 | xt, c] = sum_i w_i x_i,   w_i proportional to p(i | c) exp(-|xt - sqrt(a) x_i|^2 / (2 (1 - a)))

where a is the cumulative product of alphas. Here a picture is a scene of one to four cells with one
emoji each, independent of one another, so that the posterior is one such sum per cell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from safeguard.errors import MissingExtra

try:
    import numpy as np
    import torch
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from torch.nn import functional as nn_functional
except ImportError as exc:
    raise MissingExtra(exc.name or "diffusers", extra="diffusers") from exc
from PIL import Image

from safeguard.demo.captions import Concept

_MARGIN = 0.06  # of a cell's side, kept white around its emoji


@dataclass(frozen=True, slots=True)
class Cell:
    """A square of the canvas, in pixels, and what may stand in it."""

    left: int
    top: int
    side: int
    concept: Concept


@dataclass(frozen=True, slots=True)
class Tiles:
    """All emoji at the size of a cell: pixels (emoji, 3 * side * side) in [-1, 1]; their squared norms."""

    pixels: torch.Tensor
    squares: torch.Tensor


class EmojiDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """Predicts x0, the expected clean scene, from a noisy one; its only tensor is the set of emoji itself.

    captions, keywords: one of each per emoji. sample_size: side of the canvas where a call names none.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers is untyped
    def __init__(
        self,
        captions: Sequence[str] = ("",),
        keywords: Sequence[str] = ("",),
        sprite_size: int = 64,
        sample_size: int = 128,
    ) -> None:
        super().__init__()
        shape = (len(captions), 3, sprite_size, sprite_size)
        self.register_buffer("sprites", torch.ones(shape))

    @classmethod
    def embedded(cls) -> EmojiDenoiser:
        """The set that ships with the demo; source and licence stand in its `emoji.json`."""
        folder = resources.files("safeguard.demo") / "data"
        about: dict[str, Any] = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        size, columns, rows = about["size_px"], about["columns"], about["emoji"]
        with (folder / "emoji.png").open("rb") as file, Image.open(file) as sheet:
            pixels = np.array(sheet.convert("RGB"), np.float32) / 127.5 - 1  # (height, width, 3) in [-1, 1]
        denoiser = cls([row["caption"] for row in rows], [row["keywords"] for row in rows], size)
        for i in range(len(rows)):
            top, left = i // columns * size, i % columns * size
            tile = pixels[top : top + size, left : left + size]
            denoiser.sprites[i] = torch.from_numpy(tile).permute(2, 0, 1)
        return denoiser  # type: ignore[no-any-return]  # diffusers is untyped

    def tiles(self, side: int) -> Tiles:
        """All emoji as they stand in a cell of `side` pixels."""
        margin = max(round(side * _MARGIN), 1)
        inner = side - 2 * margin
        small = nn_functional.interpolate(
            self.sprites.float(), (inner, inner), mode="bicubic", antialias=True, align_corners=False
        )
        pixels = nn_functional.pad(small.clamp(-1, 1), (margin,) * 4, value=1.0).flatten(1)
        return Tiles(pixels, pixels.square().sum(dim=1))

    def forward(
        self,
        sample: torch.Tensor,
        alpha_cumprod: float,
        scenes: Sequence[Sequence[Cell]],
        tiles: Mapping[int, Tiles],
    ) -> torch.Tensor:
        """E[x0 | xt, c] for each scene of a batch; outside of the cells the canvas is known to be white.

        sample: xt, (scene, 3, height, width). alpha_cumprod: in [0, 1), 0 where xt is noise alone.
        tiles: for every side of a cell in the scenes, made once per call.
        """
        clean = torch.ones_like(sample)
        for row, cells in enumerate(scenes):
            for cell in cells:
                rows = slice(cell.top, cell.top + cell.side)
                columns = slice(cell.left, cell.left + cell.side)
                noisy = sample[row, :, rows, columns]  # (3, side, side)
                mean = _expected(noisy.flatten(), tiles[cell.side], alpha_cumprod, cell.concept)
                clean[row, :, rows, columns] = mean.view_as(noisy)
        return clean


def _expected(noisy: torch.Tensor, tiles: Tiles, alpha: float, concept: Concept) -> torch.Tensor:
    """Posterior mean of one cell, (pixel,), from its noisy pixels, (pixel,)."""
    # -|y - sqrt(a) x|^2 / (2 (1 - a)) without |y|^2, the same for all: no division by a, which may be 0
    fit = (alpha**0.5 * (tiles.pixels @ noisy) - alpha / 2 * tiles.squares) / (1 - alpha)
    prior = torch.from_numpy(concept.log_prior).to(fit)
    return torch.softmax(fit + prior, dim=0) @ tiles.pixels


def lay_out(concepts: Sequence[Concept], width: int, height: int) -> list[Cell]:
    """Cells for one to four concepts: alone in the middle, two side by side, more in two rows."""
    columns = 1 if len(concepts) == 1 else 2
    rows = 1 if len(concepts) <= 2 else 2
    side = min(width // columns, height // rows)
    top = (height - rows * side) // 2
    cells = []
    for i, concept in enumerate(concepts):
        in_row = min(columns, len(concepts) - i // columns * columns)
        left = (width - in_row * side) // 2 + i % columns * side
        cells.append(Cell(left, top + i // columns * side, side, concept))
    return cells
