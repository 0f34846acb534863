"""Many callers at once, threads and async tasks, with the micro-batcher and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safeguard.bench.models import make_text_models
from safeguard.bench.process import OURS, Start, Worker, workers
from safeguard.bench.report import Goal, Row, Section, latencies
from safeguard.bench.settings import Settings
from safeguard.bench.texts import of_length
from safeguard.bench.timing import Sample, interleave, quantile, spread

CALLERS = (1, 8, 64)
WAYS = ("threads", "tasks")
_LENGTHS = (12, 14, 17, 19, 22, 25)  # tokens; short prompts, where most of the callers are
INT8, FLOAT32, GUARD = "ours int8", "ours float32", "text-guard-s"
# calls that each caller makes in one run: 20 repeats of all cells take five minutes on two quiet cores
_EACH = {GUARD: (32, 16, 4), INT8: (8, 4, 1), FLOAT32: (4, 1, 1)}


@dataclass(frozen=True)
class Cell:
    """One model under one kind of load."""

    model: str
    callers: int
    way: str
    batched: bool

    @property
    def workload(self) -> str:
        return f"{self.callers} {self.way}" + (", batched" if self.batched else "")


def run_concurrency(settings: Settings) -> Section:
    """Goal 4: throughput and latency of calls with one short text each, by a number of callers at once."""
    made = make_text_models(settings.work / "text", tiny=settings.tiny, say=settings.say)
    section = Section("concurrency", "Concurrency: one short text a call, 12 to 25 tokens")
    packs = {GUARD: "text-guard-s", INT8: str(made.int8), FLOAT32: str(made.float32)}
    starts = [Start(name, OURS, "concurrent", {"pack": pack}) for name, pack in packs.items()]
    cells = {
        f"{model} {callers} {way} {batched}": Cell(model, callers, way, batched)
        for model in packs
        for callers in CALLERS
        for way in WAYS
        for batched in (False, True)
    }
    with workers(starts, settings.work / "logs" / "concurrency", say=settings.say) as (running, failed):
        section.failed |= failed
        outcome = interleave(
            {key: _contender(running[c.model], c) for key, c in cells.items() if c.model in running},
            settings.repeats,
            seed=settings.seed,
            say=lambda what: settings.say(f"concurrency: {what}"),
        )
    section.failed |= outcome.failed
    for key, samples in outcome.samples.items():
        cell = cells[key]
        more = {
            **latencies([sample.more for sample in samples]),
            "callers": cell.callers,
            "way": cell.way,
            "batched": cell.batched,
            "p99_over_p50": [round(_tail(s.more), 3) for s in samples],
        }
        section.rows.append(
            Row(cell.model, cell.workload, outcome.per_item(key), samples[0].items, more=more)
        )
    _goals(section)
    section.notes.append(
        "calls wait for one another: 64 callers at once on few cores all have long latencies"
    )
    return section


def _goals(section: Section) -> None:
    for model in (GUARD, INT8, FLOAT32):
        for way in WAYS:
            for callers in CALLERS[1:]:
                plain = section.row(model, f"{callers} {way}")
                ours = section.row(model, f"{callers} {way}, batched")
                if plain is None or ours is None:
                    continue
                gain = spread([a / b for a, b in zip(plain.seconds, ours.seconds, strict=True)])
                what = f"{model}, {callers} {way}"
                section.goals.append(Goal(f"{what}: throughput of batched over unbatched", 2, gain))
                tail = spread(ours.more["p99_over_p50"])
                section.goals.append(Goal(f"{what}: p99 over p50, batched", 3, tail, most=True))


def _contender(worker: Worker, cell: Cell) -> Callable[[int], Sample]:
    each = _EACH[cell.model][CALLERS.index(cell.callers)]

    def run(turn: int) -> Sample:
        texts = [of_length(length, seed=turn * 100 + i) for i, length in enumerate(_LENGTHS * 3)]
        load: dict[str, Any] = {
            "texts": texts,
            "callers": cell.callers,
            "each": each,
            "way": cell.way,
            "batched": cell.batched,
        }
        return worker(load, cell.callers * each)

    return run


def _tail(more: Any) -> float:
    return quantile(more["latencies"], 0.99) / quantile(more["latencies"], 0.5)
