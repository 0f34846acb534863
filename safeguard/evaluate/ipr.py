"""Image-level evaluation of Iterative Prompt Refinement: prompts, pictures, rounds, judged from outside.

Works on whatever draws (any text-to-image pipeline), any refiner, any image checks; see
`safeguard.evaluate.ipr_metrics` for what is counted. Prompt by prompt, so that pictures need little memory,
each written down when it is done: an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safeguard.evaluate.ipr_judges import NUDITY_I2P, NUDITY_POSI, Nudity, PictureJudge
from safeguard.evaluate.ipr_loops import Draw, Rounds, Stream, guarded, published
from safeguard.evaluate.ipr_metrics import (
    HANDED_OUT,
    IprRow,
    Record,
    by_category,
    relative_cut,
    rows_of,
    to_markdown,
)
from safeguard.evaluate.ipr_prompts import IprPrompt, Protocol
from safeguard.evaluate.near_duplicates import nearest
from safeguard.files import write_whole
from safeguard.guards import Guard
from safeguard.packs import canonical_digest
from safeguard.types import Refiner

log = logging.getLogger(__name__)

DrawAt = Callable[[float], Draw]
"""Guidance -> what draws with it."""
RESULT, STREAMS, PICTURES, SHEET = "ipr.json", "streams.jsonl", "pictures", "sheet.png"
NO_JOINT_ENCODER = "no joint encoder of pictures and texts was given (--similarity, a CLIP folder)"
NO_NUDITY = "no detector with NudeNet's classes was given (--nudity)"


@dataclass(frozen=True)
class Measures:
    """What looks at pictures and texts. judges: outside the loop, the first one first.

    alignment: (pictures, texts) -> similarity of each pair, of a joint encoder. text_similarity: of pairs of
    texts.
    """

    judges: Sequence[PictureJudge]
    nudity: Nudity | None = None
    alignment: Callable[[Sequence[Any], Sequence[str]], Sequence[float]] | None = None
    text_similarity: Callable[[Sequence[str], Sequence[str]], Sequence[float]] | None = None


@dataclass(frozen=True, slots=True)
class IprEvaluation:
    """All rows, and what they were made of. outside: judge -> whether it had no part in the loop."""

    rows: tuple[IprRow, ...]
    categories: Mapping[str, Mapping[str, float]]
    cut: Mapping[str, float]
    outside: Mapping[str, bool]
    settings: Mapping[str, Any]
    missing: Mapping[str, str]
    records: tuple[Record, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with None for what could not be measured; `missing` says why."""
        plain = [row.to_dict() for row in self.rows]
        cut = {name: None if math.isnan(value) else value for name, value in self.cut.items()}
        return {
            "settings": dict(self.settings),
            "rows": plain,
            "ip_images_by_category": {name: dict(steps) for name, steps in self.categories.items()},
            "relative_cut_of_ip_images": cut,
            "judge_outside_the_loop": dict(self.outside),
            "missing": dict(self.missing),
        }

    def to_markdown(self) -> str:
        """The table, and what it does not tell."""
        lines = [to_markdown(self.rows, list(self.outside)), ""]
        lines += [f"{what}: {why}." for what, why in self.missing.items()]
        inside = [name for name, outside in self.outside.items() if not outside]
        lines += [f"{name} judged its own work: it is the check of the loop." for name in inside]
        return "\n".join(lines)


def evaluate_ipr(
    prompts: Sequence[IprPrompt],
    draw_at: DrawAt,
    protocol: Protocol,
    measures: Measures,
    *,
    guard: Guard | None = None,
    refiner: Refiner | None = None,
    out: Path | None = None,
    sheet: int = 6,
    training: Sequence[str] = (),
    near: float = 0.8,
    seed: int = 0,
    fresh: bool = True,
    inside: bool = False,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> IprEvaluation:
    """Draws, refines and judges every prompt, and counts.

    guard: for the loop "guard", with an image check and a refiner; its max_rounds must be the protocol's.
    refiner: for the loop "published". out: folder for streams.jsonl, pictures of `sheet` prompts, ipr.json.
    training: prompts that the refiner was trained on; those near them are left out in rows of their own.
    fresh: other noise each round. inside: lets the loop's own check judge. facts: what else the settings
    should name. Raises ValueError for a judge that is the check of the loop, and for what is missing.
    """
    loop = _loop(protocol, guard, refiner)
    if not prompts or not measures.judges:
        raise ValueError("evaluate needs at least one prompt and one judge")
    outside = _outside(measures.judges, guard if protocol.loop == "guard" else None, inside=inside)
    settings = _settings(prompts, protocol, measures, seed, fresh) | {
        "near": near if training else None,
        **(facts or {}),
    }
    known = _open(out, settings, resume=resume) if out is not None else {}
    close = [value > 0 for value in nearest([p.text for p in prompts], training, threshold=near)]
    records: list[Record] = []
    for number, prompt in enumerate(prompts):
        record = known.get(number)
        if record is None:
            seeds = _seeds(protocol, prompt, number, seed)
            guidance = prompt.guidance if protocol.own and prompt.guidance else protocol.guidance
            streams = loop(Rounds(draw_at(guidance), seeds, fresh=fresh), prompt.text)
            record = _record(number, prompt, streams, measures, near=close[number])
            if out is not None:
                _write_down(out, record, streams, sheet)
        records.append(record)
        progress(number + 1, len(prompts))
    result = _result(records, measures, outside, settings, seed)
    if out is not None:
        from safeguard.evaluate.ipr_sheet import draw_sheet

        draw_sheet(out / PICTURES, records, measures.judges[0], most=sheet).save(out / SHEET)
        write_whole(out / RESULT, json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    return result


def _settings(
    prompts: Sequence[IprPrompt], protocol: Protocol, measures: Measures, seed: int, fresh: bool
) -> dict[str, Any]:
    return {
        "protocol": asdict(protocol),
        "prompts": {"count": len(prompts), "digest": canonical_digest([asdict(p) for p in prompts])},
        "judges": {j.name: {"threshold": j.threshold, "digest": j.digest} for j in measures.judges},
        "seed": seed,
        "fresh_noise": fresh,
        "measured": {
            "nudity": measures.nudity is not None,
            "similarity": measures.alignment is not None,
            "text_similarity": measures.text_similarity is not None,
        },
    }


def _loop(
    protocol: Protocol, guard: Guard | None, refiner: Refiner | None
) -> Callable[[Rounds, str], list[Stream]]:
    if protocol.loop == "guard":
        if guard is None:
            raise ValueError("the loop 'guard' needs a guard with an image check and a refiner")
        if guard.policy.max_rounds != protocol.rounds:
            raise ValueError(
                f"the guard's max_rounds is {guard.policy.max_rounds}, the protocol's rounds are "
                f"{protocol.rounds}; they must be the same"
            )
        if not guard.route("t2i", "image").outputs.checks:
            raise ValueError("the guard has no image check, so its loop would look at no picture")
        return lambda rounds, text: guarded(guard, rounds, text)
    if refiner is None and protocol.rounds:
        raise ValueError("the loop 'published' needs a refiner")
    return lambda rounds, text: published(refiner or _KEEP, rounds, text, protocol.rounds)


class _Keep:
    """Rewrites nothing: no rounds need no refiner."""

    name = "keep"

    def __call__(self, requests: Sequence[Any], /) -> list[str]:
        return [request.prompt for request in requests]


_KEEP = _Keep()


def _outside(judges: Sequence[PictureJudge], guard: Guard | None, *, inside: bool) -> dict[str, bool]:
    """Judge -> whether it is no check that the loop is steered by. Raises ValueError where one is."""
    names = [judge.name for judge in judges]
    if len(set(names)) != len(names):
        raise ValueError(f"judges must have different names, got {', '.join(names)}")
    if guard is None:
        return dict.fromkeys(names, True)
    surface = guard.route("t2i", "image").outputs
    steering = []
    for check in surface.checks:
        labels = getattr(check, "labels", None)
        steering += [
            PictureJudge(check, label, 0.5)
            for label in (labels if labels is not None else [judge.label for judge in judges])
            if surface.rules.threshold_of(label, {}) is not None
        ]
    found = {judge.name: not any(_same(judge, one) for one in steering) for judge in judges}
    if not inside and not all(found.values()):
        name = next(name for name, outside in found.items() if not outside)
        raise ValueError(
            f"{name} is the check of the loop, so it may not judge it; give another head (--judge)"
        )
    return found


def _same(judge: PictureJudge, steering: PictureJudge) -> bool:
    if judge.same_as(steering):
        return True
    # what wraps a check in a guard keeps its name and label
    return judge.digest is None and judge.name == steering.name


def _seeds(protocol: Protocol, prompt: IprPrompt, number: int, seed: int) -> list[int]:
    first = seed if protocol.seeds == "shared" else seed + number * protocol.images
    if protocol.own and prompt.seed is not None:
        first = prompt.seed
    return [first + k for k in range(protocol.images)]


def _record(
    number: int, prompt: IprPrompt, streams: Sequence[Stream], measures: Measures, *, near: bool
) -> dict[str, Any]:
    """What is written down of one prompt. Each picture is looked at once, however often it is carried on."""
    steps = [[s.bare, *s.images, None if s.action.value == "block" else s.images[-1]] for s in streams]
    images = list({id(i): i for row in steps for i in row if i is not None}.values())
    scores = {j.name: dict(zip(map(id, images), j(images), strict=True)) for j in measures.judges}
    first = measures.judges[0]
    bad = {place for place, score in scores[first.name].items() if score >= first.threshold}
    nude = measures.nudity(images) if measures.nudity is not None else []
    posi = {id(i) for i, n in zip(images, nude, strict=False) if any(n.get(c, 0) > 0 for c in NUDITY_POSI)}
    i2p = {id(i) for i, n in zip(images, nude, strict=False) if any(n.get(c, 0) > 0 for c in NUDITY_I2P)}
    close: dict[int, float] | None = None
    if measures.alignment is not None:
        values = measures.alignment(images, [prompt.text] * len(images)) if images else []
        close = dict(zip(map(id, images), map(float, values), strict=True))
    texts = list(dict.fromkeys(text for s in streams for text in s.texts))
    like: dict[str, float] = {}
    if measures.text_similarity is not None:
        found = measures.text_similarity([prompt.text] * len(texts), texts)
        like = dict(zip(texts, map(float, found), strict=True))
    return {
        "prompt": number,
        "text": prompt.text,
        "category": prompt.category,
        "near": near,
        "flagged_bare": [id(stream.bare) in bad for stream in streams],
        "streams": [
            {
                "texts": s.texts,
                "drawn": s.drawn,
                "action": s.action.value,
                "failed": s.failed,
                "scores": {name: _looked_up(row, table) for name, table in scores.items()},
                "similarity": None if close is None else _looked_up(row, close),
                "text_similarity": [like[text] for text in s.texts] if like else None,
                "posi": [id(i) in bad | posi for i in row] if measures.nudity is not None else None,
                "i2p": [id(i) in bad | i2p for i in row] if measures.nudity is not None else None,
            }
            for s, row in zip(streams, steps, strict=True)
        ],
    }


def _looked_up(row: Sequence[Any], table: Mapping[int, float]) -> list[float | None]:
    return [None if image is None else table[id(image)] for image in row]


def _result(
    records: Sequence[Record],
    measures: Measures,
    outside: Mapping[str, bool],
    settings: Mapping[str, Any],
    seed: int,
) -> IprEvaluation:
    thresholds = {judge.name: judge.threshold for judge in measures.judges}
    rows = rows_of(records, thresholds, seed=seed)
    first = next(iter(thresholds))
    whole = {row.step: row for row in rows if row.subset == "all"}
    last = list(whole)[-2]
    cut = {
        name: relative_cut(whole["bare"].ip_images[first], whole[name].ip_images[first])
        for name in (last, HANDED_OUT)
    }
    missing: dict[str, str] = {}
    if measures.nudity is None:
        missing |= dict.fromkeys(("IP_posi", "IP_i2p"), NO_NUDITY)
    if measures.alignment is None:
        missing["similarity"] = NO_JOINT_ENCODER
    if measures.text_similarity is None:
        missing["text_similarity"] = "no sentence encoder was given (--encoder)"
    categories = by_category(records, first, thresholds[first])
    log.info("ipr evaluated: prompts=%d", len(records))
    return IprEvaluation(tuple(rows), categories, cut, dict(outside), settings, missing, tuple(records))


def _open(out: Path, settings: Mapping[str, Any], *, resume: bool) -> dict[int, Record]:
    """What an interrupted run wrote down. Raises ValueError for one of other settings, or without resume."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / STREAMS
    head = {"settings": canonical_digest(settings)}
    if not path.exists():
        write_whole(path, json.dumps(head) + "\n")
        return {}
    if not resume:
        raise ValueError(f"{out} holds a run already; give a new folder, or --resume to go on with it")
    lines = path.read_text(encoding="utf-8").split("\n")
    if json.loads(lines[0]) != head:
        raise ValueError(f"{out} holds a run with other settings; give a new folder")
    whole = [line for line in lines[1:-1] if line]  # the last line may be half there
    write_whole(path, "\n".join([lines[0], *whole]) + "\n")
    return {row["prompt"]: row for row in map(json.loads, whole)}


def _write_down(out: Path, record: Record, streams: Sequence[Stream], sheet: int) -> None:
    from safeguard.evaluate.ipr_sheet import keep_pictures

    keep_pictures(out / PICTURES, record, streams, most=sheet)
    with (out / STREAMS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
