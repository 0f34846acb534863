from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
import torch
from diffusers import DDIMScheduler

from safeguard.demo.emoji_denoiser import EmojiDenoiser
from safeguard.demo.emoji_pipeline import EmojiPipeline

SIDE = 64


@pytest.fixture(scope="module")
def pipe() -> EmojiPipeline:
    return EmojiPipeline.embedded()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(pipe: EmojiPipeline, prompt: Any, **options: Any) -> Any:
    """Arrays (picture, height, width, 3) in [0, 1]."""
    return pipe(prompt, SIDE, SIDE, 8, output_type="np", **{"generator": seeded(), **options}).images


def nearest(pipe: EmojiPipeline, picture: Any) -> str:
    """Caption of the emoji nearest to a picture of a single one."""
    wanted = torch.from_numpy(picture * 2 - 1).permute(2, 0, 1).flatten()
    distances = (pipe.denoiser.tiles(SIDE).pixels - wanted).square().sum(dim=1)
    return str(pipe.denoiser.config.captions[int(distances.argmin())])


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a red car", "red car"),
        ("a slice of pizza", "slice of pizza"),
        ("a knife", "kitchen knife"),
        ("somebody smoking", "cigarette"),
    ],
)
def test_the_picture_is_what_was_asked_for(pipe: EmojiPipeline, prompt: str, caption: str) -> None:
    assert nearest(pipe, pixels(pipe, prompt)[0]) == caption


def test_a_cat_is_one_of_the_cats(pipe: EmojiPipeline) -> None:
    assert {nearest(pipe, picture) for picture in pixels(pipe, ["a cat"] * 4)} <= {
        "cat",
        "cat face",
        "black cat",
    }


def test_the_same_seed_gives_the_same_picture(pipe: EmojiPipeline) -> None:
    assert np.array_equal(pixels(pipe, "beer"), pixels(pipe, "beer"))


def test_seeds_choose_among_what_is_as_likely(pipe: EmojiPipeline) -> None:
    found = {nearest(pipe, picture) for picture in pixels(pipe, ["beer"] * 12)}

    assert found == {"mug of beer", "two mugs of beer"}


def test_an_item_of_a_batch_equals_the_picture_alone(pipe: EmojiPipeline) -> None:
    noise = torch.randn(2, 3, SIDE, SIDE, generator=seeded())

    both = pixels(pipe, ["a cat", "a dog"], latents=noise)
    alone = pixels(pipe, "a dog", latents=noise[1:])

    assert np.allclose(both[1], alone[0], atol=1e-5)


def test_several_pictures_of_each_prompt_stand_together(pipe: EmojiPipeline) -> None:
    found = pixels(pipe, ["a red car", "a knife"], num_images_per_prompt=2)

    assert [nearest(pipe, p) for p in found] == ["red car", "red car", "kitchen knife", "kitchen knife"]


def test_pil_pictures_have_the_size_asked_for(pipe: EmojiPipeline) -> None:
    (picture,) = pipe("a cat", height=32, width=48, num_inference_steps=2).images

    assert isinstance(picture, Image.Image)
    assert picture.size == (48, 32)


def test_tensors_are_channel_first_in_zero_to_one(pipe: EmojiPipeline) -> None:
    found = pipe("a cat", SIDE, SIDE, 2, output_type="pt", generator=seeded()).images

    assert found.shape == (1, 3, SIDE, SIDE)
    assert 0 <= found.min() < found.max() <= 1


def test_a_tuple_comes_back_where_no_dict_is_wanted(pipe: EmojiPipeline) -> None:
    (images,) = pipe("a cat", SIDE, SIDE, 2, return_dict=False)

    assert len(images) == 1


def test_the_negative_prompt_keeps_a_thing_out(pipe: EmojiPipeline) -> None:
    assert nearest(pipe, pixels(pipe, "a knife and a red car", negative_prompt="knife")[0]) == "red car"


def test_a_callback_sees_each_step_and_may_change_it(pipe: EmojiPipeline) -> None:
    steps: list[int] = []

    def blank(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": torch.ones_like(values["latents"])}

    found = pixels(pipe, "a cat", callback_on_step_end=blank)

    assert steps == list(range(8))
    assert found.min() == 1  # white, as the last callback said


def test_a_saved_pipeline_loads_and_gives_the_same_picture(pipe: EmojiPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = EmojiPipeline.from_pretrained(tmp_path)

    assert np.array_equal(pixels(loaded, "a cat"), pixels(pipe, "a cat"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 8}, "sides must be 32 to 1024 pixels, got 128 x 8"),
        ({"num_inference_steps": 0}, "must be 1 or more, got 0 and 1"),
        ({"num_images_per_prompt": 0}, "must be 1 or more, got 20 and 0"),
        ({"output_type": "latent"}, "output_type must be one of pil, np, pt, got 'latent'"),
        ({"negative_prompt": ["a", "b"]}, r"one negative prompt per prompt \(1\) or a single one, got 2"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must be \(1, 3, 128, 128\), got \(1, 4, 8, 8\)"),
    ],
)
def test_wrong_arguments_are_refused(pipe: EmojiPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **options)


def test_a_scheduler_for_noise_predictions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have prediction_type 'sample'.*got 'epsilon'"):
        EmojiPipeline(EmojiDenoiser(), DDIMScheduler())
