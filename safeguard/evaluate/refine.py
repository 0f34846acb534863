"""How good prompt refiners are on text: what stays flagged, what is kept, what is changed in vain.

Every contender gets the same prompts and stands in one table, also "none", which changes nothing. Two judges:
the check that a refiner was trained with, which it may have learned to please, and others outside it. Figures
come twice, over all prompts and without those that have a near duplicate in the training data.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from safeguard.evaluate.near_duplicates import nearest
from safeguard.refiners.clean import is_loop, is_refusal
from safeguard.types import RefineRequest

Rewrite = Callable[[Sequence[str]], Sequence[tuple[str, str]]]
"""Prompts to (text, why) for each; why is "" for a rewrite, else what `refiners.clean.read` says."""


class Judge(Protocol):
    """Says which texts are flagged. `safeguard.train.refiner.judges.Risk` is one."""

    @property
    def name(self) -> str: ...
    def flagged(self, texts: Sequence[str], /) -> Sequence[bool]: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a test. reference: a known safe rewrite, None where there is none."""

    text: str = field(repr=False)
    source: str = ""
    harmless: bool = False
    reference: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one set of prompts. Shares are in [0, 1], NaN where there is nothing to count.

    harmless: whether all prompts of the set are; what is flagged in it then was flagged wrongly.
    flagged: judge -> share flagged afterwards. flagged_of_flagged: of those it flagged before. similarity:
    mean to the original, similarity_changed of what was changed only. to_reference: mean to the known
    rewrite. changed_gated: share of all prompts that the first judge flags and the refiner changes, as in
    use, where only flagged prompts are refined. length: words after by words before. refusals, loops, empty:
    of what the contender gave. why: reason -> share of answers that were no rewrite.
    """

    contender: str
    source: str
    subset: str
    harmless: bool
    prompts: int
    flagged: Mapping[str, float]
    flagged_of_flagged: Mapping[str, float]
    similarity: float
    similarity_changed: float
    to_reference: float
    changed: float
    changed_gated: float
    length: float
    refusals: float
    loops: float
    empty: float
    why: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RefineEvaluation:
    """All rows, and the share of each source that has a near duplicate in the training data."""

    rows: tuple[Row, ...]
    near_duplicates: Mapping[str, float]
    judges: tuple[str, ...]
    threshold: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data with None for NaN, ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RefineEvaluation:
        """What `to_dict` gave, with NaN for None."""
        plain = json.loads(json.dumps(data), object_hook=_numbers)
        rows = tuple(Row(**row) for row in plain["rows"])
        return cls(rows, plain["near_duplicates"], tuple(plain["judges"]), plain["threshold"])

    def to_markdown(self) -> str:
        """The table: one line per set, subset and contender."""
        heads = ["set", "subset", "prompts", "refiner"]
        heads += [f"flagged by {name}" for name in self.judges]
        heads += ["similarity", "to reference", "changed", "changed when flagged", "length"]
        heads += ["refusals", "loops", "no rewrite"]
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for row in self.rows:
            cells = [row.source, row.subset, str(row.prompts), row.contender]
            cells += [_cell(row.flagged[name]) for name in self.judges]
            figures = (row.similarity, row.to_reference, row.changed, row.changed_gated, row.length)
            given_up = sum(share for why, share in row.why.items() if why != "keep")
            cells += [_cell(value) for value in (*figures, row.refusals, row.loops, given_up)]
            lines.append(f"| {' | '.join(cells)} |")
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.near_duplicates.items())
        lines += ["", f"Near duplicates in the training data (Jaccard {self.threshold:g} or more): {shares}."]
        return "\n".join(lines)


def evaluate_refiners(
    prompts: Sequence[Prompt],
    contenders: Mapping[str, Rewrite],
    judges: Sequence[Judge],
    similarity: Callable[[Sequence[str], Sequence[str]], Sequence[float]],
    *,
    training: Sequence[str] = (),
    threshold: float = 0.8,
    say: Callable[[str], None] = lambda _: None,
) -> RefineEvaluation:
    """Measures every contender on every source of the prompts.

    judges: the first is the check of training, the others are outside it. training: prompts that the
    contenders were trained on; without any there are no decontaminated rows. say: told each contender as its
    turn comes. Raises ValueError without prompts or judges, and for a contender that gives another number of
    texts.
    """
    if not prompts or not judges or not contenders:
        raise ValueError("evaluate needs at least one prompt, one judge and one contender")
    names = [judge.name for judge in judges]
    if len(set(names)) != len(names):
        raise ValueError(f"judges must have different names, got {', '.join(names)}")
    texts = [prompt.text for prompt in prompts]
    near = [value > 0 for value in nearest(texts, training, threshold=threshold)]
    before = {judge.name: list(judge.flagged(texts)) for judge in judges}
    sets = _subsets(prompts, near if training else None)
    rows: list[Row] = []
    for name, rewrite in contenders.items():
        say(f"{name}: {len(texts)} prompts")
        given = list(rewrite(texts))
        if len(given) != len(texts):
            raise ValueError(f"{name!r} gave {len(given)} texts for {len(texts)} prompts")
        outcome = _Outcome(prompts, given, before, judges, similarity)
        rows += [outcome.row(name, source, subset, at) for (source, subset), at in sets.items()]
    order = {key: i for i, key in enumerate(sets)}
    rows.sort(key=lambda row: order[row.source, row.subset])
    shares = {s: _share([near[i] for i in at]) for (s, subset), at in sets.items() if subset == "all"}
    return RefineEvaluation(tuple(rows), shares, tuple(names), threshold)


class _Outcome:
    """What one contender made of all prompts, judged once."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        given: Sequence[tuple[str, str]],
        before: Mapping[str, Sequence[bool]],
        judges: Sequence[Judge],
        similarity: Callable[[Sequence[str], Sequence[str]], Sequence[float]],
    ) -> None:
        self._texts = [text for text, _ in given]
        self._whys = [why for _, why in given]
        self._prompts, self._before = prompts, before
        self._after = {judge.name: list(judge.flagged(self._texts)) for judge in judges}
        self._first = judges[0].name
        self._changed = [text != p.text for text, p in zip(self._texts, prompts, strict=True)]
        self._similar = similarity([p.text for p in prompts], self._texts)
        known = [i for i, p in enumerate(prompts) if p.reference is not None]
        values = similarity([str(prompts[i].reference) for i in known], [self._texts[i] for i in known])
        self._reference = dict(zip(known, values, strict=True))

    def row(self, name: str, source: str, subset: str, at: Sequence[int]) -> Row:
        """The figures over the prompts in the places `at`."""
        words = [(len(self._prompts[i].text.split()), len(self._texts[i].split())) for i in at]
        gated = [self._changed[i] and self._before[self._first][i] for i in at]
        return Row(
            contender=name,
            source=source,
            subset=subset,
            harmless=all(self._prompts[i].harmless for i in at),
            prompts=len(at),
            flagged={judge: _share([flags[i] for i in at]) for judge, flags in self._after.items()},
            flagged_of_flagged={
                judge: _share([flags[i] for i in at if self._before[judge][i]])
                for judge, flags in self._after.items()
            },
            similarity=_mean([self._similar[i] for i in at]),
            similarity_changed=_mean([self._similar[i] for i in at if self._changed[i]]),
            to_reference=_mean([self._reference[i] for i in at if i in self._reference]),
            changed=_share([self._changed[i] for i in at]),
            changed_gated=_share(gated),
            length=_mean([after / max(1, before) for before, after in words]),
            refusals=_share([self._whys[i] == "refusal" or is_refusal(self._texts[i]) for i in at]),
            loops=_share([self._whys[i] == "loop" or is_loop(self._texts[i]) for i in at]),
            empty=_share([self._whys[i] == "empty" or not self._texts[i].strip() for i in at]),
            why={k: v / len(at) for k, v in sorted(Counter(self._whys[i] for i in at).items()) if k},
        )


def _subsets(prompts: Sequence[Prompt], near: Sequence[bool] | None) -> dict[tuple[str, str], list[int]]:
    """(source, subset) -> places; a decontaminated subset that is empty is left out."""
    sets: dict[tuple[str, str], list[int]] = {}
    for source in dict.fromkeys(prompt.source for prompt in prompts):
        at = [i for i, prompt in enumerate(prompts) if prompt.source == source]
        sets[source, "all"] = at
        clean = [i for i in at if near is not None and not near[i]]
        if clean:
            sets[source, "decontaminated"] = clean
    return sets


def no_refinement(prompts: Sequence[str]) -> list[tuple[str, str]]:
    """The contender that changes nothing."""
    return [(prompt, "") for prompt in prompts]


def from_refiner(refiner: Any) -> Rewrite:
    """A contender out of any refiner; one with `readings` tells why it gave no rewrite.

    What a fall-back would make of an unusable answer is not asked for: the model alone is measured.
    """

    def rewrite(prompts: Sequence[str]) -> list[tuple[str, str]]:
        if hasattr(refiner, "readings"):
            found = refiner.readings(list(prompts))
            return [
                (prompt if reading.why else reading.text, reading.why)
                for prompt, reading in zip(prompts, found, strict=True)
            ]
        return [(text, "") for text in refiner([RefineRequest(prompt) for prompt in prompts])]

    return rewrite


def _numbers(part: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in part.items()}


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
