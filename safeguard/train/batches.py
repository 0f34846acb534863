"""Batches for the text classifier: drawn by source, disguised, tokenised, sorted to spare padding."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from safeguard.text import normalise as normalise_text
from safeguard.train.augment import UNDONE, disguise, draw_disguise
from safeguard.train.text_data import JUDGED, LABELS, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

Place = tuple[int, int, int]
"""Epoch, chunk of it, batch of the chunk: where the next batch is."""

_PICTURE = re.compile("[\u2190-\u21ff\u2300-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]")
_CHUNK = 8192
_LONGEST_PADDED = 200  # characters of a text that is padded: with the padding it mostly fits a window


class Settings(Protocol):
    """The part of the recipe's configuration that is needed here."""

    @property
    def seed(self) -> int: ...
    @property
    def tokens_per_batch(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def disguised(self) -> float: ...
    @property
    def normalised(self) -> float: ...
    @property
    def repeats(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays of one update.

    input_ids, attention_mask: int64 (row, token). targets: float32 (row, label), NaN where unknown. weights:
    float32 (row,). pairs: int64 (pair, 3): row of the unsafe text, row of the harmless one, label.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    targets: NDArray[np.float32]
    weights: NDArray[np.float32]
    pairs: NDArray[np.int64]


class Example:
    """Token ids of one text."""

    @staticmethod
    def cut(ids: Sequence[int], most: int, start: int = 0) -> list[int]:
        """At most `most` ids: the first and last (special tokens), and the text from its token `start` on."""
        if len(ids) <= most:
            return list(ids)
        return [ids[0], *ids[1 + start : 1 + start + most - 2], ids[-1]]

    @staticmethod
    def pad(examples: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask (text, token), 0 where padded."""
        longest = max(map(len, examples))
        ids = np.zeros((len(examples), longest), np.int64)
        mask = np.zeros_like(ids)
        for i, example in enumerate(examples):
            ids[i, : len(example)] = example
            mask[i, : len(example)] = 1
        return ids, mask


def target_array(rows: Sequence[Row]) -> NDArray[np.float32]:
    """Targets (row, label), NaN where a row says nothing."""
    targets = np.full((len(rows), len(LABELS)), np.nan, np.float32)
    column = {label: i for i, label in enumerate(LABELS)}
    for i, row in enumerate(rows):
        for label, value in row.targets.items():
            targets[i, column[label]] = value
    return targets


class Batches:
    """An endless, seeded sequence of batches that can be entered at any place."""

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        normalise: Callable[[str], str] | None = None,
    ) -> None:
        self._rows, self._tokenizer, self._settings = rows, tokenizer, settings
        self._normalise = normalise or (lambda text: normalise_text(text).text)

    def from_place(self, place: Place) -> Iterator[tuple[Batch, Place]]:
        """Batches from a place on, each with the place after it."""
        epoch, chunk, skip = place
        while True:
            order = self._order(epoch)
            chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]
            while chunk < len(chunks):
                batches = self._batches(chunks[chunk], f"{self._settings.seed}/{epoch}/{chunk}")
                for i in range(skip, len(batches)):
                    yield self._build(batches[i]), (epoch, chunk, i + 1)
                chunk, skip = chunk + 1, 0
            epoch, chunk = epoch + 1, 0

    def _order(self, epoch: int) -> list[int]:
        rng = random.Random(f"{self._settings.seed}/{epoch}")
        order: list[int] = []
        for i, row in enumerate(self._rows):
            times = self._settings.repeats.get(row.source, 1.0)
            order.extend([i] * (int(times) + (rng.random() < times % 1)))
        rng.shuffle(order)
        return order

    def _batches(self, chosen: Sequence[int], seed: str) -> list[list[list[tuple[Row, list[int]]]]]:
        """Lists of groups (a row, or a row and its twin) of similar length, in random order."""
        rng = random.Random(seed)
        groups = []
        for i in chosen:
            row = self._rows[i]
            members = [row] if row.twin is None else [row, row.twin]
            views = [self._view(member, rng) for member in members]
            encoded = self._tokenizer.encode_batch(views)
            groups.append([(m, self._cut(m, e.ids, rng)) for m, e in zip(members, encoded, strict=True)])
        groups.sort(key=lambda group: max(len(ids) for _, ids in group))
        batches: list[list[list[tuple[Row, list[int]]]]] = [[]]
        longest, count = 0, 0
        for group in groups:
            longest = max(len(ids) for _, ids in group)
            if count and longest * (count + len(group)) > self._settings.tokens_per_batch:
                batches.append([])
                count = 0
            batches[-1].append(group)
            count += len(group)
        rng.shuffle(batches)
        return batches

    def _view(self, row: Row, rng: random.Random) -> str:
        """The text as it is, normalised, or in disguise.

        An unsafe text with emoji is never shown as it is: the tokenizer knows none, and they may be the harm.
        Nor is one whose disguise normalisation takes off: the guard reads both, and a model that calls
        garbled letters unsafe would flag harmless ones, too.
        """
        draw, seed, name = rng.random(), rng.randrange(2**32), draw_disguise(rng)
        text = row.text
        unsafe = any(row.targets.get(label, 0.0) > 0.5 for label in JUDGED)
        pictured = unsafe and _PICTURE.search(text) is not None
        if draw < self._settings.disguised and len(text) < (
            _LONGEST_PADDED if name.startswith("padded") else 1500
        ):
            text = disguise(self._normalise(text) if pictured else text, seed, name=name)
            return self._normalise(text) if seed % 2 or (unsafe and name in UNDONE) else text
        if pictured or draw < self._settings.disguised + self._settings.normalised:
            return self._normalise(text)
        return text

    def _cut(self, row: Row, ids: list[int], rng: random.Random) -> list[int]:
        """A window of a long text: its start, or, where every part tells, any."""
        spare = len(ids) - self._settings.max_tokens
        start = 0
        tells = all(row.targets.get(label, 0.0) < 0.5 for label in JUDGED if label != "jailbreak")
        if spare > 0 and tells and rng.random() < 0.6:
            start = rng.randint(0, spare)
        return Example.cut(ids, self._settings.max_tokens, start)

    def _build(self, groups: Sequence[Sequence[tuple[Row, list[int]]]]) -> Batch:
        rows: list[Row] = []
        ids: list[list[int]] = []
        pairs: list[tuple[int, int, int]] = []
        for group in groups:
            if len(group) == 2:
                pairs.extend((len(rows), len(rows) + 1, LABELS.index(name)) for name in _opposed(group[0][0]))
            rows.extend(row for row, _ in group)
            ids.extend(i for _, i in group)
        input_ids, mask = Example.pad(ids)
        weights = np.array([row.weight for row in rows], np.float32)
        return Batch(input_ids, mask, target_array(rows), weights, np.array(pairs, np.int64).reshape(-1, 3))


def _opposed(row: Row) -> list[str]:
    """The judged labels that a row and its twin disagree on."""
    twin = row.twin
    if twin is None:
        return []
    return [name for name in JUDGED if row.targets.get(name, 0.0) > 0.5 and twin.targets.get(name, 1.0) < 0.5]
