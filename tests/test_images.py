from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.images import open_image, prepare, preprocess, to_array, views
from safeguard.manifest import ImagePreprocess

CLIP = ImagePreprocess(
    size=224,
    resize=224,
    mean=(0.48145466, 0.4578275, 0.40821073),  # openai/clip-vit-large-patch14
    std=(0.26862954, 0.26130258, 0.27577711),
)
PLAIN = ImagePreprocess(size=16, resize=16, mode="squash", resample="bilinear", scale=1.0)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth colours with some noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=2) * 100 + 128
    noise = np.random.default_rng(seed).normal(0, 10, waves.shape)
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def red(alpha: int = 255) -> Image.Image:
    return Image.new("RGBA", (8, 8), (255, 0, 0, alpha))


# --- from pictures to pixels


def test_an_opaque_picture_has_one_view() -> None:
    (view,) = views(red())

    assert view.shape == (8, 8, 3)
    assert view[0, 0].tolist() == [255, 0, 0]


def test_a_translucent_picture_is_seen_as_stored_on_white_and_on_black() -> None:
    found = [view[0, 0].tolist() for view in views(red(51))]

    # alpha 51 / 255 = 0.2: on white 255 * 0.8 = 204 in green and blue, on black 255 * 0.2 = 51 of red
    assert found == [[255, 0, 0], [255, 204, 204], [51, 0, 0]]


def test_colours_under_full_transparency_are_seen() -> None:
    assert to_array(red(0))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "RGBX"]
)
def test_every_mode_of_pil_becomes_rgb(mode: str) -> None:
    source = Image.new("RGB", (8, 8), "white")
    via = {"LA": "L", "PA": "P", "RGBa": "RGBA", "I": "L", "F": "L"}.get(mode)
    if mode == "LAB":
        image = Image.new("LAB", (8, 8), (255, 128, 128))
    else:
        image = (source.convert(via) if via else source).convert(mode)
    if mode == "I":
        image = Image.fromarray(np.full((8, 8), 65535, np.int32))

    view = to_array(image)

    assert view.shape == (8, 8, 3)
    assert view.dtype == np.uint8
    assert view.min() >= 254


def test_a_16_bit_picture_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))

    assert to_array(image)[0, 0].tolist() == [100, 100, 100]


def test_a_rotated_photograph_is_seen_upright() -> None:
    image = Image.fromarray(picture(4, 8))
    image.getexif()[274] = 6  # orientation: rotate by 90 degrees

    assert to_array(image).shape == (8, 4, 3)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((4, 4, 3), 0.5), 128),
        (np.full((4, 4, 3), 0.5, np.float16), 128),
        (np.full((4, 4, 3), 1.001), 255),
        (np.full((4, 4, 3), 7, np.uint8), 7),
        (np.full((4, 4, 3), 65535, np.uint16), 255),
        (np.full((4, 4), 9, np.uint8), 9),
        (np.full((4, 4, 1), 9, np.uint8), 9),
        (np.full((4, 4), True), 255),
    ],
)
def test_arrays_of_every_usual_kind_are_read(array: Any, expected: int) -> None:
    assert to_array(array)[3, 3].tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.full((4, 4, 3), np.nan), r"float pixels must be in \[0, 1\], got nan"),
        (np.full((4, 4, 3), np.inf), r"float pixels must be in \[0, 1\], got inf"),
        (np.full((4, 4, 3), -1.0), r"float pixels must be in \[0, 1\], got -1"),
        (np.full((4, 4, 3), 255.0), r"float pixels must be in \[0, 1\], got 255"),
        (np.zeros((4, 4, 3), np.int64), "uint8, uint16 or float"),
        (np.zeros((4, 4, 5)), r"must be \(height, width, 3\), got \(4, 4, 5\)"),
        (np.zeros((2, 4, 4, 3)), r"must be \(height, width, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "the picture is empty: 4 x 0 pixels"),
        (np.zeros((1, 65, 3), np.uint8), "longer than 64 times its shorter side"),
    ],
)
def test_arrays_that_are_no_picture_are_refused(array: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        to_array(array)


@pytest.mark.parametrize("item", [None, "picture.png", b"\x89PNG", [[1, 2], [3, 4]]])
def test_what_is_no_picture_is_a_type_error(item: Any) -> None:
    with pytest.raises(
        TypeError, match="a picture must be a PIL image, a numpy array or a torch tensor, got"
    ):
        to_array(item)


def test_a_picture_of_too_many_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 50000000; make it smaller"):
        to_array(Image.new("1", (8000, 7000)))


def test_an_animation_is_sampled_from_first_to_last_frame() -> None:
    colours = [(i, 0, 0) for i in range(0, 250, 10)]
    frames = [Image.new("RGB", (8, 8), c) for c in colours]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    animation = Image.open(file)

    prepared = prepare([animation], PLAIN, max_frames=4)

    # 25 frames, four of them: 0, 8, 16, 24, whose red is ten times their number
    assert prepared.array[:, 0, 0, 0].tolist() == [0, 80, 160, 240]
    assert (prepared.coverage[0].total, prepared.coverage[0].checked) == (25, 4)
    assert animation.tell() == 0


# --- files


def test_a_file_is_decoded_completely(tmp_path: Path) -> None:
    Image.fromarray(picture(20, 30)).save(tmp_path / "a.png")

    np.testing.assert_array_equal(to_array(open_image(tmp_path / "a.png")), picture(20, 30))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    Image.fromarray(picture(64, 64)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(ValueError, match=r"a.jpg cannot be read as a picture"):
        open_image(tmp_path / "a.jpg")


def test_a_truncated_picture_that_was_opened_lazily_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(file, "JPEG")
    lazy = Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))

    with pytest.raises(ValueError, match="item 0 of the batch: the picture cannot be decoded"):
        prepare([lazy], PLAIN)


def test_a_small_file_of_very_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")

    with pytest.raises(ValueError, match=r"at most 50000000 pixels|more than 50000000"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", b"no picture"), ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n")]
)
def test_a_file_that_is_no_known_picture_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=f"{name} cannot be read as a picture .* known: AVIF"):
        open_image(tmp_path / name)


# --- from pixels to model input


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 400), (513, 290), (100, 120), (768, 1024)])
def test_preprocessing_equals_the_reference_of_clip(height: int, width: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra torch)")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(height, width)
    reference = CLIPImageProcessorPil()(Image.fromarray(image), return_tensors="np")["pixel_values"]

    # pixels are equal; what is left is the order of float32 operations
    np.testing.assert_allclose(preprocess([image], CLIP), reference, atol=1e-5)


def test_bgr_nhwc_with_means_as_caffe_models_want_it() -> None:
    spec = ImagePreprocess(
        size=16, resize=16, mode="squash", layout="NHWC", channels="BGR", scale=1.0, mean=(104, 117, 123)
    )

    array = preprocess([np.full((20, 30, 3), (10, 20, 30), np.uint8)], spec)

    assert array.shape == (1, 16, 16, 3)
    assert array[0, 0, 0].tolist() == [30 - 104, 20 - 117, 10 - 123]


def test_squash_then_cut_equals_pil_in_two_steps() -> None:
    image = picture(100, 150)
    spec = ImagePreprocess(size=16, resize=20, mode="squash", resample="bilinear", layout="NHWC", scale=1.0)
    resized = Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR).crop((2, 2, 18, 18))

    np.testing.assert_array_equal(preprocess([image], spec)[0], np.asarray(resized, np.float32))


def test_a_long_picture_is_cut_into_tiles_that_reach_both_ends() -> None:
    image = np.zeros((16, 64, 3), np.uint8)
    image[:, :16] = 50
    image[:, 48:] = 200
    spec = ImagePreprocess(size=16, resize=16, resample="bilinear", scale=1.0)

    prepared = prepare([image], spec)

    # the centre at 24, then tiles at 0, 16, 32, 48
    assert prepared.array.mean(axis=(1, 2, 3)).tolist() == [0, 50, 0, 0, 200]
    assert prepared.owners.tolist() == [0] * 5


def test_a_picture_of_very_many_crops_is_refused() -> None:
    # 16 frames, each as stored, on white and on black, each cut into 65 crops: 3120
    frames = [Image.new("RGBA", (1024, 16), (10 * i, 0, 0, 128)) for i in range(16)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    spec = ImagePreprocess(size=16, resize=16)

    with pytest.raises(ValueError, match=r"item 0 of the batch: .* more than 512 crops for its 16 frames"):
        prepare([Image.open(file)], spec)


def test_rows_know_their_picture_and_errors_name_it() -> None:
    prepared = prepare([red(), red(51), red()], PLAIN)

    assert prepared.owners.tolist() == [0, 1, 1, 1, 2]
    with pytest.raises(TypeError, match="item 1 of the batch: a picture must be"):
        prepare([red(), "no"], PLAIN)


def test_an_empty_batch_has_no_rows() -> None:
    assert prepare([], PLAIN).array.shape == (0, 3, 16, 16)


# --- tensors


def test_a_tensor_on_the_cpu_gives_the_same_as_its_picture() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    image = picture(40, 50)
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 255

    np.testing.assert_array_equal(prepare([tensor], CLIP).array, preprocess([image], CLIP))


@pytest.mark.parametrize(("height", "width"), [(300, 400), (512, 512), (100, 120), (90, 700)])
@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_the_path_for_devices_differs_from_pil_by_rounding_only(height: int, width: int, mode: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    from safeguard.image_tensors import preprocess_tensor

    spec = ImagePreprocess(size=224, resize=232, mode=mode, scale=1.0, channels="BGR")
    image = picture(height, width)
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 255

    difference = np.abs(preprocess_tensor(tensor, spec) - prepare([image], spec).array)

    assert difference.max() <= 2  # of 255 levels
    assert difference.mean() < 0.25


def test_a_tensor_with_nan_or_of_another_shape_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    from safeguard.image_tensors import preprocess_tensor

    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got nan"):
        preprocess_tensor(torch.full((3, 8, 8), torch.nan), PLAIN)
    with pytest.raises(ValueError, match=r"must be \(3, height, width\), got \(4, 8, 8\)"):
        preprocess_tensor(torch.zeros(4, 8, 8), PLAIN)
    with pytest.raises(ValueError, match=r"must be \(3, height, width\), got \(8, 8\)"):
        to_array(torch.zeros(8, 8))


@pytest.mark.gpu
def test_a_tensor_on_a_device_is_resized_there() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image = picture(300, 400)
    tensor = torch.from_numpy(image).permute(2, 0, 1).cuda() / 255

    spec = ImagePreprocess(size=224, resize=224, scale=1.0)
    assert np.abs(prepare([tensor], spec).array - preprocess([image], spec)).max() <= 2


@pytest.mark.parametrize("device_path", [False, True])
def test_a_long_picture_for_a_squashing_model_is_seen_whole_and_in_squares(device_path: bool) -> None:
    image = np.zeros((64, 16, 3), np.uint8)
    image[:16] = 50
    image[48:] = 200
    if device_path:
        torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
        from safeguard.image_tensors import preprocess_tensor

        array = preprocess_tensor(torch.from_numpy(image).permute(2, 0, 1) / 255, PLAIN)
    else:
        array = prepare([image], PLAIN).array

    # the whole: (50 + 0 + 0 + 200) / 4; then squares from 24 (the centre), 0, 16, 32, 48
    assert array.mean(axis=(1, 2, 3)).tolist() == pytest.approx([62.5, 0, 50, 0, 0, 200], abs=0.6)


def test_an_animation_of_too_many_pixels_is_refused() -> None:
    frames = [Image.new("1", (2000, 2000), i % 2) for i in range(130)]
    file = io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:], compression="group4")

    with pytest.raises(ValueError, match="the animation has 130 frames of 2000 x 2000 pixels"):
        to_array(Image.open(file))
