"""Placeholders for pictures that are withheld: blank or blurred, of the same kind, size and device."""

from __future__ import annotations

import sys
from typing import Any, Literal

DEFAULT_SIZE = (512, 512)
"""Width and height where no picture was made and nothing else is known."""

_BLUR_CELLS = 8  # a picture reduced to 8 x 8 cells shows its colours and nothing else


def placeholder(
    image: Any, how: Literal["blank", "blur"] = "blank", *, size: tuple[int, int] = DEFAULT_SIZE
) -> Any:
    """What is handed on in place of a picture: black, or reduced to a few blurred cells of colour.

    image: PIL, numpy (height, width, channel) or a torch tensor (..., height, width); None where nothing was
    made, which gives a black PIL image of `size` (width, height). Arrays and tensors keep shape, type and
    device.
    """
    from PIL import Image

    if image is None:
        return Image.new("RGB", size)
    if isinstance(image, Image.Image):
        if how == "blank":
            return Image.new("RGB", image.size)
        cells = image.convert("RGB").resize((_BLUR_CELLS, _BLUR_CELLS), Image.Resampling.BOX)
        return cells.resize(image.size, Image.Resampling.BICUBIC)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(image, torch.Tensor):
        return torch.zeros_like(image)
    import numpy as np

    if isinstance(image, np.ndarray):
        return np.zeros_like(image)
    if isinstance(image, list | tuple):  # several pictures, or the frames of a video
        return type(image)(placeholder(part, how) for part in image)
    return Image.new("RGB", size)
