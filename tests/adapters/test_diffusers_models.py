"""The real pipeline classes of diffusers, from small random weights, guarded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import safeguard
from safeguard import Blocked, Guard, Policy, UnseenInput
from safeguard.policy import OutputRules, Rules
from safeguard.testing import BrightCheck, WordCheck

pytest.importorskip("diffusers")
import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from safeguard.adapters.diffusers_latents import Decoder
from tests.adapters import tiny_pipelines as tiny

# said by image to image where one picture serves several prompts
pytestmark = pytest.mark.filterwarnings("ignore:You have passed:FutureWarning")

RED = Image.new("RGB", (32, 32), "red")
SIZES: dict[str, int] = {"height": 32, "width": 32}
WAYS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable diffusion": (tiny.stable_diffusion, SIZES),
    "image to image": (tiny.image_to_image, {"image": RED, "strength": 1.0}),
    "inpainting": (tiny.inpainting, {"image": RED, "mask_image": Image.new("L", (32, 32), 255), **SIZES}),
    "sdxl": (tiny.stable_diffusion_xl, SIZES),
    "sd3": (tiny.stable_diffusion_3, SIZES),
    "flux": (tiny.flux, {"max_sequence_length": 16, **SIZES}),
    "pixart": (tiny.pixart, {"use_resolution_binning": False, "clean_caption": False, **SIZES}),
    "wan": (tiny.wan, {"num_frames": 9, "height": 16, "width": 16, "max_sequence_length": 16}),
}
every = pytest.mark.parametrize("kind", WAYS)
every_image = pytest.mark.parametrize("kind", [kind for kind in WAYS if kind != "wan"])


def build(kind: str, *, brightest: float = 0.9, **policy: Any) -> tuple[Any, dict[str, Any]]:
    """A guarded pipeline and what to call it with. Random weights paint a grey near 0.5."""
    make, arguments = WAYS[kind]
    rules = OutputRules(image=Rules(threshold=brightest))
    guard = Guard([WordCheck("knife")], [BrightCheck()], policy=Policy(output=rules, **policy))
    return guard(make()), arguments | {"num_inference_steps": 2, "output_type": "np"}


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@every
def test_safe_call_gives_what_the_bare_pipeline_gives(kind: str) -> None:
    pipe, arguments = build(kind)
    out = pipe(prompt="a cat", generator=seed(), **arguments)
    bare = WAYS[kind][0]()(prompt="a cat", generator=seed(), **arguments)
    assert type(out) is type(bare)
    assert np.array_equal(out[0], bare[0])
    assert len(out.safety) == 1


@every
def test_unsafe_prompt_is_refused(kind: str) -> None:
    pipe, arguments = build(kind)
    with pytest.raises(Blocked, match="words: bad"):
        pipe(prompt="a knife", **arguments)


@every
def test_unsafe_result_is_replaced(kind: str) -> None:
    pipe, arguments = build(kind, brightest=0.2, on_block="replace")
    out = pipe(prompt=["a cat", "a dog"], **arguments)
    assert out[0].shape[0] == 2
    assert out[0].max() == 0
    assert [r.blocked for r in out.safety] == [True, True]


@every
def test_refused_prompt_alone_gives_a_placeholder_of_the_right_class_and_size(kind: str) -> None:
    pipe, arguments = build(kind, on_block="replace")
    bare = WAYS[kind][0]()(prompt="a cat", **arguments)
    out = pipe(prompt="a knife", **arguments)
    assert type(out) is type(bare)
    assert out[0].shape == bare[0].shape
    assert out[0].max() == 0


@every
def test_neighbour_of_a_refused_prompt_is_made_as_if_alone_in_its_place(kind: str) -> None:
    pipe, arguments = build(kind, on_block="replace")
    out = pipe(prompt=["a knife", "a cat"], generator=[seed(0), seed(1)], **arguments)
    bare = WAYS[kind][0]()(prompt=["", "a cat"], generator=[seed(0), seed(1)], **arguments)
    assert out[0][0].max() == 0
    assert np.array_equal(out[0][1], bare[0][1])


@every
def test_prompt_embeds_are_refused(kind: str) -> None:
    pipe, arguments = build(kind)
    with pytest.raises(UnseenInput, match="prompt_embeds cannot be seen"):
        pipe(prompt_embeds=torch.zeros(1, 16, 32), **arguments)


@every
def test_regenerated_result_is_made_for_its_row(kind: str) -> None:
    arguments = build(kind)[1]
    strict = OutputRules(image=Rules(threshold=0.2, action=safeguard.Action.REGENERATE))
    twin = Guard(outputs=[BrightCheck()], policy=Policy(output=strict, on_block="replace", max_rounds=1))
    pipe = twin(WAYS[kind][0]())
    out = pipe(prompt=["a cat", "a dog"], generator=[seed(0), seed(1)], **arguments)
    assert [r.rounds for r in out.safety] == [1, 1]


@every_image
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_every_output_type_is_judged(kind: str, output_type: str) -> None:
    pipe, arguments = build(kind, brightest=0.2, on_block="replace")
    out = pipe(prompt="a cat", **arguments | {"output_type": output_type})
    assert out.safety[0].flagged == ("bright",)
    assert np.asarray(out[0][0]).max() == 0


@every_image
def test_latent_is_judged_as_the_picture_that_it_becomes(kind: str) -> None:
    pipe, arguments = build(kind)
    picture = pipe(prompt="a cat", generator=seed(), **arguments)
    latent = pipe(prompt="a cat", generator=seed(), **arguments | {"output_type": "latent"})
    brightness = [out.safety[0].final[-1].scores["bright"] for out in (picture, latent)]
    assert brightness[0] == pytest.approx(brightness[1], abs=1e-4)
    assert torch.is_tensor(latent[0])
    assert latent[0].abs().max() > 0


@every_image
def test_refused_latent_has_the_shape_of_the_others(kind: str) -> None:
    pipe, arguments = build(kind, on_block="replace")
    arguments["output_type"] = "latent"
    assert pipe(prompt="a knife", **arguments)[0].shape == pipe(prompt="a cat", **arguments)[0].shape


@every_image
@pytest.mark.parametrize("count", [1, 3])
def test_several_pictures_per_prompt_have_a_report_each(kind: str, count: int) -> None:
    pipe, arguments = build(kind)
    out = pipe(prompt=["a cat", "a dog"], num_images_per_prompt=count, **arguments)
    assert len(out[0]) == len(out.safety) == 2 * count


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("stable diffusion", "negative_prompt"),
        ("sdxl", "prompt_2"),
        ("sdxl", "negative_prompt_2"),
        ("sd3", "prompt_3"),
        ("flux", "prompt_2"),
        ("wan", "negative_prompt"),
    ],
)
def test_further_text_arguments_are_judged(kind: str, name: str) -> None:
    pipe, arguments = build(kind)
    with pytest.raises(Blocked) as caught:
        pipe(prompt="a cat", **{name: "a knife"}, **arguments)
    assert [v.source for v in caught.value.report.verdicts if v.flagged] == [name]


def test_one_negative_prompt_for_a_batch() -> None:
    pipe, arguments = build("sdxl")
    out = pipe(prompt=["a cat", "a dog"], negative_prompt="a hat", **arguments)
    assert len(out.safety) == 2


# --- video ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_video_in_every_form_is_judged_by_its_frames(output_type: str) -> None:
    pipe, arguments = build("wan", brightest=0.2, on_block="replace")
    out = pipe(prompt="a cat", **arguments | {"output_type": output_type})
    assert len(out.frames[0]) == 9
    assert max(np.asarray(frame).max() for frame in out.frames[0]) == 0
    assert len(out.safety) == 1


def test_video_latents_are_closed() -> None:
    pipe, arguments = build("wan")
    with pytest.raises(UnseenInput, match="use output_type='pil'"):
        pipe(prompt="a cat", **arguments | {"output_type": "latent"})


def test_refused_video_is_as_many_black_frames() -> None:
    pipe, arguments = build("wan", on_block="replace")
    frames = pipe(prompt="a knife", **arguments | {"output_type": "pil"}).frames
    assert [frame.size for frame in frames[0]] == [(16, 16)] * 9


# --- the pipeline's own safety checker ------------------------------------------------------------


def test_what_the_pipeline_withheld_itself_stays_marked() -> None:
    pipe, arguments = build("stable diffusion", on_block="replace")

    def checker(images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        return images * 0, [True] * len(images)

    pipe.run_safety_checker = lambda image, device, dtype: checker(image, None)
    images, flags = pipe(prompt=["a cat", "a knife"], return_dict=False, **arguments)
    assert flags == [True, True]
    assert images.max() <= 0.5  # 0 before the VAE processor, which makes it the middle grey


def test_pipelines_without_a_checker_get_their_field_filled() -> None:
    pipe, arguments = build("stable diffusion", on_block="replace")
    out = pipe(prompt=["a cat", "a knife"], **arguments)
    assert out.nsfw_content_detected == [False, True]
    assert out.to_tuple()[1] == [False, True]


# --- what the pipeline stays ----------------------------------------------------------------------


def test_saved_pipeline_names_its_own_class(tmp_path: Path) -> None:
    pipe, _ = build("stable diffusion")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(loaded) is StableDiffusionPipeline  # what is loaded is not guarded


def test_pipeline_from_components_is_not_guarded() -> None:
    pipe, arguments = build("stable diffusion")
    other = tiny._quiet(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    assert len(other(prompt="a knife", **arguments).images) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # AutoPipeline imports Kolors
@pytest.mark.parametrize("maker", ["StableDiffusionImg2ImgPipeline", "AutoPipelineForImage2Image"])
def test_pipeline_that_another_class_makes_of_it_is_not_guarded(maker: str) -> None:
    pipe, _ = build("stable diffusion")
    other = getattr(diffusers, maker).from_pipe(pipe)
    assert type(other) is StableDiffusionImg2ImgPipeline
    tiny._quiet(other)
    assert len(other(prompt="a knife", image=RED, num_inference_steps=2, output_type="np").images) == 1


def test_pipeline_made_by_the_guarded_class_is_guarded() -> None:
    pipe, arguments = build("stable diffusion")
    twin = type(pipe)(**pipe.components, requires_safety_checker=False)
    with pytest.raises(Blocked):
        twin(prompt="a knife", **arguments)


def test_guarded_pipeline_moves_changes_precision_and_slices() -> None:
    pipe, arguments = build("stable diffusion")
    pipe.to("cpu", torch.float64).to("cpu", torch.float32).vae.enable_slicing()
    pipe.enable_attention_slicing()
    assert isinstance(pipe, StableDiffusionPipeline)
    assert len(pipe(prompt=["a cat", "a dog"], **arguments).images) == 2


def test_callback_sees_every_step() -> None:
    pipe, arguments = build("stable diffusion")
    steps: list[int] = []

    def note(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return values

    pipe(prompt="a cat", callback_on_step_end=note, **arguments)
    assert steps == [0, 1]


def test_latents_in_half_precision_are_decoded_in_single_precision() -> None:
    pipe, arguments = build("sdxl")
    pipe.to(torch.float16)
    assert pipe.vae.config.force_upcast
    out = pipe(prompt="a cat", **arguments | {"output_type": "latent"})
    assert out.images.dtype == pipe.vae.dtype == torch.float16
    assert out.safety[0].final[-1].scores["bright"] == pytest.approx(0.48, abs=0.1)


def test_latents_with_a_mean_and_deviation_are_decoded_with_them() -> None:
    pipe, arguments = build("sdxl")
    pipe.vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[3.0] * 4)
    picture = pipe(prompt="a cat", generator=seed(), **arguments)
    latent = pipe(prompt="a cat", generator=seed(), **arguments | {"output_type": "latent"})
    brightness = [out.safety[0].final[-1].scores["bright"] for out in (picture, latent)]
    assert brightness[0] == pytest.approx(brightness[1], abs=1e-4)


def test_packed_latents_of_another_size_than_asked_for_are_closed() -> None:
    decoder = Decoder(tiny.flux(), (32, 256))  # width and height; a patch is 4 x 4 pixels
    assert decoder(torch.zeros(64, 16)) is None
    assert decoder(torch.zeros(512, 16)).shape == (3, 256, 32)


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_offload_hooks_hold(output_type: str) -> None:
    pipe, arguments = build("stable diffusion")
    pipe.enable_model_cpu_offload(device="cpu")
    assert len(pipe(prompt="a cat", **arguments | {"output_type": output_type}).safety) == 1
    with pytest.raises(Blocked):
        pipe(prompt="a knife", **arguments)


class OwnVae(AutoencoderKL):  # type: ignore[misc]  # diffusers has no types
    """A VAE of which nobody knows how its pipeline scales latents."""


def test_latents_of_an_unknown_vae_are_closed() -> None:
    pipe, arguments = build("stable diffusion")
    pipe.vae.__class__ = OwnVae
    with pytest.raises(UnseenInput, match="use output_type='pil'"):
        pipe(prompt="a cat", **arguments | {"output_type": "latent"})
