"""Safe Latent Diffusion on real, tiny, random pipelines."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch

from safeguard import Guard
from safeguard.decoding.safety_guidance import (
    CONCEPT,
    PRESETS,
    SafetyGuidance,
    SafetySettings,
    safety_guidance,
)
from tests.adapters import tiny_pipelines

STEPS = 4
SMALL = SafetySettings(1, 3.0, 0.05, 0.3, 0.4)  # one of four steps is warm-up, and not everything saturates


def picture(pipe: Any, prompt: Any = "a cat", **how: Any) -> torch.Tensor:
    """Latents of one call."""
    torch.manual_seed(0)
    given = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": 32, "width": 32, **how}
    latents: torch.Tensor = pipe(prompt, output_type="latent", **given).images
    return latents


def by_the_paper(pipe: Any, prompt: str, settings: SafetySettings, *, guidance: float = 5.0) -> torch.Tensor:
    """The paper's algorithm, written out step by step with three separate calls of the UNet."""
    torch.manual_seed(0)

    def encoded(text: str) -> torch.Tensor:
        ids = pipe.tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        states: torch.Tensor = pipe.text_encoder(ids.input_ids)[0]
        return states

    wanted, nothing, unsafe = encoded(prompt), encoded(""), encoded(CONCEPT)
    x = torch.randn(1, 4, 16, 16)
    pipe.scheduler.set_timesteps(STEPS)
    nu = torch.zeros_like(x)
    for i, t in enumerate(pipe.scheduler.timesteps):
        with torch.no_grad():
            e_u, e_p, e_s = (
                pipe.unet(x, t, encoder_hidden_states=c).sample for c in (nothing, wanted, unsafe)
            )
        mu = torch.minimum((e_p - e_s).abs() * settings.scale, torch.ones(()))
        mu[(e_p - e_s) >= settings.threshold] = 0
        g = mu * (e_s - e_u) + settings.momentum_scale * nu
        nu = settings.momentum_beta * nu + (1 - settings.momentum_beta) * g
        applied = g if i >= settings.warmup_steps else torch.zeros_like(g)
        x = pipe.scheduler.step(e_u + guidance * ((e_p - e_u) - applied), t, x).prev_sample
    return x


def test_one_step_is_the_papers_formula() -> None:
    # prompt - concept: -.5 -> share min(.5 x 1, 1) = .5; .2 >= .1 -> 0; -3 -> 1 (cut)
    # (concept - plain) share + .5 nu: 1 x .5 + .5 = 1; 0 + .5 = .5; 2 x 1 - 1 = 1
    # nu: .25 nu + .75 g: .25 + .75 = 1; .25 + .375 = .625; -.5 + .75 = .25
    guidance, momentum = safety_guidance(
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([0.5, 1.2, 0.0]),
        torch.tensor([1.0, 1.0, 3.0]),
        torch.tensor([1.0, 1.0, -2.0]),
        SafetySettings(0, 1.0, 0.1, 0.5, 0.25),
    )
    assert guidance.tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert momentum.tolist() == pytest.approx([1.0, 0.625, 0.25])


def test_presets_are_those_of_the_paper() -> None:
    # delta, s_S, lambda, s_m, beta_m
    assert PRESETS["weak"] == SafetySettings(15, 20, 0.0, 0.0, 0.0)
    assert PRESETS["medium"] == SafetySettings(10, 1000, 0.01, 0.3, 0.4)
    assert PRESETS["strong"] == SafetySettings(7, 2000, 0.025, 0.5, 0.7)
    assert PRESETS["max"] == SafetySettings(0, 5000, 1.0, 0.5, 0.7)


@pytest.mark.parametrize("settings", [SMALL, PRESETS["max"]], ids=["small", "max"])
def test_pipeline_gives_what_the_paper_written_out_gives(settings: SafetySettings) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    bare = picture(pipe)
    with SafetyGuidance(settings).during(pipe):
        guided = picture(pipe)
    assert torch.allclose(guided, by_the_paper(pipe, "a cat", settings), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(guided, bare, atol=1e-2)


def test_pipeline_gives_what_the_deprecated_pipeline_gives() -> None:
    safe = pytest.importorskip(
        "diffusers.pipelines.deprecated.stable_diffusion_safe.pipeline_stable_diffusion_safe"
    )
    pipe = tiny_pipelines.stable_diffusion()
    parts = {**pipe.components, "safety_checker": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is deprecated
        old = safe.StableDiffusionPipelineSafe(**parts)
    old._safety_text_concept = CONCEPT
    old.set_progress_bar_config(disable=True)
    kept: list[torch.Tensor] = []
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old(
            ["a cat", "a dog on a mat"],
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            height=32,
            width=32,
            callback=lambda i, t, latents: kept.append(latents),
            sld_warmup_steps=1,
            sld_guidance_scale=3.0,
            sld_threshold=0.05,
            sld_momentum_scale=0.3,
            sld_mom_beta=0.4,
        )
    with SafetyGuidance(SMALL).during(pipe):
        ours = picture(pipe, ["a cat", "a dog on a mat"])
    assert torch.allclose(ours, kept[-1], atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [tiny_pipelines.stable_diffusion, tiny_pipelines.stable_diffusion_xl, tiny_pipelines.stable_diffusion_3],
)
def test_reverted_pipeline_is_bit_for_bit_what_it_was(make: Any) -> None:
    pipe = make()
    before, kind, parts = picture(pipe), type(pipe), dict(pipe.components)
    weights = {
        n: v.clone() for n, v in (getattr(pipe, "unet", None) or pipe.transformer).state_dict().items()
    }
    guidance = SafetyGuidance("max")
    assert guidance.apply(pipe) is pipe
    guided = picture(pipe)
    assert guidance.revert(pipe) is pipe
    assert type(pipe) is kind
    assert pipe.components == parts
    after = (getattr(pipe, "unet", None) or pipe.transformer).state_dict()
    assert all(torch.equal(after[n], v) for n, v in weights.items())
    assert torch.equal(picture(pipe), before)
    assert not torch.allclose(guided, before, atol=1e-3)


def test_guided_pipeline_keeps_its_class_name_and_signature() -> None:
    pipe = SafetyGuidance().apply(tiny_pipelines.stable_diffusion())
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert isinstance(pipe, type(tiny_pipelines.stable_diffusion()))


def test_each_prompt_of_a_batch_is_guided_as_alone() -> None:
    pipe = SafetyGuidance("max").apply(tiny_pipelines.stable_diffusion())
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    both = picture(pipe, ["a cat", "a dog"], latents=noise)
    alone = torch.cat([picture(pipe, p, latents=noise[i : i + 1]) for i, p in enumerate(["a cat", "a dog"])])
    assert torch.allclose(both, alone, rtol=1e-3, atol=1e-2)  # of values up to 30; a batch rounds otherwise


def test_momentum_does_not_go_over_from_call_to_call() -> None:
    pipe = SafetyGuidance(SMALL).apply(tiny_pipelines.stable_diffusion())
    assert torch.equal(picture(pipe), picture(pipe))


def test_several_calls_in_one_block_each_begin_anew() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    with SafetyGuidance(SMALL).during(pipe):
        assert torch.equal(picture(pipe), picture(pipe))


def test_warm_up_as_long_as_the_call_changes_nothing() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    bare = picture(pipe)
    with SafetyGuidance(SafetySettings(STEPS, 5000.0, 1.0, 0.5, 0.7)).during(pipe):
        assert torch.allclose(picture(pipe), bare, atol=1e-4)  # a batch of three rounds otherwise


def test_picture_and_mask_pipelines_are_guided() -> None:
    pipe = tiny_pipelines.image_to_image()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"image": image, "num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    torch.manual_seed(0)
    bare = pipe("a cat", **given).images
    torch.manual_seed(0)
    guided = SafetyGuidance("max").apply(pipe)("a cat", **given).images
    assert not torch.allclose(guided, bare, atol=1e-3)


def test_without_classifier_free_guidance_it_refuses() -> None:
    pipe = SafetyGuidance().apply(tiny_pipelines.stable_diffusion())
    with pytest.raises(ValueError, match=r"give a guidance_scale above 1, got 1\.0"):
        picture(pipe, guidance_scale=1.0)
    assert not pipe.unet._forward_hooks


def test_another_thread_on_the_same_denoiser_is_not_guided() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    other = tiny_pipelines.stable_diffusion()
    other.unet = pipe.unet
    bare = picture(other)
    found: list[torch.Tensor] = []
    with SafetyGuidance("max").during(pipe):
        thread = threading.Thread(target=lambda: found.append(picture(other)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], bare)


def test_guidance_works_under_a_guard() -> None:
    pipe = SafetyGuidance("max").apply(tiny_pipelines.stable_diffusion())
    guided = picture(pipe)
    assert torch.equal(picture(Guard()(pipe)), guided)


def test_guidance_that_was_guarded_over_is_not_taken_off_from_below() -> None:
    guidance = SafetyGuidance()
    pipe = Guard()(guidance.apply(tiny_pipelines.stable_diffusion()))
    with pytest.raises(TypeError, match="was guarded after it; take off what came later first"):
        guidance.revert(pipe)


def test_a_second_guidance_is_refused() -> None:
    pipe = SafetyGuidance().apply(tiny_pipelines.stable_diffusion())
    with pytest.raises(TypeError, match="has safety guidance already; revert it first"):
        SafetyGuidance("weak").apply(pipe)


def test_guidance_in_guidance_is_refused() -> None:
    pipe = SafetyGuidance().apply(tiny_pipelines.stable_diffusion())
    with SafetyGuidance("weak").during(pipe), pytest.raises(TypeError, match="has safety guidance already"):
        picture(pipe)


def test_a_pipeline_without_two_halves_is_refused() -> None:
    with pytest.raises(TypeError, match="no safety guidance for FluxPipeline: its denoiser must be one of"):
        SafetyGuidance().apply(tiny_pipelines.flux())


def test_embeddings_of_another_length_are_refused() -> None:
    pipe = SafetyGuidance().apply(tiny_pipelines.stable_diffusion())
    with pytest.raises(
        ValueError, match=r"encoder_hidden_states of shape \(20, 32\), its concept has \(16, 32\)"
    ):
        picture(
            pipe, None, prompt_embeds=torch.zeros(1, 20, 32), negative_prompt_embeds=torch.zeros(1, 20, 32)
        )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((-1, 1.0, 0.0, 0.0, 0.0), "warmup_steps must be 0 or more, got -1"),
        ((0, 0.0, 0.0, 0.0, 0.0), "scale must be above 0, got 0.0"),
        ((0, 1.0, 0.0, 1.5, 0.0), r"momentum_scale must be in \[0, 1\], got 1.5"),
        ((0, 1.0, 0.0, 0.0, -0.1), r"momentum_beta must be in \[0, 1\], got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SafetySettings(*given)


def test_unknown_presets_and_empty_concepts_are_refused() -> None:
    with pytest.raises(ValueError, match="one of weak, medium, strong, max, got 'huge'"):
        SafetyGuidance("huge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must say what to keep away from, got an empty text"):
        SafetyGuidance(concept=" ")
