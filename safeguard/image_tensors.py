"""Preprocessing of pictures that are torch tensors, on the device they are on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from safeguard.errors import MissingExtra
from safeguard.images import crop_offsets, resized_sides, square_tiles
from safeguard.manifest import ImagePreprocess

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", "torch") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SLACK = 0.01


def preprocess_tensor(image: torch.Tensor, spec: ImagePreprocess) -> NDArray[np.float32]:
    """All crops of one tensor (3, height, width) in [0, 1] as a float32 array, a row each.

    Resized on the tensor's device with the same antialiased filter as PIL; only the small result leaves it.
    Pixels differ from the PIL path by rounding: at most 2 of 255 levels, 0.2 on average (see
    `tests/test_images.py`). Raises ValueError for another shape and for values outside [0, 1], NaN among
    them.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a tensor on a device must be (3, height, width), got {tuple(image.shape)}")
    image = image.detach().float()
    low, high = (float(x) for x in torch.aminmax(image))
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # also false for NaN
        raise ValueError(f"float pixels must be in [0, 1], got {low:g} to {high:g}")
    pixels = (image.clamp(0, 1) * 255).round()  # the levels that a saved picture would have
    height, width = resized_sides(image.shape[1], image.shape[2], spec)
    resized = torch.nn.functional.interpolate(
        pixels[None], (height, width), mode=spec.resample, align_corners=False, antialias=True
    )[0]
    resized = resized.round().clamp(0, 255) * spec.scale
    if spec.channels == "BGR":
        resized = resized.flip(0)
    mean, std = (torch.tensor(v, device=image.device).reshape(3, 1, 1) for v in (spec.mean, spec.std))
    resized = (resized - mean) / std
    crops = torch.stack(
        [
            resized[:, y : y + spec.size, x : x + spec.size]
            for y in crop_offsets(height, spec.size)
            for x in crop_offsets(width, spec.size)
        ]
    )  # (crop, channel, height, width)
    tiles = [
        preprocess_tensor(image[:, y, x], spec) for y, x in square_tiles(image.shape[1], image.shape[2], spec)
    ]
    array: NDArray[np.float32] = (crops.permute(0, 2, 3, 1) if spec.layout == "NHWC" else crops).cpu().numpy()
    return np.concatenate([array, *tiles])
