"""Preprocessing of pictures that are torch tensors, on the device they are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safeguard.errors import MissingExtra
from safeguard.images import crop_offsets, resized_sides, square_tiles
from safeguard.manifest import ImagePreprocess

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", "torch") from exc

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SLACK = 0.01
MOST_PIXELS = 32_000_000
"""Pixels that are preprocessed together: 400 MB of floats."""


def preprocess_tensor(image: torch.Tensor, spec: ImagePreprocess) -> NDArray[np.float32]:
    """`preprocess_on_device` as an array: only the small result leaves the device."""
    array: NDArray[np.float32] = preprocess_on_device(image, spec).cpu().numpy()
    return array


def preprocess_on_device(image: torch.Tensor, spec: ImagePreprocess) -> torch.Tensor:
    """All crops of one tensor (3, height, width) in [0, 1] as a float32 tensor, a row each, on its device.

    One of a single channel is grey.

    Resized as PIL does it, in two passes with whole levels between them. Against CLIP's reference processor
    on PIL at most 2 of 255 levels off, and less than 2 pixels in 100 at all, on noise and on smooth pictures
    of several shapes (`tests/test_image_tensors.py`). Raises ValueError for another shape and for values
    outside [0, 1], NaN among them.
    """
    return preprocess_together([image], spec)[0]


def preprocess_together(images: Sequence[torch.Tensor], spec: ImagePreprocess) -> list[torch.Tensor]:
    """`preprocess_on_device` of each picture; those of one shape share the work and one look at the values.

    Raises ValueError as that does, without saying for which of them.
    """
    groups: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"a tensor on a device must be (3, height, width), got {tuple(image.shape)}")
        groups.setdefault((tuple(image.shape), image.dtype, image.device), []).append(i)
    found: dict[int, torch.Tensor] = {}
    for (shape, *_), members in groups.items():
        most = max(1, MOST_PIXELS // max(1, shape[1] * shape[2]))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            stack = torch.stack([images[i].detach() for i in part]).float()
            low, high = torch.stack(torch.aminmax(stack)).tolist()  # the one wait for the device
            if not (low >= -_SLACK and high <= 1 + _SLACK):  # also false for NaN
                raise ValueError(f"float pixels must be in [0, 1], got {low:g} to {high:g}")
            found.update(zip(part, _preprocessed(stack.expand(-1, 3, -1, -1), spec), strict=True))
    return [found[i] for i in range(len(images))]


def gathered(parts: Sequence[Any], device: str) -> torch.Tensor:
    """Rows from anywhere, tensors and arrays, as one tensor on a device, in order."""
    return torch.cat([torch.as_tensor(part).to(device) for part in parts])


def _preprocessed(images: torch.Tensor, spec: ImagePreprocess) -> torch.Tensor:
    """Crops (picture, crop, ...) of pictures (picture, 3, height, width) whose values were looked at."""
    pixels = (images.clamp(0, 1) * 255).round()  # the levels that a saved picture would have
    height, width = resized_sides(images.shape[2], images.shape[3], spec)
    resized = _resized(pixels, height, width, spec) * spec.scale
    if spec.channels == "BGR":
        resized = resized.flip(1)
    mean, std = (torch.tensor(v, device=images.device).reshape(3, 1, 1) for v in (spec.mean, spec.std))
    resized = (resized - mean) / std
    crops = torch.stack(
        [
            resized[:, :, y : y + spec.size, x : x + spec.size]
            for y in crop_offsets(height, spec.size)
            for x in crop_offsets(width, spec.size)
        ],
        dim=1,
    )  # (picture, crop, channel, height, width)
    tiles = [
        _preprocessed(images[:, :, y, x], spec)
        for y, x in square_tiles(images.shape[2], images.shape[3], spec)
    ]
    return torch.cat([crops.permute(0, 1, 3, 4, 2) if spec.layout == "NHWC" else crops, *tiles], dim=1)


def _resized(pixels: torch.Tensor, height: int, width: int, spec: ImagePreprocess) -> torch.Tensor:
    """Levels (picture, 3, height, width), 0 to 255, in the order of passes that PIL takes.

    Across first, but down first for a tall picture where less is left in between (found by comparison with
    Pillow 13; the other order is up to 24 levels off on noise).
    """
    before, across = pixels.shape[2:]
    down_first = before >= 2 * across and before * width > height * across
    steps = [(height, across), (height, width)] if down_first else [(before, width), (height, width)]
    for size in steps:
        if tuple(pixels.shape[2:]) != size:
            pixels = torch.nn.functional.interpolate(
                pixels, size, mode=spec.resample, align_corners=False, antialias=True
            )
            pixels = pixels.round().clamp(0, 255)
    return pixels
