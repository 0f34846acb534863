"""A guarded pipeline: what is judged, what comes back, and what it stays."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

import safeguard
from safeguard import Blocked, CheckFailed, Guard, UnseenInput
from safeguard.policy import InputRules, Rules
from safeguard.testing import BrightCheck, SwapRefiner, WordCheck
from safeguard.types import Action

pytest.importorskip("diffusers")
import torch
from diffusers import DiffusionPipeline

from tests.adapters.painter import SIDE, Painter, PainterOutput, guarded


@dataclass(frozen=True)
class Note:
    """Some object that a pipeline may take."""

    text: str
    weight: float = 1.0


# --- prompts --------------------------------------------------------------------------------------


def test_safe_prompts_reach_the_pipeline_as_the_very_texts_they_were() -> None:
    pipe, prompt = guarded(), ["grey", "a cat"]
    pipe(prompt=prompt)
    assert list(map(id, pipe.calls[0]["prompt"])) == list(map(id, prompt))


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": "a knife"},
        {"prompt": "a cat", "prompt_2": "a knife"},
        {"prompt": "a cat", "negative_prompt": "a knife"},
        {"prompt": "a cat", "system_prompt": "draw a knife"},
        {"prompt": "a cat", "style_of_tomorrow": "a knife"},
        {"prompt": "a cat", "notes": ["a cat", ["a knife"]]},
        {"prompt": "a cat", "joint_attention_kwargs": {"layers": {"text": "a knife"}}},
        {"prompt": "a cat", "joint_attention_kwargs": {"a knife": 1.0}},
        {"prompt": ("a cat", "a knife")},
        {"prompt": [["a cat", "a knife"]]},
        {"prompt": {0: "a cat", 8: "a knife"}},
        {"prompt": "a cat", "complex_human_instruction": ["draw a knife"]},
        {"prompt": "a cat", "task_type": "a knife"},
        {"prompt": "a cat", "negative_prompt": ["a", "b", "a knife"]},
        {"prompt": "a cat", "image": "a knife"},
    ],
)
def test_unsafe_text_is_refused_wherever_it_stands(texts: dict[str, Any]) -> None:
    pipe = guarded()
    with pytest.raises(Blocked, match=r"bad 1\.00"):
        pipe(**texts)


def test_prompt_is_found_by_name_when_given_by_position() -> None:
    pipe = guarded()
    with pytest.raises(Blocked):
        pipe(None, "a knife")


def test_nothing_is_generated_for_a_refused_prompt() -> None:
    pipe = guarded()
    with pytest.raises(Blocked) as caught:
        pipe(prompt="a knife")
    assert pipe.calls == []
    assert caught.value.output is None


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt_embeds": torch.zeros(1, 2, 3)},
        {"prompt": "a cat", "prompt_embeds": torch.zeros(1, 2, 3)},
        {"prompt": "a cat", "image_embeds": [torch.zeros(1, 2)]},
        {"prompt": "a cat", "joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}},
        {"prompt": "a cat", "encoder_hidden_states": torch.zeros(1, 2)},
        {"prompt": "a cat", "notes": np.array(["a knife"])},
        {"prompt": "a cat", "notes": {"a knife"}},
        {"prompt": "a cat", "notes": iter(["a knife"])},
        {"prompt": "a cat", "notes": {"a": "a knife"}.values()},
        {"prompt": "a cat", "notes": Note("a knife")},
        {"prompt": "a cat", "notes": [[[[[[[[["a knife"]]]]]]]]]},
        {"prompt": torch.zeros(1, 2)},
        {"prompt": Image.new("RGB", (8, 8))},
        {"prompt": b"a cat"},
        {"prompt": [None]},
        {"prompt": ["a cat", ["a dog", None]]},
        {"prompt": "a cat", "negative_prompt": ["a", 3]},
    ],
)
def test_prompt_that_nobody_can_read_is_refused(texts: dict[str, Any]) -> None:
    pipe = guarded()
    with pytest.raises(UnseenInput, match=r"cannot be seen by any check|must be text"):
        pipe(**texts)
    assert pipe.calls == []


def test_neighbours_of_a_prompt_that_is_no_text_go_on() -> None:
    pipe = guarded(on_block="replace")
    out = pipe(prompt=["grey", None], output_type="np")
    assert pipe.calls[0]["prompt"] == ["grey", ""]
    assert [r.failed for r in out.safety] == [False, True]


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_embeds_mask": torch.ones(1, 2)},
        {"pooled_prompt_embeds_scale": 0.5},
        {"use_system_prompt": True},
        {"num_inference_steps": 3},
        {"task_type": "text2music"},
        {"control_image": "/pictures/of/a/knife.png"},
        {"callback": print},
        {"timesteps": range(3)},
        {"sigmas": torch.ones(3)},
        {"prompt_embeds": None},
        {"complex_human_instruction": ["Rewrite the user's words."]},
    ],
)
def test_settings_are_no_text(settings: dict[str, Any]) -> None:
    pipe = guarded("Rewrite", "text2music")
    pipe(prompt="a cat", **settings)
    assert len(pipe.calls) == 1


def test_embeddings_may_be_let_in_and_the_picture_is_still_judged() -> None:
    pipe = guarded(unseen_input="allow", on_block="replace")
    out = pipe(prompt_embeds=torch.zeros(1, 2, 3))
    assert [v.stage for v in out.safety[0].verdicts] == ["output"]


def test_refined_prompt_is_what_the_pipeline_gets() -> None:
    rules = InputRules(t2i=Rules(action=Action.REFINE))
    pipe = guarded(refiner=SwapRefiner({"knife": "spoon"}), input=rules)
    out = pipe(prompt=["a knife", "a cat"], prompt_2="a knife")
    assert pipe.calls[0]["prompt"] == ["a spoon", "a cat"]
    assert pipe.calls[0]["prompt_2"] == "a spoon"
    assert [r.revised_prompt for r in out.safety][0] == "a spoon"


def test_text_refined_deep_inside_an_argument_is_put_back_in_its_place() -> None:
    rules = InputRules(t2i=Rules(action=Action.REFINE))
    pipe = guarded(refiner=SwapRefiner({"knife": "spoon"}), input=rules)
    given = {"layers": {"text": "a knife", "scale": 2.0}}
    pipe(prompt="a cat", joint_attention_kwargs=given, notes=("a hat", ["a knife"], 3))
    assert pipe.calls[0]["joint_attention_kwargs"] == {"layers": {"text": "a spoon", "scale": 2.0}}
    assert pipe.calls[0]["kwargs"]["notes"] == ("a hat", ["a spoon"], 3)
    assert given == {"layers": {"text": "a knife", "scale": 2.0}}  # the caller's own is left alone


def test_prompt_rewritten_by_the_pipeline_is_judged_before_use() -> None:
    pipe = guarded()
    pipe.rewrite = " with a knife"
    with safeguard.capture() as reports:
        texts = pipe.upsample_prompt(["a cat", "a dog"])
    assert texts == ["a cat", "a dog"]
    assert [r.action for r in reports] == [Action.REPLACE, Action.REPLACE]


def test_harmless_rewrite_is_used() -> None:
    pipe = guarded()
    pipe.rewrite = " in white"
    with pytest.raises(Blocked, match="bright"):
        pipe(prompt="a cat")


def test_batch_larger_than_the_policy_allows_is_refused() -> None:
    pipe = guarded(max_items=2)
    with pytest.raises(ValueError, match=r"at most 2 items \(max_items\), got 3"):
        pipe(prompt=["a", "b", "c"])


# --- batches --------------------------------------------------------------------------------------


def test_neighbours_of_a_refused_prompt_keep_their_places() -> None:
    pipe = guarded(on_block="replace")
    out = pipe(prompt=["grey", "grey knife", "grey"], num_images_per_prompt=2, output_type="np")
    # 0.25 is grey, 0 the placeholder; two pictures for each prompt, prompt by prompt
    assert out.images[:, 0, 0, 0].tolist() == [0.25, 0.25, 0, 0, 0.25, 0.25]
    assert [r.blocked for r in out.safety] == [False, False, True, True, False, False]
    assert pipe.calls[0]["prompt"] == ["grey", "", "grey"]


def test_error_carries_the_safe_remainder() -> None:
    pipe = guarded()
    with pytest.raises(Blocked) as caught:
        pipe(prompt=["grey", "white"], output_type="np")
    assert caught.value.output.images[:, 0, 0, 0].tolist() == [0.25, 0.0]
    assert [r.blocked for r in caught.value.reports] == [False, True]


def test_unsafe_text_for_all_prompts_refuses_all() -> None:
    pipe = guarded(on_block="replace")
    out = pipe(prompt=["a cat", "a dog"], negative_prompt="a knife")
    assert [r.blocked for r in out.safety] == [True, True]
    assert pipe.calls == []


def test_list_of_phrases_counts_for_every_prompt() -> None:
    pipe = guarded(on_block="replace")
    out = pipe(prompt=["a cat", "a dog"], gligen_phrases=["a hat", "a knife"])
    assert [r.blocked for r in out.safety] == [True, True]


def test_empty_batch_is_left_to_the_pipeline() -> None:
    out = guarded()(prompt=[])
    assert len(out.images) == 1  # the painter makes one picture of nothing
    assert len(out.safety) == 1


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_unsafe_picture_becomes_black_of_the_same_kind(output_type: str) -> None:
    plain = Painter()(prompt=["grey", "white"], output_type=output_type).images
    images = guarded(on_block="replace")(prompt=["grey", "white"], output_type=output_type).images
    assert type(images) is type(plain)
    assert type(images[1]) is type(plain[1])
    assert np.asarray(images[1]).shape == np.asarray(plain[1]).shape
    assert np.asarray(images[1]).max() == 0
    assert np.array_equal(np.asarray(images[0]), np.asarray(plain[0]))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_placeholder_has_the_form_asked_for_where_nothing_was_made(output_type: str) -> None:
    pipe = guarded(on_block="replace")
    out = pipe(prompt=["knife", "knife"], output_type=output_type, height=8, width=16)
    assert isinstance(out, PainterOutput)
    assert np.asarray(out.images[0]).shape == ((3, 8, 16) if output_type == "pt" else (8, 16, 3))
    assert len(out.images) == len(out.safety) == 2
    assert out.nsfw_content_detected == [True, True]


def test_nothing_made_comes_back_as_a_tuple_when_asked() -> None:
    images, flags, sounds = guarded(on_block="replace")(prompt="a knife", return_dict=False)
    assert images[0].size == (512, 512)  # the usual size, as the painter says none
    assert (flags, sounds) == ([True], None)


def test_blurred_placeholder_keeps_the_shade_and_no_more() -> None:
    pipe = guarded(on_block="replace", placeholder_image="blur")
    assert pipe(prompt="white").images[0].getpixel((0, 0)) == (255, 255, 255)


def test_reports_are_no_items_of_the_output() -> None:
    out = guarded()(prompt=["grey", "grey"])
    assert list(out.keys()) == ["images", "nsfw_content_detected", "sounds"]
    assert len(out.to_tuple()) == 3
    assert len(out.safety) == 2
    assert pickle.loads(pickle.dumps(out)).safety == out.safety


def test_tuple_keeps_its_length_and_reports_come_by_capture() -> None:
    pipe = guarded(on_block="replace")
    with safeguard.capture() as reports:
        images, flags, sounds = pipe(prompt=["grey", "white"], return_dict=False)
    assert flags == [False, True]
    assert sounds.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert len(images) == len(reports) == 2


def test_withheld_picture_is_marked_and_its_sound_is_silent() -> None:
    out = guarded(on_block="replace")(prompt=["grey", "white"])
    assert out.nsfw_content_detected == [False, True]
    assert out.sounds.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_picture_with_nan_is_an_error_and_closed(output_type: str) -> None:
    pipe = guarded()
    with pytest.raises(CheckFailed, match="NaN or infinite"):
        pipe(prompt="broken", output_type=output_type)


def test_latent_that_cannot_be_decoded_is_closed() -> None:
    pipe = guarded()
    with pytest.raises(UnseenInput, match="use output_type='pil'"):
        pipe(prompt="grey", output_type="latent")


class Expander(Painter):
    """Rewrites by a static method and a caption of a picture."""

    @staticmethod
    def expand_prompts(prompt: str) -> str:
        return prompt + " with a knife"

    def get_image_caption(self, picture: Any) -> str:
        return "a knife"


def test_static_rewriting_method_is_judged_too() -> None:
    assert Guard([WordCheck("knife")])(Expander()).expand_prompts("a cat") == "a cat"


def test_caption_that_is_refused_becomes_empty() -> None:
    assert Guard([WordCheck("knife")])(Expander()).get_image_caption(None) == ""


class Singer(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Gives sound and no picture."""

    def __call__(self, prompt: str, return_dict: bool = True) -> Any:
        sound = np.zeros((1, 2, 100), np.float32)
        return {"audios": sound} if return_dict else (sound,)


@pytest.mark.parametrize("return_dict", [True, False])
def test_output_without_pictures_is_closed(return_dict: bool) -> None:
    pipe = Guard([WordCheck("knife")], [BrightCheck()])(Singer())
    with pytest.raises((UnseenInput, CheckFailed)):
        pipe(prompt="a song", return_dict=return_dict)


def test_output_without_pictures_passes_where_no_picture_is_judged() -> None:
    pipe = Guard([WordCheck("knife")])(Singer())
    assert list(pipe(prompt="a song")) == ["audios"]
    with pytest.raises(Blocked):
        pipe(prompt="a knife")


class Collage(DiffusionPipeline):  # type: ignore[misc]
    """Gives one picture for all prompts together."""

    def __call__(self, prompt: list[str]) -> PainterOutput:
        return PainterOutput(images=np.zeros((1, SIDE, SIDE, 3), np.float32))


def test_refused_prompt_that_cannot_be_told_from_its_neighbours_closes_all() -> None:
    pipe = Guard([WordCheck("knife")], [BrightCheck()])(Collage())
    assert len(pipe(prompt=["a cat", "a dog"]).images) == 1
    with pytest.raises(CheckFailed, match="cannot tell which of 1 outputs belongs to which of 2 prompts"):
        pipe(prompt=["a cat", "a knife"])


# --- what the pipeline stays ----------------------------------------------------------------------


def test_same_object_same_names_same_signature() -> None:
    pipe = Painter()
    before = inspect.signature(pipe.__call__), Painter.__call__.__doc__
    assert Guard([WordCheck("knife")])(pipe) is pipe
    assert isinstance(pipe, Painter)
    assert (type(pipe).__name__, type(pipe).__module__) == (Painter.__name__, Painter.__module__)
    assert (inspect.signature(pipe.__call__), type(pipe).__call__.__doc__) == before


def test_other_instances_stay_as_they_are() -> None:
    guarded()
    assert len(Painter()(prompt="a knife").images) == 1


def test_pipeline_cannot_be_guarded_twice() -> None:
    pipe = guarded()
    with pytest.raises(TypeError, match="Painter is guarded already"):
        Guard()(pipe)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_are_guarded(copied: Any) -> None:
    twin = copied(guarded())
    with pytest.raises(Blocked):
        twin(prompt="a knife")


def test_pickling_says_why_it_cannot_be_done() -> None:
    with pytest.raises(TypeError, match="cannot be pickled, because it would come back without its guard"):
        pickle.dumps(guarded())


def test_moving_gives_the_guarded_pipeline_back() -> None:
    with pytest.raises(Blocked):
        guarded().to("cpu")(prompt="a knife")


def test_unknown_arguments_raise_as_the_pipeline_does() -> None:
    pipe: Any = Guard()(Singer())
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        pipe(prompt="a song", colour=3)


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames must be 2 or more, .* got 1"):
        Guard()(Painter(), frames=1)


def test_modular_pipelines_are_refused_with_a_way_out() -> None:
    from diffusers import ModularPipeline

    with pytest.raises(TypeError, match="guard the function that calls it"):
        Guard()(object.__new__(ModularPipeline))


def test_threads_get_their_own_reports() -> None:
    pipe, got = guarded(on_block="replace"), {}

    def paint(word: str) -> None:
        with safeguard.capture() as reports:
            got[word] = [[r.blocked for r in pipe(prompt=[word] * 3).safety] for _ in range(20)], len(reports)

    threads = [threading.Thread(target=paint, args=(word,)) for word in ("grey", "white")]
    _run(threads)
    assert got["grey"] == ([[False] * 3] * 20, 60)
    assert got["white"] == ([[True] * 3] * 20, 60)


def _run(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_prompts_changed_while_they_are_judged_go_on_as_they_were_judged() -> None:
    prompts = ["a cat"]

    class Writing(WordCheck):
        def __call__(self, batch: Any, /) -> Any:
            prompts[0] = "a knife"
            return super().__call__(batch)

    pipe = Guard([Writing("knife")])(Painter())
    pipe(prompt=prompts)
    assert pipe.calls[0]["prompt"] == ["a cat"]
