"""Image-text models of transformers (Qwen2.5-VL, Idefics3, SmolVLM and their like), run by torch.

One row at a time: a picture is hundreds of tokens, and rows of a batch would change one another by rounding.
Videos are never read, so the part of a processor that reads them, which needs torchvision, is not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackError, RefinerError
from safeguard.refiners.language_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EMBEDDED_BASE,
    Answer,
    Stop,
    special_pattern,
)
from safeguard.refiners.torch_lm import decoded, greedy, stopping

try:
    import torch
    import transformers
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc

_MARKS = ("image_token", "video_token", "fake_image_token", "global_image_token", "global_image_tag")
"""Attributes of processors that name a token they replace in a text."""
_WITHOUT_VIDEO = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "Idefics3Processor",  # lays pictures out alike; its own wants a package for numbers of frames
}
"""Model type -> processor that can do without its part for videos."""


class TorchVLM:
    """An image-text model with its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        config = model.config.get_text_config()
        self.window = int(getattr(config, "max_position_embeddings", 0) or 0)
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = {str(found) for mark in _MARKS if (found := getattr(processor, mark, None))}
        self._special = special_pattern(
            ((str(token.content), bool(token.special)) for token in added),
            names | set(getattr(self.tokenizer, "all_special_tokens", ())),
        )

    @property
    def special(self) -> re.Pattern[str] | None:
        """Special tokens of the tokenizer, and the marks for pictures that the processor looks for."""
        return self._special

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def render(self, turns: Sequence[dict[str, str]], *, picture: bool) -> str:
        """The conversation up to the answer; picture: with one before the text of the first user turn."""
        return str(
            self.processor.apply_chat_template(
                parts(turns, picture=picture), tokenize=False, add_generation_prompt=True
            )
        )

    def inputs(self, texts: Sequence[str], pictures: Sequence[Any | None]) -> dict[str, Any]:
        """Tensors of rendered texts with at most one picture each, padded on the right."""
        some = [[] if picture is None else [picture] for picture in pictures]
        extra = {"images": some} if any(some) else {}
        return dict(
            self.processor(
                text=list(texts),
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                **extra,
            )
        )

    def answer(
        self, text: str, picture: Any | None, limit: int, *, stop: Stop | None = None
    ) -> Answer | None:
        """The greedy answer to one rendered text; None where it does not fit into the window.

        Raises RefinerError when `stop` said so, or when the model gave something else.
        """
        inputs = self.inputs([text], [picture])
        length = int(inputs["input_ids"].shape[1])
        if self.window and length + limit > self.window:
            return None
        pad = next(
            (i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0
        )
        more = {} if stop is None else {"stopping_criteria": [stopping(stop)]}
        with torch.inference_mode():
            made = self._model.generate(
                **{name: self._moved(value) for name, value in inputs.items()},
                generation_config=greedy(self._model, self.tokenizer, limit, pad),
                **more,
            )
        if len(made) != 1:
            raise RefinerError(f"the model gave {len(made)} answers for one prompt")
        return decoded(self._model, self.tokenizer, made[0][length:].tolist(), limit)

    def _moved(self, value: Any) -> Any:
        """On the model's device, and in its precision where it is a picture."""
        dtype = self._model.dtype if value.is_floating_point() else None
        return value.to(self._model.device, dtype)


def parts(turns: Sequence[dict[str, str]], *, picture: Any = False) -> list[dict[str, Any]]:
    """Turns in the form of image-text models: lists of parts, the picture first in the user's turn."""
    return [
        {
            "role": turn["role"],
            "content": [
                *([{"type": "image"}] if picture and turn["role"] == "user" else []),
                {"type": "text", "text": turn["content"]},
            ],
        }
        for turn in turns
    ]


def load_vlm(name: str | Path, *, dtype: Any = "auto") -> tuple[Any, Any]:
    """Model and processor of a folder, a hub name or a PEFT adapter (merged).

    Raises MissingExtra for an adapter without peft, PackError for weights that are not there, not safetensors
    or of no image-text model, and for a processor without a chat template.
    """
    if (Path(name) / ADAPTER_CONFIG).is_file():
        return _load_adapter(Path(name), dtype)
    try:
        model, loaded = transformers.AutoModelForImageTextToText.from_pretrained(
            str(name), dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        processor = load_processor(name, str(model.config.model_type))
    except (OSError, ValueError) as exc:
        raise PackError(f"no image-text refiner could be loaded from {str(name)!r}: {exc}") from exc
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise PackError(
            f"no image-text refiner could be loaded from {str(name)!r}: its weights lack {missing}"
        )
    if not getattr(processor, "chat_template", None):
        raise PackError(f"{str(name)!r} has no chat template; an image-text refiner needs one")
    return model, processor


def load_processor(name: str | Path, model_type: str) -> Any:
    """The processor of a folder or hub name, without its part for videos where we know how."""
    family = _WITHOUT_VIDEO.get(model_type)
    if family is None:
        return transformers.AutoProcessor.from_pretrained(str(name), trust_remote_code=False)
    return without_video(getattr(transformers, family)).from_pretrained(str(name))


def without_video(family: Any) -> Any:
    """The processor class without the part that reads videos, under its own name: it saves as itself."""
    if "video_processor" not in family.get_attributes():
        return family

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in super(found, cls).get_attributes() if name != "video_processor"]

    found: Any = type(
        family.__name__,
        (family,),
        {
            "__module__": family.__module__,
            "__doc__": family.__doc__,
            "get_attributes": classmethod(get_attributes),
        },
    )
    return found


def is_image_text(name: str | Path) -> bool:
    """Whether a folder or hub name is an image-text model by its configuration; False for what is none.

    An adapter is what its base model is.
    """
    place = Path(name)
    if (place / ADAPTER_CONFIG).is_file():
        base = _base_of(place)
        return base != EMBEDDED_BASE and is_image_text(base)
    try:
        config = transformers.AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _base_of(folder: Path) -> str:
    try:
        import peft
    except ImportError as exc:
        raise MissingExtra("peft", extra="peft") from exc
    return str(peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)


def _load_adapter(folder: Path, dtype: Any) -> tuple[Any, Any]:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise PackError(f"adapter {folder.name!r} has no {ADAPTER_WEIGHTS}; other formats are refused")
    model, processor = load_vlm(_base_of(folder), dtype=dtype)
    import peft

    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload(), processor
