"""Rewards that look at what a refined prompt draws: POSI's sum, and IPR's improvement over what was there.

Everything is a callable that is handed in: what draws, what says how inappropriate a picture is (Q16), how
close picture and text are (CLIP). Sources: POSI (NAACL 2024) and IPR (EMNLP 2025), their released code.
Quirks of that code are behind arguments named here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from safeguard.train.refiner.rewards import Attempt

Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Sequence[Any]]]
"""(prompts, seeds) -> for each prompt one image per seed."""
Inappropriate = Callable[[Sequence[Any]], Sequence[float]]
"""Images -> Q16's probability of class 1, in [0, 1]."""
Alignment = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
"""Images and as many texts -> cosine of CLIP."""

CLIP_CAP = 0.31  # POSI: beyond a normal CLIP level alignment may not be traded for safety
TOXICITY_WEIGHT = 5.0  # POSI and IPR
KEEP_INCENTIVE = 0.3  # IPR
_SHOWN = 64  # pictures kept at hand: a batch is put together once per step that it is trained on
_POSI_LETTERS = 77  # POSI's code cuts the text at so many characters, where CLIP has so many tokens


class Drawings:
    """Draws `count` images for each attempt, the same seeds for all of a round, other seeds in the next.

    Common random numbers make rewards of a group comparable; drawing new ones each round keeps the policy
    from learning the noises. fixed: POSI's code, whose seed is always the same. Equal prompts are drawn once.
    """

    def __init__(self, draw: Draw, *, count: int = 4, seed: int = 0, fixed: bool = False) -> None:
        if count < 1:
            raise ValueError(f"count must be 1 or more, got {count}")
        self._draw, self._count, self._seed, self._fixed = draw, count, seed, fixed

    def seeds(self, round_: int) -> tuple[int, ...]:
        """The seeds of one round."""
        first = self._seed if self._fixed else self._seed + round_ * self._count
        return tuple(range(first, first + self._count))

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[Any, ...]]:
        """One tuple of images per prompt. Raises ValueError for another number than asked for."""
        different = list(dict.fromkeys(prompts))
        made = [tuple(images) for images in self._draw(different, seeds)] if different else []
        if len(made) != len(different) or any(len(images) != len(seeds) for images in made):
            raise ValueError(f"draw must give {len(seeds)} images for each of {len(different)} prompts")
        found = dict(zip(different, made, strict=True))
        return [found[prompt] for prompt in prompts]

    def __call__(self, attempts: Sequence[Attempt], round_: int) -> list[Attempt]:
        """The attempts with their images; unusable ones get none."""
        seeds = self.seeds(round_)
        drawn = iter(self.images([a.refined for a in attempts if not a.unusable], seeds))
        return [a if a.unusable else replace(a, images=next(drawn), seeds=seeds) for a in attempts]


class PictureReward:
    """5 * (1 - mean Q16) + min(mean CLIP to the original prompt, cap).

    against "refined" is POSI's code: CLIP to the first 77 characters of the refined prompt, which rewards no
    intent at all. cap None is IPR's code.
    """

    name = "pictures"

    def __init__(
        self,
        inappropriate: Inappropriate,
        alignment: Alignment,
        *,
        weight: float = TOXICITY_WEIGHT,
        cap: float | None = CLIP_CAP,
        against: Literal["original", "refined"] = "original",
    ) -> None:
        self._inappropriate, self._alignment = inappropriate, alignment
        self._weight, self._cap, self._against = weight, cap, against

    def __call__(self, attempts: Sequence[Attempt], /) -> list[float]:
        return [self.score(a.images, a.original, a.refined) for a in attempts]

    def score(self, images: Sequence[Any], original: str, refined: str) -> float:
        """Of the images of one prompt. Raises ValueError without any, or for a score out of its range."""
        if not images:
            raise ValueError("a picture reward needs images; draw the attempts first")
        risks = [float(value) for value in self._inappropriate(images)]
        if len(risks) != len(images) or not all(0 <= value <= 1 for value in risks):
            raise ValueError(f"inappropriate must give {len(images)} probabilities, got {len(risks)} values")
        text = original if self._against == "original" else refined[:_POSI_LETTERS]
        close = [float(value) for value in self._alignment(images, [text] * len(images))]
        aligned = sum(close) / len(close)
        aligned = aligned if self._cap is None else min(aligned, self._cap)
        return self._weight * (1 - sum(risks) / len(risks)) + aligned


@dataclass(frozen=True, slots=True)
class State:
    """A prompt whose images the policy may be shown: how they were drawn, and what they were worth.

    score: mean over all of them. first: of the first image alone. number: of the states of an original, from
    0 on, for good.
    """

    prompt: str
    seeds: tuple[int, ...]
    score: float
    first: float
    number: int = 0


class ImageBuffer:
    """For each original prompt the states it has been in: drawn from itself, then from refinements of it.

    Kept in memory; images are drawn again from prompt and seeds when they are wanted, so that a run can go on
    from a checkpoint. most: states of one prompt; the first one, of the original, always stays.
    """

    def __init__(self, *, most: int = 16, seed: int = 0) -> None:
        if most < 1:
            raise ValueError(f"most must be 1 or more, got {most}")
        self._most, self._seed = most, seed
        self._states: dict[str, list[State]] = {}
        self._visits: dict[str, int] = {}
        self._added: dict[str, int] = {}

    def states(self, original: str) -> tuple[State, ...]:
        """All states of a prompt, oldest first; empty for one never seen."""
        return tuple(self._states.get(original, ()))

    def add(self, original: str, state: State) -> None:
        """Another state, with the next number; the oldest but the first goes where there are too many."""
        known = self._states.setdefault(original, [])
        number = self._added.get(original, 0)
        self._added[original] = number + 1
        known.append(replace(state, number=number))
        if len(known) > self._most:
            del known[1 if self._most > 1 else -1]

    def pick(self, original: str) -> State:
        """One of its states, uniformly; what is picked at which visit follows from the seed."""
        state = self.peek(original)
        self.count(original)
        return state

    def peek(self, original: str) -> State:
        """What `pick` would give, without a visit: batches are put together before the last is paid."""
        visit = self._visits.get(original, 0) + 1
        return random.Random(f"{self._seed}/{visit}/{original}").choice(self._states[original])

    def count(self, original: str) -> None:
        """Count a visit."""
        self._visits[original] = self._visits.get(original, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        states = {
            original: [[s.prompt, list(s.seeds), s.score, s.first, s.number] for s in known]
            for original, known in self._states.items()
        }
        return {"states": states, "visits": dict(self._visits)}

    def restore(self, data: Mapping[str, Any]) -> None:
        """Takes over what `to_dict` gave."""
        self._states = {
            original: [
                State(prompt, tuple(seeds), score, first, *(number or [i]))
                for i, (prompt, seeds, score, first, *number) in enumerate(
                    known
                )  # older files have no number
            ]
            for original, known in data["states"].items()
        }
        self._added = {original: known[-1].number + 1 for original, known in self._states.items() if known}
        self._visits = dict(data["visits"])


class Improvement:
    """IPR's reward: what the pictures gain over those of the state the policy was in; a fixed one for "keep".

    The state is the original prompt's own pictures, or with `walk` one from the buffer, to which each group
    adds one of its rewrites: for policies that see the picture. A policy that reads text alone cannot know
    the state, and gets noise from it. baseline "first" is the released code: a single picture stands for the
    state, however many are drawn of the rewrite.
    """

    name = "improvement"

    def __init__(
        self,
        worth: PictureReward,
        drawings: Drawings,
        *,
        buffer: ImageBuffer | None = None,
        walk: bool = False,
        keep_incentive: float = KEEP_INCENTIVE,
        baseline: Literal["all", "first"] = "all",
    ) -> None:
        self._worth, self._drawings, self._walk = worth, drawings, walk
        self.buffer = buffer or ImageBuffer()
        self._keep, self._baseline = keep_incentive, baseline
        self._shown: dict[tuple[str, int], Any] = {}

    def state(self, original: str) -> State:
        """The state that the policy is in, drawn first where the prompt is new. Asks the buffer once."""
        self._begin(original)
        return self.buffer.pick(original) if self._walk else self.buffer.states(original)[0]

    def show(self, original: str) -> tuple[State, Any]:
        """The state that the policy will be in, and the picture to show it: the first one of that state.

        Asked again before the prompt's next group is paid it gives the same.
        """
        self._begin(original)
        state = self.buffer.peek(original) if self._walk else self.buffer.states(original)[0]
        key = (state.prompt, state.seeds[0])
        if key not in self._shown:
            if len(self._shown) >= _SHOWN:
                self._shown.pop(next(iter(self._shown)))
            self._shown[key] = self._drawings.images([state.prompt], state.seeds[:1])[0][0]
        return state, self._shown[key]

    def _begin(self, original: str) -> None:
        if not self.buffer.states(original):
            seeds = self._drawings.seeds(0)
            images = self._drawings.images([original], seeds)[0]
            self.buffer.add(original, self._state(original, original, images, seeds))

    def __call__(self, attempts: Sequence[Attempt], /) -> list[float]:
        """Attempts of one prompt that follow one another are one group."""
        out: list[float] = []
        for original, group in groupby(attempts, key=lambda a: a.original):
            out += self._group(original, list(group))
        return out

    def _group(self, original: str, group: Sequence[Attempt]) -> list[float]:
        state = self._paid_for(original, group[0].state)
        before = state.first if self._baseline == "first" else state.score
        values = [
            self._keep if a.kept else self._worth.score(a.images, original, a.refined) - before for a in group
        ]
        rewrites = [a for a in group if not a.kept and a.images]
        if self._walk and rewrites:
            chosen = random.Random(f"{original}/{len(self.buffer.states(original))}").choice(rewrites)
            self.buffer.add(original, self._state(original, chosen.refined, chosen.images, chosen.seeds))
        return values

    def _paid_for(self, original: str, number: int | None) -> State:
        """The state that a group was shown, by its number; the one that the buffer gives where none was."""
        found = next((s for s in self.buffer.states(original) if s.number == number), None)
        if number is None or found is None:
            return self.state(original)
        self.buffer.count(original)
        return found

    def _state(self, original: str, prompt: str, images: Sequence[Any], seeds: tuple[int, ...]) -> State:
        score = self._worth.score(images, original, prompt)
        return State(prompt, seeds, score, self._worth.score(images[:1], original, prompt))
