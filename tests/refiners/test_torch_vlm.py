"""Tiny random models of the real classes: load, look, answer, and train nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

from PIL import Image

from safeguard.errors import PackError, RefinerError
from safeguard.refiners.torch_vlm import TorchVLM, is_image_text, load_vlm, without_video
from safeguard.refiners.vlm import VLMRefiner
from safeguard.types import RefineRequest
from tests import tiny_decoders
from tests.tiny_vlms import KINDS, TEMPLATE, save, vlm

RED, GREEN = (Image.new("RGB", (50, 40), colour) for colour in ((200, 0, 0), (0, 200, 0)))


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("vlm") / str(request.param), request.param)


def asked(picture: Image.Image | None) -> RefineRequest:
    return RefineRequest("a bad cat", ("bad",), result=picture, round=1)


def test_a_saved_folder_is_served_with_its_template(folder: Path) -> None:
    refiner = VLMRefiner.load(folder)
    assert refiner.template == TEMPLATE
    assert len(refiner([asked(RED)])) == 1


def test_the_picture_changes_the_answer(folder: Path) -> None:
    red, green = VLMRefiner.load(folder).readings([asked(RED), asked(GREEN)])
    assert red != green


def test_an_answer_does_not_depend_on_its_neighbours(folder: Path) -> None:
    refiner = VLMRefiner.load(folder)
    together = refiner.readings([asked(RED), RefineRequest("a"), asked(GREEN)])
    assert together[2:] == refiner.readings([asked(GREEN)])


def test_load_always_judges_every_picture(folder: Path) -> None:
    assert (VLMRefiner.load_always(folder).always_judge, VLMRefiner.load(folder).always_judge) == (
        True,
        False,
    )


def test_its_marks_for_pictures_are_special(folder: Path) -> None:
    model = TorchVLM(*load_vlm(folder))
    assert model.special is not None
    assert model.special.sub("", f"a{model.processor.image_token}b<|IM_START|>c") == "abc"


def test_the_folder_is_known_as_an_image_text_model(folder: Path) -> None:
    assert is_image_text(folder)


def test_a_picture_mark_in_a_prompt_is_no_second_picture() -> None:
    model, processor = vlm("qwen")
    refiner = VLMRefiner(TorchVLM(model, processor), TEMPLATE)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    request = RefineRequest(f"a {mark} cat", ("bad",), result=RED, round=1)
    assert refiner.readings([request]) == refiner.readings([RefineRequest("a     cat", ("bad",), (), RED, 1)])


def test_a_prompt_past_the_window_has_no_answer() -> None:
    model = TorchVLM(*vlm("idefics"))
    assert model.answer("a" * 600, None, 12) is None


def test_a_generation_stops_when_told() -> None:
    model = TorchVLM(*vlm("idefics"))
    with pytest.raises(RefinerError, match="stopped before its end"):
        model.answer("a", None, 12, stop=lambda: True)


def test_a_text_model_is_refused_by_name(tmp_path: Path) -> None:
    text = tiny_decoders.save(tmp_path / "text")
    assert not is_image_text(text)
    with pytest.raises(PackError, match="no image-text refiner could be loaded from"):
        VLMRefiner.load(text)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "qwen", "qwen")
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(PackError, match="no image-text refiner could be loaded"):
        VLMRefiner.load(folder)


def test_a_processor_without_chat_template_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "idefics", "idefics")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(PackError, match="has no chat template; an image-text refiner needs one"):
        VLMRefiner.load(folder)


def test_a_processor_without_its_video_part_keeps_its_name() -> None:
    import transformers

    found = without_video(transformers.Qwen2_5_VLProcessor)
    assert found.__name__ == "Qwen2_5_VLProcessor"
    assert found.get_attributes() == ["image_processor", "tokenizer"]
    assert without_video(transformers.Idefics3Processor) is transformers.Idefics3Processor


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (2, 3)])
def test_smolvlm_lays_a_picture_out_as_idefics_does(rows: int, columns: int) -> None:
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    _, processor = vlm("smolvlm")
    told = get_image_prompt_string(
        rows, columns, 1, processor.fake_image_token, processor.image_token, processor.global_image_tag
    )
    assert processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0) == told
