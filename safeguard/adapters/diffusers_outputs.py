"""What a diffusers pipeline returned: its pictures or videos one by one, as checks see them, and back."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from safeguard.adapters import diffusers_latents, pictures
from safeguard.judging import Piece, image_piece
from safeguard.types import Report

FIELDS = ("images", "frames", "videos", "video", "image")
"""Where pipelines put what can be looked at, most usual first."""
FLAGS = ("nsfw_content_detected", "nsfw_detected")
"""Fields in which a pipeline says which pictures it withheld itself."""


class Made:
    """The result of one call of a pipeline, taken apart into one item per picture or video.

    items: PIL images, arrays (height, width, 3), tensors (3, height, width) or latents; a video is a list of
    those, or has one more axis in front. One item that is the whole result where nothing can be looked at.
    """

    def __init__(self, result: Any) -> None:
        self.result = result
        self._place: str | int | None = None
        if isinstance(result, tuple):
            self._place = 0 if result else None
        else:
            places = [f for f in FIELDS if getattr(result, f, None) is not None]
            self._place = places[0] if len(places) == 1 else None  # of several, all but one would go unseen
        self._main = self._get(self._place)
        items = None if self._place is None else _split(self._main)
        self.readable = items is not None
        self.items: list[Any] = [Opaque(result)] if items is None else items

    def assemble(self, items: Sequence[Any], reports: Sequence[Report], fields: Sequence[str]) -> Any:
        """The result with these items in their places.

        What else it holds of a withheld or remade item (sound, latents, reconstructions) is emptied too.
        Reports are put on it as `safety`, without becoming one of its items. fields: names of the output's
        parts, by which a tuple is read.
        """
        changed = [new is not old for new, old in zip(items, self.items, strict=True)]
        withheld = [report.blocked for report in reports]
        if not self.readable:
            return _emptied(self.result, reports) if any(withheld) else _signed(self.result, reports)
        main = _joined(self._main, items) if any(changed) else self._main
        if isinstance(self.result, tuple):
            names = fields if len(fields) == len(self.result) else [""] * len(self.result)
            rest = [
                _flags(part, withheld) if name in FLAGS else _withheld(part, changed)
                for name, part in list(zip(names, self.result, strict=True))[1:]
            ]
            return (main, *rest)
        for name in _names(self.result):
            value = getattr(self.result, name, None)
            if name == self._place:
                _put(self.result, name, main)
            elif name in FLAGS:
                _put(self.result, name, _flags(value, withheld))
            elif any(changed) and value is not None:
                _put(self.result, name, _withheld(value, changed))
            if isinstance(self.result, OrderedDict) and name in self.result:
                self.result.move_to_end(name)  # a field that was None before keeps its place
        return _signed(self.result, reports)

    def _get(self, place: str | int | None) -> Any:
        if place is None:
            return None
        return self.result[place] if isinstance(place, int) else getattr(self.result, place)


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """A whole result in which nothing can be looked at."""

    result: Any


def piece_of(item: Any, output_type: Any, decoder: diffusers_latents.Decoder, frames: int) -> Piece:
    """How the checks see one item: a picture, or the sampled frames of a video; tensors stay on their device.

    Unseen where it is neither, holds NaN or infinite values, or is a latent that cannot be decoded.
    """
    if isinstance(item, Opaque):
        kind = type(item.result).__name__
        return Piece(
            "output", (), 0, f"the pipeline's {kind} has no images or frames that could be looked at"
        )
    if isinstance(item, Image.Image):
        return image_piece(item)
    if isinstance(item, list | tuple):
        if not item:
            return Piece("output", (), 0, "a video without frames")
        parts = [piece_of(item[i], output_type, decoder, frames) for i in sampled(len(item), frames)]
        unseen = next((part.unseen for part in parts if part.unseen is not None), None)
        return Piece("output", tuple(view for part in parts for view in part.views), 0, unseen)
    if _is_tensor(item):
        return _tensor_piece(item, output_type, decoder, frames)
    if isinstance(item, np.ndarray) and item.ndim in (3, 4) and item.shape[-1] in (1, 3, 4):
        if item.dtype.kind == "f" and not np.isfinite(item).all():
            return Piece("output", (), 0, "output holds NaN or infinite values")
        if item.ndim == 4:  # (frame, height, width, channel)
            return piece_of(list(item), output_type, decoder, frames)
        return image_piece(item)
    return Piece("output", (), 0, f"output of type {type(item).__name__}{_shape(item)} is no picture")


def sampled(total: int, most: int) -> list[int]:
    """At most `most` (2 or more) places of `total`, evenly spread, the first and the last among them."""
    if total <= most:
        return list(range(total))
    return sorted({round(i * (total - 1) / (most - 1)) for i in range(most)})


def _tensor_piece(item: Any, output_type: Any, decoder: diffusers_latents.Decoder, frames: int) -> Piece:
    if not bool(item.isfinite().all()):
        return Piece("output", (), 0, "output holds NaN or infinite values")
    if output_type == "latent":
        picture = decoder(item)
        if picture is None:
            why = "latents of this pipeline cannot be decoded for the check; use output_type='pil'"
            return Piece("output", (), 0, why)
        return _tensor_piece(picture, "pt", decoder, frames)
    if item.ndim == 4 and item.shape[1] in (1, 3, 4):  # (frame, channel, height, width)
        return piece_of([item[i] for i in range(len(item))], output_type, decoder, frames)
    if item.ndim == 3 and item.shape[0] in (1, 3, 4):
        if item.is_floating_point() and float(item.min()) < -0.01:  # some pipelines give [-1, 1] for "pt"
            item = item / 2 + 0.5
        return image_piece(item)
    return Piece("output", (), 0, f"output of type {type(item).__name__}{_shape(item)} is no picture")


def blank(item: Any, how: Any) -> Any:
    """What is handed on in place of an item, of the same kind and size."""
    return item if isinstance(item, Opaque) else pictures.placeholder(item, how)


def joined(items: Sequence[Any]) -> Any:
    """Items as one value, as a pipeline would give them: arrays and tensors stacked, pictures in a list."""
    if items and _is_tensor(items[0]):
        import torch

        return torch.stack(list(items))
    if items and isinstance(items[0], np.ndarray):
        return np.stack(items)
    return list(items)


def result_of_none(base: type, items: Sequence[Any], reports: Sequence[Report], *, as_dict: bool) -> Any:
    """The result of a call in which nothing was made: placeholders on the pipeline's own output class."""
    kind, names = output_class(base), fields_of(base)
    main = next(f for f in FIELDS if f in names)
    values = {name: [r.blocked for r in reports] if name in FLAGS else None for name in names}
    values[main] = joined(items)
    if not as_dict:
        return (values[main], *(v for n, v in values.items() if n != main))
    return _signed(kind(**values), reports)


def output_class(base: type) -> Any:
    """The class of what a pipeline returns: the one with pictures that its module knows."""
    for klass in base.__mro__:
        module = sys.modules.get(klass.__module__)
        for name, kind in vars(module).items() if module else ():
            if not (name.endswith("Output") and isinstance(kind, type) and dataclasses.is_dataclass(kind)):
                continue
            if any(f.name in FIELDS for f in dataclasses.fields(kind)):
                return kind
    from diffusers import ImagePipelineOutput

    return ImagePipelineOutput


def fields_of(base: type) -> list[str]:
    """Names of the parts of what a pipeline returns, in order."""
    return [f.name for f in dataclasses.fields(output_class(base))]


def _split(main: Any) -> list[Any] | None:
    """The items of a result, None where it has none."""
    if isinstance(main, Image.Image):
        return [main]
    if isinstance(main, list | tuple):
        return list(main)
    if (_is_tensor(main) or isinstance(main, np.ndarray)) and main.ndim >= 3:
        return [main[i] for i in range(len(main))]
    return None


def _joined(old: Any, items: Sequence[Any]) -> Any:
    if isinstance(old, Image.Image):
        return items[0]
    if isinstance(old, list | tuple):
        return type(old)(items)
    return joined(items)


def _withheld(value: Any, changed: Sequence[bool]) -> Any:
    """Something beside the pictures, emptied where their item was; all where it cannot be told apart."""
    if value is None or not any(changed) or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple) and len(value) == len(changed):
        return type(value)(
            [_empty(part) if gone else part for part, gone in zip(value, changed, strict=True)]
        )
    if (_is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim and len(value) == len(changed):
        value = value.clone() if _is_tensor(value) else value.copy()
        for i, gone in enumerate(changed):
            if gone:
                value[i] = 0
        return value
    return _empty(value)


def _empty(value: Any) -> Any:
    if isinstance(value, str):
        return ""
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, Image.Image | np.ndarray) or _is_tensor(value):
        return pictures.placeholder(value)
    return None


def _flags(before: Any, withheld: Sequence[bool]) -> list[bool]:
    """The pipeline's own marks and ours."""
    if not isinstance(before, list) or len(before) != len(withheld):
        before = [False] * len(withheld)
    return [bool(own) or gone for own, gone in zip(before, withheld, strict=True)]


def _emptied(result: Any, reports: Sequence[Report]) -> Any:
    if isinstance(result, tuple):
        return (None,) * len(result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return _signed(type(result)(**{f.name: None for f in dataclasses.fields(result)}), reports)
    return None


def _signed(result: Any, reports: Sequence[Report]) -> Any:
    """The result with its reports, where it can carry them. An attribute: neither a key nor an item of it."""
    if hasattr(result, "__dict__") and not isinstance(result, type):
        object.__setattr__(result, "safety", tuple(reports))
    return result


def _names(result: Any) -> list[str]:
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return [f.name for f in dataclasses.fields(result)]
    return list(vars(result))


def _put(result: Any, name: str, value: Any) -> None:
    """Set a field of an output, which is also a mapping of those of its fields that are not None."""
    if isinstance(result, dict) and value is not None:
        result[name] = value
    else:
        setattr(result, name, value)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _shape(item: Any) -> str:
    shape = getattr(item, "shape", None)
    return "" if shape is None else f" and shape {tuple(shape)}"
