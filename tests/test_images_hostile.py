"""Pictures made to be seen otherwise than they are judged: each is judged as shown, or refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard import Guard, Policy
from safeguard.errors import Blocked
from safeguard.images import closer_looks, grid_tiles, prepare, to_array, views
from safeguard.manifest import ImagePreprocess

RED, GREY = (255, 0, 0), (90, 90, 90)
SPEC = ImagePreprocess(size=16, resize=16, mode="squash", resample="bilinear", scale=1.0)


class RedShare:
    """Scores the share of a picture that is plainly red, the worst of its frames and backgrounds."""

    name = "red"
    modality = "image"

    def __call__(self, batch: Sequence[Any], /) -> list[dict[str, float]]:
        return [{"red": max(share(view) for view in views(picture))} for picture in batch]


class LeftHalf:
    """Scores 1 where the left half is red and the right is not: a check that knows up from down."""

    name = "left"
    modality = "image"

    def __call__(self, batch: Sequence[Any], /) -> list[dict[str, float]]:
        found = []
        for picture in batch:
            pixels = to_array(picture)
            half = pixels.shape[1] // 2
            found.append({"left": float(share(pixels[:, :half]) > 0.9 and share(pixels[:, half:]) < 0.1)})
        return found


def share(pixels: Any) -> float:
    red = (pixels[:, :, 0] > 200) & (pixels[:, :, 1:] < 60).all(axis=2)
    return float(red.mean())


def collage(place: tuple[int, int], size: int, side: int = 192) -> Image.Image:
    """A grey picture with a red square in it."""
    picture = Image.new("RGB", (side, side), GREY)
    picture.paste(RED, (*place, place[0] + size, place[1] + size))
    return picture


def verdict(check: Any, picture: Any, **settings: Any) -> bool:
    """Whether a guard with these settings blocks the picture."""
    (report,) = Guard(outputs=[check], policy=Policy(**settings)).check_output([picture], modality="image")
    return report.blocked


# --- tiles and turns


@pytest.mark.parametrize("place", [(0, 0), (96, 0), (0, 96), (96, 96), (48, 48)])
def test_a_quarter_of_a_collage_is_judged_for_itself_where_the_policy_asks(place: tuple[int, int]) -> None:
    picture = collage(place, 96)

    assert not verdict(RedShare(), picture)  # a quarter of the whole is red
    assert verdict(RedShare(), picture, image_tiles=2)


@pytest.mark.parametrize("place", [(0, 0), (64, 128), (32, 96)])
def test_a_ninth_of_a_collage_needs_three_tiles(place: tuple[int, int]) -> None:
    picture = collage(place, 64)

    assert not verdict(RedShare(), picture, image_tiles=2)
    assert verdict(RedShare(), picture, image_tiles=3)


@pytest.mark.parametrize(
    "turn", [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270]
)
def test_a_turned_picture_is_judged_upright_where_the_policy_asks(turn: Image.Transpose) -> None:
    upright = Image.new("RGB", (64, 64), GREY)
    upright.paste(RED, (0, 0, 32, 64))
    turned = upright.transpose(turn)

    assert verdict(LeftHalf(), upright)
    assert not verdict(LeftHalf(), turned)
    assert verdict(LeftHalf(), turned, image_turns=4)


def test_a_harmless_picture_passes_with_tiles_and_turns() -> None:
    assert not verdict(RedShare(), collage((0, 0), 40), image_tiles=2, image_turns=4)


def test_every_frame_and_background_of_a_collage_is_cut() -> None:
    frames = [Image.new("RGB", (128, 128), GREY), collage((64, 64), 64, 128)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)

    assert verdict(RedShare(), Image.open(file), image_tiles=2)


def test_a_picture_that_cannot_be_cut_is_blocked_and_its_neighbours_are_not() -> None:
    file = io.BytesIO()
    collage((0, 0), 9).save(file, "JPEG")
    broken = Image.open(io.BytesIO(file.getvalue()[:700]))
    guard = Guard(outputs=[RedShare()], policy=Policy(image_tiles=2))

    bad, good = guard.check_output([broken, collage((0, 0), 9)], modality="image")

    assert (bad.blocked, good.blocked) == (True, False)
    assert "cannot be looked at closely: the picture cannot be decoded" in str(bad.verdicts[0].error)


def test_parts_of_a_guarded_generator_are_judged_too() -> None:
    def paint(prompt: str) -> Image.Image:
        return collage((96, 96), 96)

    guarded = Guard(outputs=[RedShare()], policy=Policy(image_tiles=2))(paint, task="t2i")

    with pytest.raises(Blocked):
        guarded("a picture")


@pytest.mark.parametrize(("count", "parts"), [(1, 0), (2, 5), (3, 13), (4, 25)])
def test_the_number_of_parts_is_as_stated(count: int, parts: int) -> None:
    assert len(grid_tiles(256, 300, count)) == parts
    assert len(closer_looks(collage((0, 0), 9, 256), tiles=count)) == parts + 1


def test_the_parts_of_a_grid_cover_all_of_it() -> None:
    seen = np.zeros((131, 97), bool)
    for cell in grid_tiles(131, 97, 3)[:9]:
        seen[cell] = True

    assert seen.all()


def test_parts_too_small_to_show_anything_are_left_out() -> None:
    assert grid_tiles(62, 400, 2) == []
    assert len(closer_looks(collage((0, 0), 9, 60), tiles=2)) == 1


def test_a_tensor_is_cut_as_its_picture_is() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    picture = collage((96, 0), 96)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    pairs = zip(closer_looks(tensor, tiles=2, turns=4), closer_looks(picture, tiles=2, turns=4), strict=True)

    assert all(np.array_equal(to_array(a), to_array(b)) for a, b in pairs)


@pytest.mark.parametrize("how", [{"tiles": 0}, {"turns": 2}])
def test_impossible_looks_are_refused(how: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="tiles must be at least 1 and turns 1 or 4, got"):
        closer_looks(collage((0, 0), 9), **how)


def test_more_looks_than_the_limit_are_refused() -> None:
    frames = [Image.new("RGB", (128, 128), (i, 0, 0)) for i in range(30)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)

    with pytest.raises(ValueError, match="needs more than 512 looks for its 30 frames"):
        closer_looks(Image.open(file), tiles=4, max_frames=30)  # 30 * (25 + 1)


# --- files that show two pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: Any, colour: int, *extra: bytes) -> Image.Image:
    """A PNG of 8 or 16 bits, as its pixels are, with further chunks before its data."""
    height, width = pixels.shape[:2]
    big = pixels.astype(">u2" if pixels.dtype == np.uint16 else np.uint8)
    rows = b"".join(b"\0" + big[row].tobytes() for row in range(height))
    head = struct.pack(">IIBBBBB", width, height, 16 if pixels.dtype == np.uint16 else 8, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))


def test_a_png_with_an_odd_gamma_is_seen_with_and_without_it() -> None:
    gamma = chunk(b"gAMA", struct.pack(">I", 22727))  # 0.22727 = 1 / 4.4
    found = views(png(np.full((8, 8, 3), 64, np.uint8), 2, gamma))

    # shown with 1 / 2.2 / (1 / 4.4) = 2: (64 / 255) ** 2 * 255 = 16.06
    assert [view[0, 0].tolist() for view in found] == [[64, 64, 64], [16, 16, 16]]


def test_a_png_with_the_usual_gamma_has_one_view() -> None:
    assert len(views(png(np.full((8, 8, 3), 64, np.uint8), 2, chunk(b"gAMA", struct.pack(">I", 45455))))) == 1


def test_gamma_frames_are_no_frames_of_an_animation() -> None:
    gamma = chunk(b"gAMA", struct.pack(">I", 22727))
    (coverage,) = prepare([png(np.full((8, 8, 3), 64, np.uint8), 2, gamma)], SPEC).coverage

    assert (coverage.total, coverage.checked, coverage.windows) == (1, 1, 2)


RAMP = np.arange(0, 256, 8)
WAVE = np.stack([*np.meshgrid(RAMP, RAMP), np.full((32, 32), 70)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: png(WAVE.astype(np.uint16) * 257, 2), 1),
        (lambda: png(np.dstack([WAVE, np.full((32, 32), 255, np.uint8)]).astype(np.uint16) * 257, 6), 1),
        (lambda: png(np.dstack([WAVE, np.full((32, 32), 99, np.uint8)]).astype(np.uint16) * 257, 6), 3),
        (lambda: png(WAVE, 2, chunk(b"tRNS", struct.pack(">HHH", 0, 0, 70))), 3),  # one colour is transparent
    ],
    ids=["16 bit", "16 bit opaque", "16 bit translucent", "transparent colour"],
)
def test_colours_of_odd_pngs_are_seen_as_stored_and_blended(
    make: Callable[[], Image.Image], seen: int
) -> None:
    found = views(make())

    assert len(found) == seen
    np.testing.assert_array_equal(found[0], WAVE)


def test_a_cmyk_photograph_is_seen_in_its_colours() -> None:
    file = io.BytesIO()
    Image.fromarray(WAVE).convert("CMYK").save(file, "JPEG", quality=95)

    assert np.abs(to_array(Image.open(file)).astype(int) - WAVE).max() <= 12  # of 255 levels: JPEG


def test_a_palette_whose_entries_are_transparent_is_seen_as_stored_and_blended() -> None:
    picture = Image.fromarray(WAVE).quantize(8)
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=bytes([0] * 8))
    found = views(Image.open(file))

    # all of it is transparent: as stored, on white, on black
    assert [view.mean() for view in found[1:]] == [255, 0]
    np.testing.assert_array_equal(found[0], np.array(picture.convert("RGB")))


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))],
)
def test_the_orientation_that_a_file_states_is_heeded(orientation: int, corner: tuple[int, int]) -> None:
    pixels = np.full((8, 8, 3), 90, np.uint8)
    pixels[0, 0] = RED  # where the first pixel stored is shown: Exif 2.32, tag 274
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)

    shown = to_array(Image.open(file))

    assert shown[7 * corner[0], 7 * corner[1]].tolist() == list(RED)


def test_small_numbers_in_a_32_bit_picture_are_no_darkness() -> None:
    picture = Image.fromarray(np.full((8, 8), 200, np.int32))

    assert to_array(picture)[0, 0].tolist() == [200, 200, 200]


# --- animations


@pytest.mark.parametrize("count", [2, 3, 6, 15, 16])
def test_all_frames_of_a_short_animation_are_seen(count: int) -> None:
    frames = [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(count)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)

    seen = [int(view[0, 0, 0]) for view in views(Image.open(file))]

    assert seen == [10 * i for i in range(count)]


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF"])
def test_an_animation_cut_off_is_refused(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    whole = file.getvalue()
    cut = io.BytesIO(whole[: int(len(whole) * 0.95)] if form != "TIFF" else whole[:-2000])

    with pytest.raises(ValueError, match=r"the picture cannot be decoded: |some of them cannot be read"):
        views(Image.open(cut))


def test_an_animation_that_ends_before_it_says_is_refused() -> None:
    class Liar(Image.Image):
        """Says that it has three frames, and has two."""

        n_frames = 3
        place = 0

        def seek(self, frame: int) -> None:
            if frame > 1:
                raise EOFError
            self.place = frame

        def tell(self) -> int:
            return self.place

    liar = Liar()
    liar.im, liar._mode, liar._size = Image.new("RGB", (8, 8)).im, "RGB", (8, 8)

    with pytest.raises(ValueError, match="says that it has 3 frames, and some of them cannot be read"):
        views(liar)


# --- what a picture goes through on its way


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.resize((50, 50)),
        lambda p: p.resize((700, 500)),
        lambda p: p.crop((10, 10, 150, 150)),
        lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda p: p.convert("P"),
        lambda p: p.convert("CMYK"),
        lambda p: _jpeg(p, 15),
        lambda p: _noisy(p, 25),
    ],
    ids=["smaller", "larger and squashed", "cut", "mirrored", "palette", "cmyk", "jpeg", "noise"],
)
def test_the_model_is_given_nearly_the_same_after_a_harmless_change(
    change: Callable[[Image.Image], Image.Image],
) -> None:
    y, x = np.mgrid[0:160, 0:160]
    soft = np.stack(
        [128 + 60 * np.cos((x - 80) / 40), np.full(x.shape, 90.0), 128 + 60 * np.cos((y - 80) / 40)], 2
    )
    picture = Image.fromarray(soft.astype(np.uint8))

    before, after = (prepare([p], SPEC).array for p in (picture, change(picture)))

    assert np.abs(before - after).mean() < 12  # of 255 levels


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def _noisy(picture: Image.Image, sigma: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, sigma, (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
