"""The probe saves the steps of pictures that will be blocked, and never lets anything through."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from PIL import Image

import safeguard
from safeguard import Blocked, CheckFailed, Guard, Policy
from safeguard.errors import PolicyError
from safeguard.testing import WordCheck
from safeguard.types import Modality, Scores
from tests.adapters import tiny_pipelines as tiny
from tests.adapters.painter import Painter

STEPS = 8


class Scripted:
    """Scores pictures one after the other from a list, 0 when it is used up; keeps what it was given."""

    name = "scripted"
    modality: Modality = "image"

    def __init__(self, *scores: float) -> None:
        self._scores = list(scores)
        self.seen: list[Any] = []

    def __call__(self, batch: Sequence[Any], /) -> list[Scores]:
        self.seen += batch
        return [{"bad": self._scores.pop(0) if self._scores else 0.0} for _ in batch]


class Counter:
    """Counts the steps of a denoiser."""

    def __init__(self, pipe: Any) -> None:
        self.steps = 0
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        denoiser.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1


def guarded(
    check: Scripted, make: Callable[[], Any] = tiny.stable_diffusion, *, policy: Any = None, **probe: Any
) -> tuple[Any, Counter]:
    rules = {"every": 2, "from_step": 3} | probe
    guard = Guard([WordCheck("knife")], [check], policy=Policy.from_data({"probe": rules, **(policy or {})}))
    pipe = make()
    return guard(pipe), Counter(pipe)


def run(pipe: Any, prompt: Any = "a", **how: Any) -> Any:
    return pipe(prompt, num_inference_steps=STEPS, guidance_scale=1.0, **how)


def test_flagged_preview_stops_the_run_and_the_report_says_where() -> None:
    pipe, count = guarded(Scripted(0.9))
    with pytest.raises(Blocked, match=r"scripted: bad 0.90 \(stopped at step 3 of 8\)") as caught:
        run(pipe)
    assert count.steps == 3  # of 8: the first look is after the third
    coverage = caught.value.report.verdicts[-1].coverage
    assert coverage is not None
    assert (coverage.unit, coverage.checked, coverage.total) == ("steps", 3, 8)
    assert caught.value.report.verdicts[-1].flagged == ("bad",)
    assert not caught.value.report.failed


def test_later_looks_come_every_so_many_steps() -> None:
    check = Scripted(0.0, 0.9)
    pipe, count = guarded(check)
    with pytest.raises(Blocked):
        run(pipe)
    assert count.steps == 5
    assert [tuple(seen.shape) for seen in check.seen] == [(3, 32, 32)] * 2


def test_picture_that_the_probe_passes_is_judged_when_it_is_finished() -> None:
    check = Scripted(0.0, 0.0, 0.0, 0.9)  # looks after the steps 3, 5 and 7, then the picture itself
    pipe, count = guarded(check)
    with pytest.raises(Blocked, match=r"bad 0\.90"):
        run(pipe)
    assert count.steps == STEPS
    assert isinstance(check.seen[-1], Image.Image)


def test_clean_picture_is_the_one_that_is_made_without_a_probe() -> None:
    plain = run(tiny.stable_diffusion(), generator=torch.Generator().manual_seed(1), output_type="pt")
    pipe, _ = guarded(Scripted())
    probed = run(pipe, generator=torch.Generator().manual_seed(1), output_type="pt")
    assert torch.equal(plain.images, probed.images)


def test_without_rules_there_is_no_look() -> None:
    check = Scripted(0.0)
    pipe, count = guarded(check, every=0)
    run(pipe)
    assert (count.steps, len(check.seen)) == (STEPS, 1)


def test_batch_goes_on_while_one_picture_is_not_flagged() -> None:
    # looks at two pictures after 3, 5 and 7; then the finished ones, of which the second is flagged
    check = Scripted(0.9, 0.0, 0.9, 0.0, 0.9, 0.0, 0.0, 0.9)
    pipe, count = guarded(check, policy={"on_block": "replace"})
    output = run(pipe, ["a", "b"])
    assert count.steps == STEPS
    assert [r.blocked for r in output.safety] == [False, True]


def test_batch_stops_when_all_pictures_are_flagged_at_one_look() -> None:
    pipe, count = guarded(Scripted(0.9, 0.0, 0.8, 0.9), policy={"on_block": "replace"})
    output = run(pipe, ["a", "b"])
    assert count.steps == 5
    assert [r.verdicts[-1].scores["bad"] for r in output.safety] == [0.8, 0.9]
    assert [image.getbbox() for image in output.images] == [None, None]  # black


def test_refused_prompt_of_a_batch_does_not_keep_the_run_going() -> None:
    check = Scripted(0.9)
    pipe, count = guarded(check, policy={"on_block": "replace"})
    output = run(pipe, ["a knife", "b"])
    assert (count.steps, len(check.seen)) == (3, 1)
    assert [r.blocked for r in output.safety] == [True, True]


def test_several_pictures_per_prompt_are_all_looked_at() -> None:
    check = Scripted(0.9, 0.9, 0.9, 0.9)
    pipe, count = guarded(check, policy={"on_block": "replace"})
    output = run(pipe, ["a", "b"], num_images_per_prompt=2)
    assert (count.steps, len(output.images), len(check.seen)) == (3, 4, 4)


def test_stopped_picture_is_made_again_where_the_policy_says_so() -> None:
    check = Scripted(0.9)  # the first is stopped after 3 steps, the second runs to its end
    pipe, count = guarded(check, policy={"output": {"image": {"action": "regenerate"}}})
    output = run(pipe)
    assert count.steps == 3 + STEPS
    assert output.safety[0].rounds == 1
    assert not output.safety[0].blocked


def test_threshold_of_its_own_stops_only_what_is_surer() -> None:
    pipe, count = guarded(Scripted(0.6, 0.6, 0.6, 0.0), threshold=0.8)
    run(pipe)
    assert count.steps == STEPS


def test_threshold_below_that_of_the_surface_changes_nothing() -> None:
    pipe, count = guarded(Scripted(0.3, 0.3, 0.3, 0.3), threshold=0.1)
    assert not run(pipe).safety[0].blocked
    assert count.steps == STEPS


def test_monitor_mode_stops_nothing() -> None:
    pipe, count = guarded(Scripted(0.9, 0.9, 0.9, 0.9), policy={"mode": "monitor"})
    run(pipe)
    assert count.steps == STEPS


@pytest.mark.parametrize("score", [math.nan, 7.0])
def test_check_that_fails_on_a_preview_leaves_it_to_the_finished_picture(score: float) -> None:
    pipe, count = guarded(Scripted(score, 0.0, 0.0, score))
    with pytest.raises(CheckFailed):
        run(pipe)
    assert count.steps == STEPS


def test_users_callback_runs_and_sees_what_it_asked_for() -> None:
    seen: list[tuple[int, list[str]]] = []

    def own(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, sorted(tensors)))
        return tensors

    pipe, count = guarded(Scripted(0.0, 0.9))
    with pytest.raises(Blocked):
        run(pipe, callback_on_step_end=own, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(step, ["prompt_embeds"]) for step in range(5)]
    assert count.steps == 5


def test_latents_that_the_users_callback_changed_are_looked_at() -> None:
    def black(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    check = Scripted()
    pipe, _ = guarded(check)
    run(pipe, callback_on_step_end=black)
    assert torch.equal(check.seen[0], check.seen[1])  # of two different steps


def test_callback_object_of_the_library_keeps_its_own_tensors() -> None:
    class Own(PipelineCallback):  # type: ignore[misc]  # diffusers has no types
        seen: list[list[str]] = []  # noqa: RUF012  # only this test has it

        @property
        def tensor_inputs(self) -> list[str]:
            return ["prompt_embeds"]

        def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Any) -> Any:
            self.seen.append(sorted(callback_kwargs))
            return callback_kwargs

    pipe, count = guarded(Scripted(0.9))
    with pytest.raises(Blocked):
        run(pipe, callback_on_step_end=Own())
    assert (Own.seen, count.steps) == ([["prompt_embeds"]] * 3, 3)


@pytest.mark.parametrize("make", [tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.flux])
def test_other_families_are_stopped_too(make: Callable[[], Any]) -> None:
    pipe, count = guarded(Scripted(0.9), make)
    with pytest.raises(Blocked, match="stopped at step 3 of 8"):
        run(pipe, height=32, width=32)
    assert count.steps == 3


def test_linear_map_takes_the_place_of_the_vae_after_the_first_look() -> None:
    check = Scripted()
    pipe, _ = guarded(check, preview="linear")
    decoded: list[int] = []
    plain = pipe.vae.decode

    def decode(z: Any, **how: Any) -> Any:
        decoded.append(len(z))
        return plain(z, **how)

    pipe.vae.decode = decode
    run(pipe)
    assert len(decoded) == 2  # at the first look, and at the end
    assert [tuple(s.shape) for s in check.seen[:3]] == [(3, 32, 32), (3, 16, 16), (3, 16, 16)]


def test_linear_map_is_that_of_a_decoder_that_is_linear() -> None:
    from safeguard.adapters.diffusers_probe import _fitted, _mapped

    torch.manual_seed(0)
    colours = torch.tensor([[0.2, 0.0, 0.1], [0.0, 0.1, 0.0], [0.5, 0.4, 0.3]])  # two channels and a base
    latents = [torch.randn(2, 8, 8).clamp(-1, 1) for _ in range(2)]
    pictures = [
        _mapped(latent, colours).repeat_interleave(2, 1).repeat_interleave(2, 2) for latent in latents
    ]
    assert torch.allclose(_fitted(latents, pictures), colours, atol=1e-3)


def test_pipeline_without_a_callback_says_that_there_is_no_probe(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(outputs=[Scripted()], policy=Policy.from_data({"probe": {"every": 1}}))
    with caplog.at_level(logging.WARNING, logger="safeguard"):
        pipe = guard(Painter())
    assert "no probe" in caplog.text
    assert "Painter has no callback_on_step_end" in caplog.text
    assert not pipe(prompt="grey").safety[0].blocked


def test_pipeline_without_a_callback_is_refused_where_the_policy_says_so() -> None:
    policy = Policy.from_data({"probe": {"every": 1, "unavailable": "error"}})
    with pytest.raises(PolicyError, match=r"probe\.every is 1, but Painter has no callback_on_step_end; set"):
        Guard(outputs=[Scripted()], policy=policy)(Painter())


def test_video_whose_latents_cannot_be_decoded_is_judged_when_it_is_finished(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="safeguard"):
        guarded(Scripted(), tiny.wan)
    assert "the latents of WanPipeline cannot be decoded" in caplog.text


def test_calls_at_different_times_share_nothing() -> None:
    pipe, count = guarded(Scripted(0.9))
    with pytest.raises(Blocked):
        run(pipe)
    with safeguard.capture() as reports:
        run(pipe)
    assert count.steps == 3 + STEPS
    assert [r.blocked for r in reports] == [False]
