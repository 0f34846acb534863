"""How cost grows with the batch and with the length of texts, and the memory that each contender takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from safeguard.bench.models import make_text_models
from safeguard.bench.process import OURS, PEERS, Start, Worker, workers
from safeguard.bench.report import Row, Section
from safeguard.bench.settings import Settings
from safeguard.bench.texts import of_length
from safeguard.bench.timing import ContenderFailed, Sample, interleave

BATCHES = (1, 8, 64)
LENGTHS = (16, 64, 256, 512)
_BUDGET_S = 5.0  # of all repeats of one cell of one contender
_FEWEST = 3
_LARGEST = {"text-guard-s": 64 * 512}
_LARGEST_BERT = 4096  # tokens in a call; 64 texts of 512 would take a minute each


@dataclass(frozen=True)
class Cell:
    """So many texts of one length."""

    batch: int
    length: int

    @property
    def workload(self) -> str:
        return f"{self.batch} x {self.length} tokens"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


CELLS = [Cell(batch, length) for batch in BATCHES for length in LENGTHS]


def run_growth(settings: Settings) -> Section:
    """Goal 5: batch 1, 8, 64 by length 16, 64, 256, 512; peak memory of each process after all of it.

    A cell has as many repeats as fit into a few seconds, three at least, and those of calls that would take
    minutes are left out; `runs` says how many there were.
    """
    made = make_text_models(settings.work / "text", tiny=settings.tiny, say=settings.say)
    section = Section("growth", "Growth: time per text with batch and length, peak memory of the process")
    source = {"source": str(made.source)}
    starts = [
        Start("ours int8", OURS, "text_pack", {"pack": str(made.int8)}),
        Start("ours float32", OURS, "text_pack", {"pack": str(made.float32)}),
        Start("text-guard-s", OURS, "text_pack", {"pack": "text-guard-s"}, note="windows of 128 tokens"),
        Start("detoxify", PEERS, "detoxify_path", source, note="its code path"),
    ]
    notes = {start.name: start.note for start in starts}
    with workers(starts, settings.work / "logs" / "growth", say=settings.say) as (running, failed):
        section.failed |= failed
        loaded = {name: worker.peak_mb for name, worker in running.items()}
        for cell in CELLS:
            _measure(section, settings, running, cell, notes)
        for i, row in enumerate(section.rows):
            memory = {"loaded_mb": loaded[row.contender], "peak_mb": running[row.contender].peak_mb}
            section.rows[i] = replace(row, more={**row.more, **memory})
    section.notes += [
        f"repeats of a cell fit into {_BUDGET_S:g} s, {_FEWEST} at least; calls of more than "
        f"{_LARGEST_BERT} tokens are left out for the BERT-base models",
        "text-guard-s reads longer texts in windows of 128 tokens",
    ]
    return section


def _measure(
    section: Section, settings: Settings, running: dict[str, Worker], cell: Cell, notes: dict[str, str]
) -> None:
    """One cell: those contenders that can afford it, interleaved, each with its own number of repeats."""
    able = {
        name: _contender(worker, cell)
        for name, worker in running.items()
        if cell.tokens <= _LARGEST.get(name, _LARGEST_BERT) and name not in section.failed
    }
    repeats = {}
    for name, contender in list(able.items()):
        try:
            contender(-2)
            repeats[name] = repeats_in(_BUDGET_S, contender(-1).seconds, settings.repeats)
        except ContenderFailed as exc:
            section.failed[name] = exc.reason
            del able[name]
    samples: dict[str, list[float]] = {name: [] for name in able}
    for turn in range(max(repeats.values(), default=0)):
        now = {name: able[name] for name in able if turn < repeats[name] and name not in section.failed}
        outcome = interleave(now, 1, warmups=0, seed=settings.seed + turn)
        section.failed |= outcome.failed
        for name in outcome.samples:
            samples[name] += outcome.per_item(name)
    settings.say(f"growth: {cell.workload}")
    for name, seconds in samples.items():
        if seconds:
            more = {"batch": cell.batch, "tokens": cell.length}
            section.rows.append(Row(name, cell.workload, seconds, cell.batch, notes[name], more))


def repeats_in(budget_s: float, seconds: float, most: int) -> int:
    """How many runs of that many seconds fit into a budget: at least 3, at most `most`."""
    return min(most, max(_FEWEST, int(budget_s / max(seconds, 1e-9))))


def _contender(worker: Worker, cell: Cell) -> Callable[[int], Sample]:
    def run(turn: int) -> Sample:
        texts = [of_length(cell.length, seed=turn * 1000 + i) for i in range(cell.batch)]
        return worker({"texts": texts}, cell.batch)

    return run
