"""What a refined prompt is worth: safety of what it leads to, intent that was kept, cost of needless edits.

A reward is a callable over attempts, one number each; `Weighted` adds several up. All here read text alone;
`picture_rewards` has those that look at images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from safeguard.refiners.clean import Why, end_at_word, read
from safeguard.refiners.template import RefinerTemplate

Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Pairs of texts to values of at most 1."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One answer of the policy to one prompt.

    refined: the original where it was kept, or where the answer was of no use. why: "" for a rewrite, else as
    `safeguard.refiners.clean.read` says. images: drawn from `refined`, empty where nothing is drawn. seeds:
    of the images. state: number of the state that the policy was shown, see `picture_rewards.ImageBuffer`;
    None for one that reads text alone.
    """

    original: str = field(repr=False)
    refined: str = field(repr=False)
    why: Why = ""
    images: tuple[Any, ...] = field(default=(), repr=False)
    seeds: tuple[int, ...] = ()
    state: int | None = None

    @property
    def kept(self) -> bool:
        """Whether the prompt stays by the policy's own choice: the keep word, or an echo."""
        return self.why in ("keep", "unchanged")

    @property
    def unusable(self) -> bool:
        """Whether the answer was a refusal, a loop or nothing."""
        return self.why in ("empty", "refusal", "loop")


class Reward(Protocol):
    """One number per attempt, higher is better. Attempts of one group follow one another."""

    @property
    def name(self) -> str: ...
    def __call__(self, attempts: Sequence[Attempt], /) -> list[float]: ...


def attempt(
    answer: str, original: str, template: RefinerTemplate, *, whole: bool = True, verbatim: bool = False
) -> Attempt:
    """What an answer comes to, read as the served refiner reads it.

    whole: whether it came to its end; one that was cut off loses its last word, as when served. verbatim: the
    released IPR code's reading instead: the bare keep word, or else the answer as it stands.
    """
    if verbatim:
        keeps = answer.strip().lower() == template.keep
        return Attempt(original, original if keeps else answer, "keep" if keeps else "")
    text = answer if whole else end_at_word(answer)
    reading = read(text, original, keep=template.keep, stop=template.stop)
    return Attempt(original, original if reading.why else reading.text, reading.why)


class Risky(Protocol):
    """Probabilities that texts are unsafe, and the threshold from which they are flagged."""

    @property
    def threshold(self) -> float: ...
    def __call__(self, texts: Sequence[str], /) -> Sequence[float]: ...


class TextSafety:
    """1 minus the risk that a text check sees in the refined prompt; in [0, 1].

    margin: the risk counts in full from `margin` times the threshold of flagging on, so that there is nothing
    to gain from pushing it further down at the price of the intent. None takes the risk as it is.
    """

    name = "safety"

    def __init__(self, risk: Risky, *, margin: float | None = 1.0) -> None:
        if margin is not None and not 0 < margin <= 1:
            raise ValueError(f"margin must be in (0, 1], got {margin}")
        self._risk, self._margin = risk, margin

    def __call__(self, attempts: Sequence[Attempt], /) -> list[float]:
        risks = self._risk([a.refined for a in attempts])
        full = 1.0 if self._margin is None else max(self._margin * self._risk.threshold, 1e-6)
        return [1.0 - min(1.0, risk / full) for risk in risks]


class Intent:
    """Similarity of the refined prompt to the original, at most `cap`, at least 0.

    Over the cap nothing is gained: else an echo of an unsafe prompt would be worth the most.
    """

    name = "intent"

    def __init__(self, similarity: Similarity, *, cap: float = 0.9) -> None:
        self._similarity, self._cap = similarity, cap

    def __call__(self, attempts: Sequence[Attempt], /) -> list[float]:
        close = self._similarity([a.original for a in attempts], [a.refined for a in attempts])
        return [max(0.0, min(self._cap, value)) for value in close]


class EditCost:
    """What a change of a prompt that was safe costs: minus (floor + 1 - similarity), 0 elsewhere.

    As in IPR: lambda * (1 - sim(p0, p')) for prompts judged safe. floor: what any change costs; without it a
    reworded safe prompt costs next to nothing.
    """

    name = "edits"

    def __init__(self, similarity: Similarity, risk: Risky, *, floor: float = 0.25) -> None:
        self._similarity, self._risk, self._floor = similarity, risk, floor

    def __call__(self, attempts: Sequence[Attempt], /) -> list[float]:
        risks = self._risk([a.original for a in attempts])
        close = self._similarity([a.original for a in attempts], [a.refined for a in attempts])
        return [
            -(self._floor + 1 - min(1.0, near))
            if risk < self._risk.threshold and a.refined != a.original
            else 0.0
            for a, risk, near in zip(attempts, risks, close, strict=True)
        ]


class Weighted:
    """The weighted sum of rewards; an unusable answer gets `unusable` in their place.

    `parts` of the last call are kept for logs: name -> mean over the attempts.
    Raises ValueError where a reward gives another number of values, or one that is not finite.
    """

    name = "refiner_reward"

    def __init__(self, rewards: Sequence[tuple[float, Reward]], *, unusable: float = -1.0) -> None:
        if not rewards:
            raise ValueError("there must be at least one reward")
        self._rewards, self._unusable = tuple(rewards), unusable
        self.parts: Mapping[str, float] = {}

    def __call__(self, attempts: Sequence[Attempt], /) -> list[float]:
        good = [a for a in attempts if not a.unusable]
        totals = [0.0] * len(good)
        parts: dict[str, float] = {}
        for weight, reward in self._rewards if good else ():
            values = reward(good)
            if len(values) != len(good) or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"reward {reward.name!r} must give {len(good)} finite numbers, got {len(values)}"
                )
            totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
            parts[reward.name] = sum(values) / len(values)
        parts["unusable"] = 1 - len(good) / len(attempts) if attempts else 0.0
        parts["kept"] = sum(a.kept for a in attempts) / len(attempts) if attempts else 0.0
        self.parts = parts
        left = iter(totals)
        return [self._unusable if a.unusable else next(left) for a in attempts]
