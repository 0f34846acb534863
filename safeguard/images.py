"""Pictures of any kind to RGB views, and views to a model's input: numpy and PIL, torch only for tensors.

A picture is a PIL image of any mode, a numpy array (height, width, 3 or 4) or (height, width), uint8, uint16
or float in [0, 1], or a torch tensor (3, height, width) in [0, 1]. One picture may have several views, the
worst of which counts: what transparency hides and what it shows, sampled frames of an animation, tiles of a
very long picture.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from safeguard.manifest import ImagePreprocess
from safeguard.types import Coverage

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_PIXELS = 50_000_000
"""Larger pictures are refused: 150 MB of RGB each."""
MAX_FRAMES = 16
"""Frames that are looked at in an animation, evenly spread, the first and the last among them."""
MAX_RATIO = 64
"""Pictures longer than this many times their shorter side are refused."""
MAX_CROPS = 512
"""Crops of one picture over all frames and backgrounds; one with more is refused: 300 MB at 224 x 224."""
_TILE_RATIO = 2.0  # from here on a picture is cut into tiles: a centre crop would miss half of it
_LEAST_TILE = 32  # pixels: in a smaller part there is nothing to make out
_USUAL_GAMMA = 1 / 2.2
_MAX_BYTES = 200_000_000
_MAX_ANIMATION = 10 * MAX_PIXELS  # pixels of all frames: seconds of decoding
_SLACK = 0.01  # how far float pixels may lie outside [0, 1] by rounding
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, slots=True)
class Prepared:
    """Model input for a batch of pictures: `array` (row, ...) as the preprocessing says, float32.

    array: of numpy, or a torch tensor where `prepare` kept it on a device. owners: for each row the index of
    its picture. coverage: for each picture how many frames were looked at.
    """

    array: Any
    owners: NDArray[np.int64]
    coverage: tuple[Coverage, ...]


def prepare(
    batch: Sequence[Any],
    spec: ImagePreprocess,
    *,
    max_frames: int = MAX_FRAMES,
    keep_on: str | None = None,
) -> Prepared:
    """All views of all pictures, preprocessed.

    Tensors on a device, of one or three channels, are resized there, without PIL, those of one shape
    together; those of four go to the host, where transparency is looked at, as does every other picture.
    keep_on: the device, such as "cuda:0", on which a model takes tensors: if a picture of the batch was
    prepared on a device, all rows are one tensor there ("cpu" does so with tensors on the host). Without it
    they are an array. Raises ValueError for a picture that cannot be read and TypeError for what is no
    picture, naming the item.
    """
    on_device = _device_rows(batch, spec, keep_on)
    found: list[Any] = []
    coverage: list[Coverage] = []
    for i, item in enumerate(batch):
        rows, total, checked = on_device.get(i), 1, 1
        if rows is None:
            with _named(i):
                rows, total, checked = _rows(item, spec, max_frames)
        found.append(rows)
        coverage.append(Coverage("frames", total, checked, len(rows)))
    owners = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
    return Prepared(_joined(found, spec, keep_on if on_device else None), owners, tuple(coverage))


def preprocess(images: Sequence[NDArray[np.uint8]], spec: ImagePreprocess) -> NDArray[np.float32]:
    """RGB pictures (height, width, 3) to one input array, a row each: the centre crop where there is one.

    Equals the reference preprocessing of CLIP for its values (see `tests/test_images.py`).
    """
    return np.stack([_crops(image, spec)[0] for image in images])


def views(image: Any, *, max_frames: int = MAX_FRAMES) -> list[NDArray[np.uint8]]:
    """RGB arrays (height, width, 3) of all that a picture may show: frames, with and without transparency.

    Raises ValueError for a picture that is empty, too large, truncated or holds NaN, TypeError for no picture
    at all.
    """
    return [view for frame in _frames(image, max_frames)[0] for view in _backgrounds(frame)]


def closer_looks(image: Any, *, tiles: int = 1, turns: int = 1, max_frames: int = MAX_FRAMES) -> list[Any]:
    """The picture, and pictures of its parts and of it turned, for checks to look at as well.

    tiles: n gives the n x n parts of a grid and the (n - 1) x (n - 1) between them, so that a small picture
    set among others fills one of them: 5 for 2, 13 for 3, 25 for 4, of each frame. Parts under 32 pixels are
    left out. turns: 4 gives the picture turned by 90, 180 and 270 degrees too. A check's work grows with the
    number. Raises ValueError for a picture that cannot be read or of which there would be more than
    MAX_CROPS, TypeError for what is no picture.
    """
    if tiles < 1 or turns not in (1, 4):
        raise ValueError(f"tiles must be at least 1 and turns 1 or 4, got {tiles} and {turns}")
    if is_tensor(image) and image.device.type != "cpu" and image.ndim == 3:
        frames: Sequence[Any] = [image]
        height, width, rows = image.shape[1], image.shape[2], 1
    else:
        frames = _frames(image, max_frames)[0]
        height, width, rows = *frames[0].shape[:2], 0
    cells = grid_tiles(height, width, tiles)
    if len(frames) * (len(cells) + turns) > MAX_CROPS:
        raise ValueError(
            f"the picture needs more than {MAX_CROPS} looks for its {len(frames)} frames; look at fewer"
        )
    found = [image]
    for frame in frames:
        found += [frame[(slice(None),) * rows + cell] for cell in cells]
        found += [_turned(frame, k, rows) for k in range(1, turns)]
    return found


def grid_tiles(height: int, width: int, count: int) -> list[tuple[slice, slice]]:
    """The parts of a grid of count x count, and those between them; none for a picture that is too small."""
    high, wide = math.ceil(height / count), math.ceil(width / count)
    if count < 2 or min(high, wide) < _LEAST_TILE:
        return []
    whole = [(row, column) for row in range(count) for column in range(count)]
    halves = [(row + 0.5, column + 0.5) for row in range(count - 1) for column in range(count - 1)]
    corners = [(int(row * height / count), int(column * width / count)) for row, column in whole + halves]
    return [(slice(y, y + high), slice(x, x + wide)) for y, x in corners]


def _turned(frame: Any, quarters: int, rows: int) -> Any:
    return frame.rot90(quarters, (1, 2)) if rows else np.rot90(frame, quarters)


def open_image(path: Path) -> Image.Image:
    """The picture in a file, decoded completely. Raises ValueError when it cannot be or is too large."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {_MAX_BYTES} bytes; make it smaller")
    try:
        image = Image.open(io.BytesIO(path.read_bytes()), formats=_FORMATS)
        _refuse_size(*image.size)
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ValueError(f"{path.name} is too large: a picture may have at most {MAX_PIXELS} pixels") from exc
    except (ValueError, MemoryError):
        raise
    except (
        Exception
    ) as exc:  # decoders raise all kinds for damaged files: TypeError, IndexError, RuntimeError ...
        raise ValueError(
            f"{path.name} cannot be read as a picture ({type(exc).__name__}); known: {', '.join(_FORMATS)}"
        ) from exc
    return image


def to_array(image: Any) -> NDArray[np.uint8]:
    """One RGB array (height, width, 3): the first frame, its colours as they are, transparency left out."""
    return views(image, max_frames=1)[0]


def is_tensor(image: Any) -> bool:
    """Whether this is a torch tensor; torch itself is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


@contextmanager
def _named(item: int) -> Iterator[None]:
    """Says in errors which item of the batch it was."""
    try:
        yield
    except (ValueError, TypeError) as exc:
        raise type(exc)(f"item {item} of the batch: {exc}") from exc


def _device_rows(batch: Sequence[Any], spec: ImagePreprocess, keep_on: str | None) -> dict[int, Any]:
    """Rows, as tensors, of those pictures that are preprocessed where they are."""
    chosen = {
        i: item
        for i, item in enumerate(batch)
        if is_tensor(item)
        and (item.device.type != "cpu" or keep_on == "cpu")
        and item.ndim == 3
        and item.shape[0] in (1, 3)
    }
    if not chosen:
        return {}
    from safeguard.image_tensors import preprocess_on_device, preprocess_together

    for i, item in chosen.items():
        with _named(i):
            _refuse_size(item.shape[2], item.shape[1])
    try:
        return dict(zip(chosen, preprocess_together(list(chosen.values()), spec), strict=True))
    except ValueError:
        for i, item in chosen.items():  # one of them: which?
            with _named(i):
                preprocess_on_device(item, spec)
        raise


def _joined(found: Sequence[Any], spec: ImagePreprocess, keep_on: str | None) -> Any:
    if keep_on is not None:
        from safeguard.image_tensors import gathered

        return gathered(found, keep_on)
    if not found:
        shape = (0, spec.size, spec.size, 3) if spec.layout == "NHWC" else (0, 3, spec.size, spec.size)
        return np.empty(shape, np.float32)
    return np.concatenate([rows.cpu().numpy() if is_tensor(rows) else rows for rows in found])


def _rows(item: Any, spec: ImagePreprocess, max_frames: int) -> tuple[NDArray[np.float32], int, int]:
    frames, total = _frames(item, max_frames)
    rows: list[NDArray[np.float32]] = []
    for frame in frames:
        for view in _backgrounds(frame):
            rows += _crops(view, spec)
            if len(rows) > MAX_CROPS:
                raise ValueError(
                    f"the picture needs more than {MAX_CROPS} crops for its {len(frames)} frames; "
                    "cut it, or look at fewer frames"
                )
    return np.stack(rows), total, min(len(frames), total)


def _crops(view: NDArray[np.uint8], spec: ImagePreprocess) -> list[NDArray[np.float32]]:
    """What the model sees of one view: the centre first, then the tiles of a very long picture."""
    tiles = [
        crop for tile in square_tiles(view.shape[0], view.shape[1], spec) for crop in _crops(view[tile], spec)
    ]
    height, width = resized_sides(view.shape[0], view.shape[1], spec)
    resized = np.asarray(Image.fromarray(view).resize((width, height), _RESAMPLE[spec.resample]), np.float32)
    return [
        _normalised(resized[y : y + spec.size, x : x + spec.size], spec)
        for y in crop_offsets(height, spec.size)
        for x in crop_offsets(width, spec.size)
    ] + tiles


def _normalised(pixels: NDArray[np.float32], spec: ImagePreprocess) -> NDArray[np.float32]:
    scaled = pixels * np.float32(spec.scale)  # (height, width, channel)
    if spec.channels == "BGR":
        scaled = scaled[:, :, ::-1]
    mean, std = (np.array(values, np.float32) for values in (spec.mean, spec.std))
    pixels = (scaled - mean) / std
    return np.ascontiguousarray(pixels if spec.layout == "NHWC" else pixels.transpose(2, 0, 1))


def resized_sides(height: int, width: int, spec: ImagePreprocess) -> tuple[int, int]:
    """Height and width after resizing; the longer side is rounded down, as CLIP's reference does."""
    if spec.mode == "squash":
        return spec.resize, spec.resize
    short, long = sorted((height, width))
    longer = int(spec.resize * long / short)
    return (spec.resize, longer) if height == short else (longer, spec.resize)


def crop_offsets(side: int, size: int) -> list[int]:
    """Where crops of `size` begin along a side: the centre, and evenly spread ones over a long side."""
    centre = (side - size) // 2
    if side < _TILE_RATIO * size:
        return [centre]
    count = math.ceil(side / size)
    spread = (round(i * (side - size) / (count - 1)) for i in range(count))
    return list(dict.fromkeys([centre, *spread]))


def square_tiles(height: int, width: int, spec: ImagePreprocess) -> list[tuple[slice, slice]]:
    """Squares that cover a very long picture whose model sees it squashed; none for any other."""
    short = min(height, width)
    if spec.mode == "crop" or max(height, width) < _TILE_RATIO * short:
        return []
    return [
        (slice(y, y + short), slice(x, x + short))
        for y in crop_offsets(height, short)
        for x in crop_offsets(width, short)
    ]


def _refuse_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"the picture is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"the picture has {width} x {height} pixels, more than {MAX_PIXELS}; make it smaller"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"the picture is {width} x {height}, longer than {MAX_RATIO} times its shorter side; cut it"
        )


def _frames(image: Any, most: int) -> tuple[list[NDArray[np.uint8]], int]:
    """Frames that are looked at as (height, width, 3 or 4) uint8, and how many there are."""
    if isinstance(image, Image.Image):
        _refuse_size(*image.size)
        try:
            frames, total = _pil_frames(image, most)
            return frames + [_brightened(frame, gamma) for gamma in _gammas(image) for frame in frames], total
        except (ValueError, MemoryError):
            raise
        except (
            Exception
        ) as exc:  # decoders raise all kinds for damaged frames, and a frame may be a bomb of its own
            raise ValueError(f"the picture cannot be decoded: {exc}") from exc
    if is_tensor(image):
        if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
            raise ValueError(f"a tensor must be (3, height, width), got {tuple(image.shape)}")
        image = np.moveaxis(image.detach().float().cpu().numpy(), 0, -1)
    if isinstance(image, np.ndarray):
        return [_array_pixels(image)], 1
    raise TypeError(
        f"a picture must be a PIL image, a numpy array or a torch tensor, got {type(image).__name__}"
    )


def _pil_frames(image: Image.Image, most: int) -> tuple[list[NDArray[np.uint8]], int]:
    total = int(getattr(image, "n_frames", 1))
    if total == 1:
        return [_pil_pixels(image)], 1
    if total * image.width * image.height > _MAX_ANIMATION:
        raise ValueError(
            f"the animation has {total} frames of {image.width} x {image.height} pixels; make it smaller"
        )
    count = min(most, total)
    wanted = {round(i * (total - 1) / max(count - 1, 1)) for i in range(count)}
    before = image.tell()
    try:
        frames = [_pil_pixels(f) for i, f in enumerate(_sequence(image)) if i in wanted]
    finally:
        image.seek(before)
    if len(frames) < len(wanted):
        raise ValueError(f"the animation says that it has {total} frames, and some of them cannot be read")
    return frames, total


def _gammas(image: Image.Image) -> list[float]:
    """The gamma that a PNG asks for, where it makes the picture another one; PIL leaves it to the viewer.

    Some viewers heed it and some do not, so such a file may show two pictures.
    """
    gamma = image.info.get("gamma")
    if not isinstance(gamma, int | float) or "srgb" in image.info or "icc_profile" in image.info:
        return []
    return [float(gamma)] if gamma > 0 and abs(gamma / _USUAL_GAMMA - 1) > 0.1 else []


def _brightened(frame: NDArray[np.uint8], gamma: float) -> NDArray[np.uint8]:
    levels = (np.arange(256) / 255) ** (_USUAL_GAMMA / gamma)
    table = np.round(levels * 255).astype(np.uint8)
    return np.concatenate([table[frame[:, :, :3]], frame[:, :, 3:]], axis=2)


def _sequence(image: Image.Image) -> Iterator[Image.Image]:
    yield from ImageSequence.Iterator(image)


def _pil_pixels(image: Image.Image) -> NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _array_pixels(_deep_pixels(image))
    translucent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return np.array(image.convert("RGBA" if translucent and image.mode != "LAB" else "RGB"))


def _deep_pixels(image: Image.Image) -> NDArray[Any]:
    """Pixels of a picture of 16 or 32 bits as floats in [0, 1], whose range must be one of the usual ones."""
    values = np.asarray(image, np.float64)
    top = float(values.max())
    usual = next((limit for limit in (1.0, 255.0, 65535.0) if top <= limit), None)
    if image.mode.startswith("I"):  # 32 bits often hold 8, and a reading too bright hides nothing
        usual = 255.0 if image.mode == "I" and top <= 255 else 65535.0 if top <= 65535 else None
    if usual is None or float(values.min()) < 0:
        raise ValueError(f"a picture of mode {image.mode} must have values in [0, 65535], got up to {top:g}")
    return values / usual


def _array_pixels(array: Any) -> NDArray[np.uint8]:
    """(height, width, 3 or 4) uint8 from an array of any usual kind."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"an array must be (height, width, 3), got {array.shape}")
    _refuse_size(array.shape[1], array.shape[0])
    if array.dtype == np.uint16:
        array = array / 65535.0
    elif array.dtype == np.bool_:
        array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(np.min(array)), float(np.max(array))
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # also false for NaN
            raise ValueError(f"float pixels must be in [0, 1], got {low:g} to {high:g}")
        array = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, uint16 or float in [0, 1], got {array.dtype}")
    pixels: NDArray[np.uint8] = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array
    return pixels


def _backgrounds(frame: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """What a frame shows: its colours as stored, and, where it is not opaque, on white and on black."""
    colours = np.ascontiguousarray(frame[:, :, :3])
    if frame.shape[2] == 3 or bool((frame[:, :, 3] == 255).all()):
        return [colours]
    alpha = frame[:, :, 3:].astype(np.float32) / 255
    black = colours * alpha
    return [colours, *(np.round(x).astype(np.uint8) for x in (black + 255 * (1 - alpha), black))]
