"""Results of pipelines are taken apart, shown to the checks and put together again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.types import Action, Report

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from safeguard.adapters.diffusers_latents import Decoder  # noqa: E402
from safeguard.adapters.diffusers_outputs import Made, piece_of, sampled  # noqa: E402

NO_DECODER = Decoder(SimpleNamespace(), (8, 8))
FINE, WITHHELD = Report(Action.ALLOW), Report(Action.BLOCK)


def test_all_frames_of_a_short_video_are_looked_at() -> None:
    assert sampled(3, 4) == [0, 1, 2]


def test_frames_of_a_long_video_are_spread_from_first_to_last() -> None:
    assert sampled(10, 4) == [0, 3, 6, 9]


def test_two_frames_are_the_first_and_the_last() -> None:
    assert sampled(100, 2) == [0, 99]


def test_tensor_from_minus_one_to_one_is_brought_to_zero_to_one() -> None:
    picture = torch.tensor([-1.0, 0.0, 1.0]).expand(3, 3, 3)
    (view,) = piece_of(picture, "pt", NO_DECODER, 16).views
    assert view[0, 0].tolist() == [0.0, 0.5, 1.0]


def test_tensor_is_handed_to_the_checks_as_it_is() -> None:
    picture = torch.rand(3, 4, 4)
    assert piece_of(picture, "pt", NO_DECODER, 16).views[0] is picture


@pytest.mark.parametrize(
    "item",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        torch.zeros(3, 4, 4),
        Image.new("RGB", (4, 4)),
    ],
)
def test_picture_has_one_view(item: Any) -> None:
    piece = piece_of(item, "np", NO_DECODER, 16)
    assert (len(piece.views), piece.unseen) == (1, None)


@pytest.mark.parametrize(
    "item",
    [
        np.zeros((5, 4, 4, 3), np.float32),
        torch.zeros(5, 3, 4, 4),
        [Image.new("RGB", (4, 4))] * 5,
        [np.zeros((4, 4, 3), np.float32)] * 5,
    ],
)
def test_video_has_a_view_for_each_sampled_frame(item: Any) -> None:
    piece = piece_of(item, "np", NO_DECODER, 3)
    assert (len(piece.views), piece.unseen) == (3, None)


@pytest.mark.parametrize(
    "item",
    [
        None,
        "a picture",
        [],
        np.zeros((2, 44100), np.float32),  # sound
        np.zeros((4, 4, 3, 2, 1), np.float32),
        torch.zeros(16, 4, 4),
        torch.zeros(4096, 64),
        [Image.new("RGB", (4, 4)), None],
    ],
)
def test_what_is_no_picture_is_unseen(item: Any) -> None:
    assert piece_of(item, "np", NO_DECODER, 16).unseen is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_in_a_late_frame_is_unseen(value: float) -> None:
    video = np.zeros((40, 4, 4, 3), np.float32)
    video[39, 0, 0, 0] = value
    assert piece_of(video, "np", NO_DECODER, 16).unseen == "output holds NaN or infinite values"


def test_three_part_tuple_has_its_marks_filled_by_name() -> None:
    fields = ["images", "nsfw_detected", "watermark_detected"]
    made = Made((np.ones((2, 1, 1, 3)), [True, False], None))
    images, flags, watermark = made.assemble([made.items[0], np.zeros((1, 1, 3))], [FINE, WITHHELD], fields)
    assert images[:, 0, 0, 0].tolist() == [1, 0]
    assert (flags, watermark) == ([True, True], None)


def test_untouched_result_is_the_very_object() -> None:
    images = np.ones((2, 1, 1, 3))
    made = Made((images,))
    assert made.assemble(made.items, [FINE, FINE], ["images"])[0] is images


def test_part_that_cannot_be_told_apart_is_withheld_whole() -> None:
    made = Made((np.ones((2, 1, 1, 3)), torch.ones(2 * 3)))
    _, sound = made.assemble([made.items[0], np.zeros((1, 1, 3))], [FINE, WITHHELD], ["frames", "audio"])
    assert sound.tolist() == [0] * 6


def test_single_picture_comes_back_single() -> None:
    black = Image.new("RGB", (4, 4))
    made = Made(SimpleNamespace(images=Image.new("RGB", (4, 4), "white")))
    assert made.assemble([black], [WITHHELD], ["images"]).images is black


def test_result_without_pictures_is_emptied_when_withheld() -> None:
    made = Made((np.ones((1, 44100)),))
    assert not made.readable
    assert made.assemble(made.items, [WITHHELD], ["audios"]) == (None,)


def test_result_with_pictures_in_two_places_is_read_in_neither() -> None:
    made = Made(
        SimpleNamespace(images=[Image.new("RGB", (8, 8))], frames=[Image.new("RGB", (8, 8), "white")])
    )
    assert not made.readable
