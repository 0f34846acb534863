"""One CLIP tower with all heads, beside diffusers' safety checker and a separate pass for Q16."""

from __future__ import annotations

from collections.abc import Callable

from safeguard.bench.models import make_image_models
from safeguard.bench.process import OURS, PEERS, Start, Worker, workers
from safeguard.bench.report import Row, Section
from safeguard.bench.settings import Settings
from safeguard.bench.timing import Sample, interleave

INT8, FLOAT32 = "ours int8", "ours float32"
BOTH, CHECKER = "safety checker + Q16", "safety checker"
_COUNTS = {"ViT-L/14": (1,)}
"""Pictures in a call; four of the largest tower would take a quarter of an hour."""


def run_image(settings: Settings) -> Section:
    """Goal 3: pictures of 512 x 512, preprocessing included, four in a call (not of ViT-L/14) and one."""
    tower = "tiny" if settings.tiny else settings.tower
    folder = settings.work / f"image-{tower.replace('/', '')}"
    made = make_image_models(folder, tower, say=settings.say)
    section = Section("image", f"Pictures of 512 x 512: a {tower} tower, random weights, the same for all")
    source = {"source": str(made.source)}
    starts = [
        Start(INT8, OURS, "clip_pack", {"pack": str(made.int8)}, note="one tower, three heads, onnxruntime"),
        Start(
            FLOAT32,
            OURS,
            "clip_pack",
            {"pack": str(made.float32)},
            note="one tower, three heads, onnxruntime",
        ),
        Start(
            BOTH, PEERS, "safety_checker", {**source, "q16": True}, note="diffusers' own, and a second tower"
        ),
        Start(CHECKER, PEERS, "safety_checker", {**source, "q16": False}, note="diffusers' own, alone"),
    ]
    counts = _COUNTS.get(tower, (4, 1))
    notes = {start.name: start.note for start in starts}
    with workers(starts, settings.work / "logs" / "image", say=settings.say) as (running, failed):
        section.failed |= failed
        section.about = {name: worker.about for name, worker in running.items()}
        for count in counts:
            outcome = interleave(
                {name: _contender(worker, count) for name, worker in running.items()},
                settings.repeats,
                seed=settings.seed,
                say=lambda what, count=count: settings.say(f"{count} pictures: {what}"),  # type: ignore[misc]
            )
            section.failed |= outcome.failed
            for name in outcome.samples:
                more = {"peak_mb": running[name].peak_mb}
                section.rows.append(
                    Row(name, _workload(count), outcome.per_item(name), count, notes[name], more)
                )
    section.notes.append("weights are random: they cost what trained ones do, scores mean nothing")
    for count in counts:
        for ours in (INT8, FLOAT32):
            what = f"{ours} against {BOTH}, {_workload(count)}"
            section.goal(what, 2, [BOTH], ours, _workload(count))
    return section


def _workload(count: int) -> str:
    return "one picture" if count == 1 else f"{count} pictures"


def _contender(worker: Worker, count: int) -> Callable[[int], Sample]:
    """Other pictures in every repeat; their seeds count from 0, which is the warm-up's, turn -1."""
    return lambda turn: worker({"pictures": [(turn + 1) * count + i for i in range(count)]}, count)
