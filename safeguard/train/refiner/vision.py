"""What training a refiner that sees pictures adds: its base model, its examples, a batch of them.

An example is put together when its batch is: the prompt's tokens come from the processor as when it is
served, the answer's are appended, and only those have a loss.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from safeguard.errors import MissingExtra
from safeguard.images import open_image
from safeguard.refiners.framing import as_data
from safeguard.refiners.template import RefinerTemplate
from safeguard.refiners.torch_lm import end_tokens
from safeguard.refiners.torch_vlm import TorchVLM, parts
from safeguard.refiners.vlm import shown
from safeguard.train.refiner.examples import IGNORED, closing_token
from safeguard.train.refiner.pairs import Pair
from safeguard.train.refiner.picture_rewards import Improvement
from safeguard.types import RefineRequest

try:
    import torch
    from datasets import Dataset
    from transformers import ProcessorMixin
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", "train") from exc


def sees(processing: Any) -> bool:
    """Whether what came with a base model reads pictures, too."""
    return isinstance(processing, ProcessorMixin)


def open_picture(image: Any) -> Image.Image | None:
    """The picture of a pair as a refiner is shown it; None for a pair without one.

    image: a PIL image or an array, a path, or what `datasets` stores: {"bytes": ..., "path": ...}.
    Raises ValueError for one that cannot be read, FileNotFoundError for a file that is not there.
    """
    found = _stored(image)
    if found is None:
        return None
    picture = shown(RefineRequest("", result=found))
    if picture is None:
        raise ValueError(f"a picture of type {type(image).__name__} cannot be read")
    return picture


def _stored(image: Any) -> Any:
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            try:
                return Image.open(io.BytesIO(image["bytes"]))
            except OSError as exc:
                raise ValueError("stored bytes are no picture") from exc
        image = image.get("path")
    return open_image(Path(image)) if isinstance(image, str | Path) else image


def picture_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 of the pixels of all pictures in order, 64 hex digits."""
    found = hashlib.sha256()
    for pair in pairs:
        picture = open_picture(pair.image)
        size = b"none" if picture is None else f"{picture.size}".encode()
        found.update(size + (b"" if picture is None else picture.tobytes()))
    return found.hexdigest()


def rendered(vlm: TorchVLM, template: RefinerTemplate, prompt: str, *, picture: bool) -> str:
    """The prompt up to the answer as it is served, special tokens in it neutralised."""
    return vlm.render(template.messages(as_data(vlm, prompt)), picture=picture)


def vision_end(vlm: TorchVLM, model: Any, template: RefinerTemplate) -> int:
    """Id of the token that ends an answer; ValueError for a model without one."""
    turns = template.messages("a cat")
    before = vlm.render(turns, picture=False)
    answer = {"role": "assistant", "content": template.keep}
    after = vlm.processor.apply_chat_template(parts([*turns, answer]), tokenize=False)
    return closing_token(vlm.encode, before, str(after), end_tokens(model, vlm.tokenizer))


class VisionBatch:
    """Puts examples together: a collator over places in a list of pairs."""

    def __init__(self, vlm: TorchVLM, template: RefinerTemplate, pairs: Sequence[Pair], end: int) -> None:
        self._vlm, self._template, self._pairs, self._end = vlm, template, pairs, end
        tokens = {
            vlm.tokenizer.convert_tokens_to_ids(str(mark))
            for name in ("image_token", "fake_image_token", "global_image_tag", "global_image_token")
            if (mark := getattr(vlm.processor, name, None))
        }
        self._hidden = sorted(token for token in tokens if isinstance(token, int))

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tensors (row, token), and what the model wants of pictures.

        rows: {"row": place in the list, "whole": loss on every token but padding and pictures, as IPR's code
        has it}.
        """
        pairs = [self._pairs[row["row"]] for row in rows]
        inputs, tails = self._prompts(pairs), [self._tail(pair) for pair in pairs]
        starts = inputs.pop("attention_mask").sum(1).tolist()
        longest = max(start + len(tail) for start, tail in zip(starts, tails, strict=True))
        pad = self._vlm.tokenizer.pad_token_id
        ids = torch.full((len(pairs), longest), pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        prompt_ids = inputs.pop("input_ids")
        for i, (start, tail) in enumerate(zip(starts, tails, strict=True)):
            end = start + len(tail)
            ids[i, :start], ids[i, start:end] = prompt_ids[i, :start], torch.tensor(tail)
            mask[i, :end], labels[i, start:end] = 1, ids[i, start:end]
            if rows[i]["whole"]:
                labels[i, :start] = ids[i, :start]
                labels[i, torch.isin(ids[i], torch.tensor(self._hidden))] = IGNORED
        for name, value in inputs.items():
            if value.shape[:2] == prompt_ids.shape:  # one value per token, 0 for text
                inputs[name] = torch.zeros_like(ids)
                inputs[name][:, : value.shape[1]] = value[:, :longest]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **inputs}

    def length(self, row: int) -> int:
        """Tokens of one example."""
        pair = self._pairs[row]
        return int(self._prompts([pair])["input_ids"].shape[1]) + len(self._tail(pair))

    def _prompts(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        pictures = [open_picture(pair.image) for pair in pairs]
        texts = [
            rendered(self._vlm, self._template, pair.prompt, picture=picture is not None)
            for pair, picture in zip(pairs, pictures, strict=True)
        ]
        return self._vlm.inputs(texts, pictures)

    def _tail(self, pair: Pair) -> list[int]:
        answer = self._template.keep if pair.target is None else pair.target
        return [*self._vlm.encode(as_data(self._vlm, answer).strip()), self._end]


def vision_examples(
    model: Any,
    processor: Any,
    template: RefinerTemplate,
    pairs: Sequence[Pair],
    held: Sequence[Pair],
    *,
    longest: int,
    whole: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], VisionBatch]:
    """Places of the examples of at most `longest` tokens, to train on and held out, and their collator.

    Each is put together once to be measured. whole: for those to train on.
    """
    vlm = TorchVLM(model, processor)
    batch = VisionBatch(vlm, template, [*pairs, *held], vision_end(vlm, model, template))
    rows = [
        {"row": row, "whole": whole and row < len(pairs), "length": length, "kept": pair.target is None}
        for row, pair in enumerate([*pairs, *held])
        if (length := batch.length(row)) <= longest
    ]
    split = sum(row["row"] < len(pairs) for row in rows)
    return rows[:split], rows[split:], batch


def shown_prompts(
    vlm: TorchVLM, template: RefinerTemplate, prompts: Sequence[Pair], improvement: Improvement | None
) -> Dataset:
    """Rows for TRL's GRPO, made when they are fetched: turns, picture, original prompt, state.

    The picture is that of the state in IPR's image buffer where the reward has one, else that of the pair; a
    row has no picture where there is none. TRL puts it before the text, as when served.
    """

    def fetch(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [_shown_row(vlm, template, prompts[i], improvement) for i in batch["row"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    return Dataset.from_list([{"row": i} for i in range(len(prompts))]).with_transform(fetch)


def _shown_row(
    vlm: TorchVLM, template: RefinerTemplate, pair: Pair, improvement: Improvement | None
) -> dict[str, Any]:
    current, number = pair.prompt, None
    if improvement is None:
        picture = open_picture(pair.image)
    else:
        state, drawn = improvement.show(pair.prompt)
        picture, current, number = open_picture(drawn), state.prompt, state.number
    texts = (as_data(vlm, text) for text in (pair.prompt, current))
    return {"prompt": template.messages(*texts), "image": picture, "original": pair.prompt, "state": number}
