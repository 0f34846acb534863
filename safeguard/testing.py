"""Small real checks, refiners and backends with known answers.

For tests of guarded applications and our own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safeguard.types import Finding, Modality, RefineRequest, Scores, Span

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


class FakeBackend:
    """A backend that computes its outputs with a function, and counts its runs in `shapes`.

    shapes: one entry per run, the shape of its first input. tensor_device: where it says that it takes torch
    tensors in the place of arrays; "cpu" for those in host memory.
    """

    def __init__(
        self, function: Callable[[Arrays], dict[str, NDArray[Any]]], *, tensor_device: str | None = None
    ) -> None:
        self._function, self.tensor_device = function, tensor_device
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        """What the function makes of the inputs."""
        self.shapes.append(next(iter(inputs.values())).shape)
        return self._function(inputs)


class WordCheck:
    """Scores 1 for texts that hold one of the words, else 0; spans are where they stand.

    Counts what it is given.
    """

    modality: Modality = "text"

    def __init__(self, *words: str, name: str = "words", category: str = "bad") -> None:
        self.name = name
        self._words, self._category = words, category
        self.seen: list[str] = []

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        self.seen += batch
        return [self._find(text) for text in batch]

    def _find(self, text: str) -> Finding:
        spans = []
        for word in self._words:
            start = text.find(word)
            while start >= 0:
                spans.append(Span(start, start + len(word), self._category))
                start = text.find(word, start + 1)
        return Finding({self._category: 1.0 if spans else 0.0}, tuple(spans))


class ScoreCheck:
    """Gives each item the scores that a table has for it, or `otherwise`; items must be hashable."""

    def __init__(
        self,
        table: Mapping[Any, Scores],
        otherwise: Scores | None = None,
        *,
        name: str = "scores",
        modality: Modality = "text",
    ) -> None:
        self.name, self.modality = name, modality
        self._table, self._otherwise = table, otherwise or {"bad": 0.0}

    def __call__(self, batch: Sequence[Any], /) -> list[Scores]:
        return [self._table.get(item, self._otherwise) for item in batch]


class BrightCheck:
    """Scores a picture by its mean brightness, 0 black to 1 white: PIL, numpy or torch."""

    name = "bright"
    modality: Modality = "image"

    def __call__(self, batch: Sequence[Any], /) -> list[Scores]:
        return [{"bright": self._mean(image)} for image in batch]

    def _mean(self, image: Any) -> float:
        import numpy as np

        if hasattr(image, "detach"):
            image = image.detach().float().cpu().numpy()
        pixels = np.asarray(image)
        scale = 255.0 if pixels.dtype == np.uint8 else 1.0
        return float(pixels.mean() / scale)


class FailingCheck:
    """Raises `error` for every batch in which `when` holds for an item."""

    def __init__(
        self,
        error: BaseException | None = None,
        *,
        when: Callable[[Any], bool] = lambda _: True,
        name: str = "failing",
        modality: Modality = "text",
    ) -> None:
        self.name, self.modality = name, modality
        self._error, self._when = error or RuntimeError("device lost"), when

    def __call__(self, batch: Sequence[Any], /) -> list[Scores]:
        if any(self._when(item) for item in batch):
            raise self._error.with_traceback(None)  # or each call would add its frames, and keep its batch
        return [{"bad": 0.0} for _ in batch]


class HangingCheck:
    """Does not come back before `release` is called; tells by `entered` that it was called."""

    name = "hanging"
    modality: Modality = "text"

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def release(self) -> None:
        """Let every call go on."""
        self._open.set()

    def __call__(self, batch: Sequence[str], /) -> list[Scores]:
        self.entered.set()
        self._open.wait(30)
        return [{"bad": 0.0} for _ in batch]


class SwapRefiner:
    """Replaces words by a table; keeps the requests it was given."""

    name = "swap"

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = table
        self.requests: list[RefineRequest] = []

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        self.requests += requests
        return [self._swap(request.prompt) for request in requests]

    def _swap(self, text: str) -> str:
        for old, new in self._table.items():
            text = text.replace(old, new)
        return text
