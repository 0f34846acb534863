from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.manifest import ImagePreprocess

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
pytest.importorskip("transformers", reason="transformers is not installed (extra torch)")

CLIP = ImagePreprocess(
    size=224,
    resize=224,
    mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's own
    std=(0.26862954, 0.26130258, 0.27577711),
)


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Any:
    return np.array(Image.fromarray(noise(8, 8)).resize((width, height), Image.Resampling.BICUBIC))


def levels_off(image: Any) -> Any:
    """Difference to CLIP's reference processor in levels of 255, for each pixel and channel."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from safeguard.image_tensors import preprocess_on_device

    reference = CLIPImageProcessorPil()(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    found = preprocess_on_device(torch.from_numpy(image).permute(2, 0, 1) / 255, CLIP)[0].numpy()
    return np.abs(found - reference) * np.array(CLIP.std).reshape(3, 1, 1) * 255


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (300, 400), (512, 384), (100, 150), (224, 224), (777, 333), (333, 777)]
)
def test_pixels_on_a_device_are_those_of_the_reference_of_clip(height: int, width: int, kind: Any) -> None:
    off = levels_off(kind(height, width))

    assert off.max() < 2.01
    assert (off > 0.01).mean() < 0.02


def test_the_result_stays_a_tensor_where_the_picture_was() -> None:
    from safeguard.image_tensors import preprocess_on_device

    found = preprocess_on_device(torch.full((3, 300, 400), 0.5), CLIP)

    assert (found.shape, found.dtype, found.device.type) == ((1, 3, 224, 224), torch.float32, "cpu")


def test_a_picture_of_the_right_size_keeps_every_level() -> None:
    assert levels_off(noise(224, 224)).max() < 1e-3


# --- kept on their device: tensors of the host take the same path where "cpu" is asked for

SMALL = ImagePreprocess(size=32, resize=40, mean=CLIP.mean, std=CLIP.std)


def tensor(image: Any) -> Any:
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def test_kept_rows_are_those_of_the_host_within_two_levels() -> None:
    from safeguard.images import prepare

    pictures = [tensor(noise(60, 90)), tensor(smooth(60, 90)), tensor(smooth(50, 200)), tensor(noise(40, 40))]

    kept, host = prepare(pictures, SMALL, keep_on="cpu"), prepare(pictures, SMALL)

    assert isinstance(kept.array, torch.Tensor)
    assert kept.array.dtype == torch.float32
    assert kept.coverage == host.coverage
    assert kept.owners.tolist() == host.owners.tolist() == [0, 1, 2, 2, 2, 2, 2, 3]
    # the long one is resized to 40 x 160: crops of 32 begin at 64 (the centre), 0, 32, 96, 128
    off = np.abs(kept.array.numpy() - host.array) * np.array(CLIP.std).reshape(3, 1, 1) * 255
    assert off.max() < 2.01
    assert (off > 0.01).mean() < 0.02


def test_rows_of_pictures_prepared_together_are_those_of_each_alone() -> None:
    from safeguard.image_tensors import preprocess_on_device, preprocess_together

    squash = ImagePreprocess(size=16, resize=16, mode="squash", layout="NHWC", channels="BGR")
    pictures = [
        tensor(noise(64, 20)),
        tensor(smooth(64, 20)),
        tensor(noise(30, 31)),
        tensor(noise(64, 20) // 2),
    ]

    together = preprocess_together(pictures, squash)

    assert [len(rows) for rows in together] == [6, 6, 1, 6]  # whole, and the five squares of a long picture
    for rows, picture in zip(together, pictures, strict=True):
        torch.testing.assert_close(rows, preprocess_on_device(picture, squash), rtol=0, atol=1e-6)


def test_pictures_of_every_kind_in_one_batch_keep_their_order() -> None:
    from safeguard.images import prepare

    plain = ImagePreprocess(size=16, resize=16, mode="squash", resample="bilinear")
    grey = torch.full((1, 20, 20), 0.4)
    clear = torch.cat([torch.full((3, 20, 20), 0.6), torch.zeros(1, 20, 20)])
    batch = [Image.new("RGB", (8, 8), (51, 51, 51)), grey, clear, torch.full((3, 9, 9), 0.8)]

    kept = prepare(batch, plain, keep_on="cpu")

    # 51 / 255 = 0.2; the transparent one as stored, on white and on black; levels of 1/255
    assert kept.owners.tolist() == [0, 1, 2, 2, 2, 3]
    assert kept.array.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.2, 0.4, 0.6, 1.0, 0.0, 0.8], abs=0.002)


def test_without_a_tensor_in_the_batch_rows_are_an_array() -> None:
    from safeguard.images import prepare

    assert isinstance(prepare([noise(40, 40)], SMALL, keep_on="cpu").array, np.ndarray)
    assert prepare([], SMALL, keep_on="cpu").array.shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (torch.full((3, 8, 8), torch.nan), r"float pixels must be in \[0, 1\], got nan"),
        (torch.full((3, 8, 8), 2.0), r"must be in \[0, 1\], got 2 to 2"),
        (torch.full((3, 8, 8), -torch.inf), r"must be in \[0, 1\], got -inf"),
        (torch.zeros(3, 0, 8), "the picture is empty: 8 x 0 pixels"),
        (torch.zeros(3, 2, 200), "is 200 x 2, longer than 64 times"),
        (torch.zeros(8, 8), r"a tensor must be \(3, height, width\), got \(8, 8\)"),
        (torch.zeros(2, 8, 8), r"a tensor must be \(3, height, width\), got \(2, 8, 8\)"),
    ],
)
def test_a_bad_tensor_is_refused_and_named_on_either_path(bad: Any, why: str) -> None:
    from safeguard.images import prepare

    batch = [torch.full((3, 8, 8), 0.5), bad]
    with pytest.raises(ValueError, match=f"item 1 of the batch: .*{why}"):
        prepare(batch, SMALL, keep_on="cpu")
    with pytest.raises(ValueError, match=f"item 1 of the batch: .*{why}"):
        prepare(batch, SMALL)


def test_many_pixels_are_not_all_prepared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from safeguard import image_tensors

    pictures = [tensor(noise(40, 40)) for _ in range(5)]
    whole = image_tensors.preprocess_together(pictures, SMALL)
    monkeypatch.setattr(image_tensors, "MOST_PIXELS", 2 * 40 * 40)

    parts = image_tensors.preprocess_together(pictures, SMALL)

    torch.testing.assert_close(torch.cat(parts), torch.cat(whole), rtol=0, atol=1e-6)
