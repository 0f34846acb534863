"""Whether an export says what its model says: both run on the same seeded inputs, differences are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.errors import ParityError
from safeguard.manifest import TensorParity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.backends import Backend

FLOAT32 = 1e-4
"""Largest difference of float32 exports, relative to the largest value (or 1): rounding in another order."""
FLOAT16 = 2e-2
"""The same for float16 exports."""
SEED = 20
Decide = Callable[["NDArray[Any]"], "NDArray[Any]"]
"""From one output tensor to decisions (any shape): what a user would see change."""


@dataclass(frozen=True, slots=True)
class Parity:
    """One output tensor, over all batches."""

    tensor: str
    max_abs: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute value of the reference."""
    flips: int
    decisions: int
    rows: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def flip_share(self) -> float:
        """Flips per decision, 0 where nothing was decided."""
        return self.flips / self.decisions if self.decisions else 0.0

    def record(self) -> TensorParity:
        """As it stands in a manifest."""
        return TensorParity(
            tensor=self.tensor,
            max_abs=self.max_abs,
            scale=self.scale,
            flips=self.flips,
            decisions=self.decisions,
            rows=self.rows,
            shapes=self.shapes,
        )


def compare(
    reference: Backend,
    candidate: Backend,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    *,
    tolerance: float | Mapping[str, float],
    decide: Mapping[str, Decide] | Decide | None = None,
    max_flips: float = 1.0,
    advice: str = "",
) -> list[Parity]:
    """Runs both on each batch and gives one `Parity` per output of the reference, in its order.

    tolerance: largest absolute difference allowed, relative to the largest absolute value of the reference's
    tensor in the batch, or to 1 where that is smaller; infinity to count only; by tensor where they differ.
    decide: for the outputs named, or for all (then differing decisions are flips). max_flips: largest share
    of flips allowed.
    advice: what to do about it, put at the end of the message.

    Raises ParityError for a difference or share over its limit, for values that are not finite where the
    reference's are, for another shape and for an output that is missing; ValueError without any batch.
    """
    found: dict[str, _Tally] = {}
    for batch in batches:
        wanted, got = reference(batch), candidate(batch)
        for name, array in wanted.items():
            limit = tolerance[name] if isinstance(tolerance, Mapping) else tolerance
            if name not in got:
                raise ParityError(name, array.shape, np.inf, limit, what="is missing", advice=advice)
            chosen = decide.get(name) if isinstance(decide, Mapping) else decide
            found.setdefault(name, _Tally(name)).add(array, got[name], chosen, limit, advice)
    if not found:
        raise ValueError("there must be at least one batch to compare on")
    results = [tally.result() for tally in found.values()]
    for result in results:
        if result.flip_share > max_flips:
            raise ParityError(
                result.tensor,
                result.shapes[-1],
                result.flip_share,
                max_flips,
                what=f"flips {result.flips} of {result.decisions} decisions, off",
                advice=advice,
            )
    return results


class _Tally:
    """What was seen of one tensor so far."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self.max_abs = self.scale = 0.0
        self.flips = self.decisions = self.rows = 0
        self.shapes: dict[tuple[int, ...], None] = {}

    def add(
        self, wanted: NDArray[Any], got: NDArray[Any], decide: Decide | None, tolerance: float, advice: str
    ) -> None:
        if wanted.shape != got.shape:
            raise ParityError(
                self.tensor, wanted.shape, np.inf, tolerance, what=f"became {got.shape}, off", advice=advice
            )
        wide, narrow = wanted.astype(np.float64), got.astype(np.float64)
        same = (wide == narrow) | (np.isnan(wide) & np.isnan(narrow))  # infinities too
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.abs(wide - narrow))
        worst = float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))
        scale = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
        limit = tolerance * max(1.0, scale)
        if worst > limit or not np.isfinite(worst):
            raise ParityError(self.tensor, wanted.shape, worst, limit, advice=advice)
        self.max_abs, self.scale = max(self.max_abs, worst), max(self.scale, scale)
        self.rows += len(wanted)
        self.shapes[wanted.shape] = None
        if decide is not None:
            before = decide(wanted)
            self.flips += int((before != decide(got)).sum())
            self.decisions += before.size

    def result(self) -> Parity:
        return Parity(
            self.tensor, self.max_abs, self.scale, self.flips, self.decisions, self.rows, tuple(self.shapes)
        )


def token_batches(
    vocabulary: int,
    longest: int,
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    first_id: int = 0,
    pad_id: int = 0,
    rows: int = 5,
    seed: int = SEED,
) -> list[dict[str, NDArray[np.int64]]]:
    """Seeded token batches: one row and `rows` of them, of several lengths, the larger ones padded.

    Ids are drawn from first_id to vocabulary - 1; the longest batch has one row of `longest` tokens.
    """
    generator = np.random.default_rng(seed)
    lengths = [min(n, longest) for n in (3, 16, 61)]
    shapes = [(1, lengths[0]), (rows, lengths[1]), (rows, lengths[2]), (1, longest)]
    batches = []
    for count, length in shapes:
        ids = generator.integers(first_id, vocabulary, (count, length))
        ids[ids == pad_id] = (pad_id + 1) % vocabulary
        mask = np.ones_like(ids)
        for row in range(1, count):  # the first one stays whole
            mask[row, int(generator.integers(2, length + 1)) :] = 0
        ids[mask == 0] = pad_id
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        batches.append({name: arrays[name] for name in inputs})
    return batches


def pixel_batches(
    shape: Sequence[int], *, input: str = "pixel_values", rows: int = 5, seed: int = SEED
) -> list[dict[str, NDArray[np.float32]]]:
    """Seeded pictures of one shape, normally distributed: one, then `rows` of them."""
    generator = np.random.default_rng(seed)
    return [{input: generator.standard_normal((count, *shape)).astype(np.float32)} for count in (1, rows)]
