from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch

from safeguard.demo.captions import Concept
from safeguard.demo.emoji_denoiser import Cell, EmojiDenoiser, lay_out

EVEN = Concept(np.log([0.5, 0.5]))


def black_and_white() -> EmojiDenoiser:
    """Two emoji: all black (-1) and all white (+1)."""
    denoiser = EmojiDenoiser(["black", "white"], ["", ""], 8)
    denoiser.sprites[0] = -1.0
    return denoiser  # type: ignore[no-any-return]  # diffusers is untyped


def denoised(sample: torch.Tensor, alpha: float, concept: Concept = EVEN) -> torch.Tensor:
    denoiser = black_and_white()
    side = sample.shape[-1]
    result = denoiser(sample, alpha, [[Cell(0, 0, side, concept)]], {side: denoiser.tiles(side)})
    assert isinstance(result, torch.Tensor)
    return result


def test_noise_alone_gives_the_mean_of_the_prior() -> None:
    clean = denoised(torch.randn(1, 3, 16, 16), 0.0)

    assert clean[0, :, 8, 8].tolist() == pytest.approx([0, 0, 0])  # (-1 + 1) / 2


def test_weights_are_the_posterior_of_the_formula() -> None:
    # 16 pixels a side, a margin of 1 that is white in both: 14 * 14 * 3 = 588 values differ, each by 2.
    # With x_t = s in each of them, alpha = 1/2: log w_white - log w_black = (sqrt(1/2) * s * 2 * 588) / (1/2)
    s = 0.001
    ratio = math.sqrt(0.5) * s * 2 * 588 / 0.5
    sample = torch.full((1, 3, 16, 16), s)

    clean = denoised(sample, 0.5)

    assert clean[0, 0, 8, 8].item() == pytest.approx(math.tanh(ratio / 2), abs=1e-4)  # p_white - p_black


def test_a_nearly_clean_picture_is_kept() -> None:
    sample = torch.full((1, 3, 16, 16), -0.99)

    assert denoised(sample, 0.99)[0, 0, 8, 8].item() == pytest.approx(-1)


def test_what_the_caption_excludes_does_not_appear() -> None:
    only_black = Concept(np.array([0.0, -1e9]))

    assert denoised(torch.randn(1, 3, 16, 16), 0.0, only_black)[0, 0, 8, 8].item() == pytest.approx(-1)


def test_the_canvas_outside_of_the_cells_is_white() -> None:
    denoiser = black_and_white()
    clean = denoiser(torch.zeros(1, 3, 32, 32), 0.0, [[Cell(0, 0, 16, EVEN)]], {16: denoiser.tiles(16)})

    assert clean[0, :, 20:, 20:].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(0, 0, 100)]),
        (2, [(0, 25, 50), (50, 25, 50)]),
        (3, [(0, 0, 50), (50, 0, 50), (25, 50, 50)]),
        (4, [(0, 0, 50), (50, 0, 50), (0, 50, 50), (50, 50, 50)]),
    ],
)
def test_cells_stand_in_rows_of_two_in_the_middle(count: int, expected: list[tuple[int, int, int]]) -> None:
    cells = lay_out([EVEN] * count, 100, 100)

    assert [(c.left, c.top, c.side) for c in cells] == expected


def test_cells_are_square_on_a_wide_canvas() -> None:
    (cell,) = lay_out([EVEN], 200, 100)

    assert (cell.left, cell.top, cell.side) == (50, 0, 100)


def test_the_embedded_set_has_a_picture_for_each_caption() -> None:
    denoiser = EmojiDenoiser.embedded()

    assert denoiser.sprites.shape == (len(denoiser.config.captions), 3, 64, 64)
    assert denoiser.sprites.flatten(1).std(dim=1).min() > 0.05  # none is blank
