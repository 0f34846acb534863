"""The two steps around an image model inside Triton: files to pixels, embeddings or logits to scores.

Same decoding, views, preprocessing, heads and readout as the image checks, by the same code.
They run only there, where there is a module `triton_python_backend_utils`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from safeguard.checks.clip_heads import HEADS_NAME, read_heads
from safeguard.exporters.triton_calls import (
    Arrays,
    ModelCalls,
    StepPack,
    answered,
    answered_at_once,
    backend_utils,
    readout_of,
    tensor_of,
    worst_rows,
)
from safeguard.images import MAX_PIXELS, prepare
from safeguard.manifest import ImagePreprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class ImagePixels:
    """IMAGE (picture,) bytes of files to PIXELS (view, ...), OWNERS (view,) and COUNT (1,).

    A picture has several views where it has frames, transparency or a very long side.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        self._utils, pack = backend_utils(), StepPack.open(args)
        self._spec = ImagePreprocess.model_validate(pack.manifest["image"])
        self._max_frames = pack.number("max_frames")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answered(self._utils, requests, self._pixels)

    def _pixels(self, request: Any) -> Arrays:
        files = tensor_of(self._utils, request, "IMAGE").reshape(-1)
        found = prepare([_decoded(raw) for raw in files], self._spec, max_frames=self._max_frames)
        return {
            "PIXELS": found.array,
            "OWNERS": found.owners.astype(np.int32),
            "COUNT": np.array([len(files)], np.int32),
        }


class ImageScores:
    """What ImagePixels gave to SCORES (picture, label): runs the model on the views, the worst counts."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self._utils, pack = backend_utils(), StepPack.open(args)
        self._model = ModelCalls(self._utils, pack)
        self._input = pack.manifest["model"]["inputs"][0]
        self._rows = pack.number("max_rows")
        self._read, self._labels = _reader(pack)

    async def execute(self, requests: Sequence[Any]) -> list[Any]:
        return await answered_at_once(self._utils, requests, self._worst)

    async def _worst(self, request: Any) -> Arrays:
        pixels, owners, count = (tensor_of(self._utils, request, n) for n in ("PIXELS", "OWNERS", "COUNT"))
        starts = range(0, len(pixels), self._rows)
        parts = [pixels[start : start + self._rows] for start in starts]
        found = await self._model([{self._input: part} for part in parts])
        scores = [self._read(rows, len(part)) for rows, part in zip(found, parts, strict=True)]
        joined = np.concatenate(scores) if scores else np.empty((0, self._labels))
        return {"SCORES": worst_rows(joined, owners, int(count[0]))}


def _reader(pack: StepPack) -> tuple[Callable[[NDArray[Any], int], NDArray[np.float64]], int]:
    """What turns the model's first output into probabilities (view, label), and how many labels there are."""
    manifest = pack.manifest
    if manifest["kind"] == "clip_heads":
        heads = read_heads(HEADS_NAME, pack.read(HEADS_NAME))

        def read(found: NDArray[Any], rows: int) -> NDArray[np.float64]:
            if found.shape != (rows, heads[0].dimension):
                raise ValueError(f"the tower gave {found.shape}, heads need {(rows, heads[0].dimension)}")
            wide = np.where(np.isfinite(found), found, np.nan).astype(np.float64)
            return np.stack([head.probability(head.raw(wide)) for head in heads], axis=1)

        return read, len(heads)
    readout = readout_of(manifest)
    return readout, len(readout.labels)


def _decoded(raw: bytes) -> Image.Image:
    """The picture in a file. Raises ValueError where it is none, or too large."""
    try:
        image = Image.open(io.BytesIO(raw), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"the picture has more than {MAX_PIXELS} pixels; make it smaller")
        image.load()
    except ValueError:
        raise
    except Exception as exc:  # decoders raise all kinds for damaged files
        raise ValueError(
            f"it cannot be read as a picture ({type(exc).__name__}); known: {', '.join(_FORMATS)}"
        ) from exc
    return image
