"""The order of examples: batches of like length that all hold the same share of prompts that stay."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NOISE = 0.15
"""Share by which a length is varied before sorting, so that an epoch's batches differ from the last one's."""


def batch_order(
    lengths: Sequence[int], kept: Sequence[bool], *, size: int, batches: int, seed: int = 0
) -> list[int]:
    """Numbers of the examples of `batches` batches of `size`, one batch after the other.

    Batches of like length hold little padding. Sorting alone would put the short answers "keep" together, at
    the end of every sorted stretch, and a model learns from its last batches to keep everything; so prompts
    that stay are dealt to all batches alike, and the batches are shuffled. lengths, kept: (example,). Every
    example comes before one comes twice, but for the rest of an epoch that fills no batch.
    Raises ValueError without an example.
    """
    if not lengths or len(lengths) != len(kept):
        raise ValueError(f"a length and a mark per example are needed, got {len(lengths)} and {len(kept)}")
    rng = random.Random(f"{seed}/order")
    order: list[int] = []
    while len(order) < batches * size:
        order += _epoch(lengths, kept, size, rng)
    return order[: batches * size]


def _epoch(lengths: Sequence[int], kept: Sequence[bool], size: int, rng: random.Random) -> list[int]:
    count = max(1, len(lengths) // size)
    noisy = [length * rng.uniform(1 - _NOISE, 1 + _NOISE) for length in lengths]
    groups = [[i for i in range(len(lengths)) if kept[i] == stays] for stays in (False, True)]
    for group in groups:
        rng.shuffle(group)
    stay = round(size * len(groups[1]) / len(lengths))
    made: list[list[int]] = [[] for _ in range(count)]
    for group, share in zip(groups, (size - stay, stay), strict=True):
        if not share:
            continue
        drawn = (group * -(-share * count // len(group)))[: share * count] if group else []
        drawn.sort(key=noisy.__getitem__)
        for n, batch in enumerate(made):
            batch += drawn[n * share : (n + 1) * share]
    rng.shuffle(made)
    return [i for batch in made for i in batch]
