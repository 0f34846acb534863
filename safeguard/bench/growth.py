"""How cost grows with the batch and with the length of texts, and the memory that each contender takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from safeguard.bench.models import make_text_models
from safeguard.bench.process import OURS, PEERS, Start, Worker, workers
from safeguard.bench.report import Row, Section
from safeguard.bench.settings import Settings
from safeguard.bench.texts import of_length
from safeguard.bench.timing import ContenderFailed, Sample, interleave

BATCHES = (1, 8, 64)
LENGTHS = (16, 64, 256, 512)
LONGEST_CALL_S = 2.5
"""A contender whose call takes longer is left out of a cell: 20 repeats of it would take a minute."""


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
    """Goal 5: batch 1, 8, 64 by length 16, 64, 256, 512; peak memory of each process up to each cell.

    Every row has all repeats. Cells in which one call of a contender takes longer than LONGEST_CALL_S are
    left out for it, and the notes say which.
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
        section.about = {name: worker.about for name, worker in running.items()}
        grid = Grid(section, settings, running, notes, {n: worker.peak_mb for n, worker in running.items()})
        for cell in sorted(
            CELLS, key=lambda cell: (cell.tokens, cell.batch)
        ):  # so that peaks tell them apart
            settings.say(f"growth: {cell.workload}")
            grid.measure(cell)
    order = [cell.workload for cell in CELLS]
    section.rows.sort(key=lambda row: order.index(row.workload))
    section.notes += [
        "peak: most memory of the process up to that cell, from the fewest tokens in a call to the most",
        "text-guard-s reads longer texts in windows of 128 tokens",
        *grid.left_out(),
    ]
    return section


@dataclass
class Grid:
    """The contenders on their way from the smallest cell to the largest."""

    section: Section
    settings: Settings
    running: Mapping[str, Worker]
    notes: Mapping[str, str]
    loaded_mb: Mapping[str, float | None]
    costs: dict[str, float] = field(default_factory=dict)
    """Seconds for a token, as in the last cell."""
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def measure(self, cell: Cell) -> None:
        """Adds a row for each contender that can afford the cell, all of them interleaved."""
        able = {n: _contender(worker, cell) for n, worker in self.running.items() if self._affords(n, cell)}
        outcome = interleave(able, self.settings.repeats, warmups=0, seed=self.settings.seed)
        self.section.failed |= outcome.failed
        for name in outcome.samples:
            memory = {"loaded_mb": self.loaded_mb[name], "peak_mb": self.running[name].peak_mb}
            more = {"batch": cell.batch, "tokens": cell.length, **memory}
            seconds = outcome.per_item(name)
            self.section.rows.append(
                Row(name, cell.workload, seconds, cell.batch, self.notes[name], more),
            )

    def left_out(self) -> list[str]:
        """One sentence for each contender that was not measured everywhere."""
        return [
            f"{name}, left out since a call takes more than {LONGEST_CALL_S:g} s: {', '.join(cells)}"
            for name, cells in self.skipped.items()
        ]

    def _affords(self, name: str, cell: Cell) -> bool:
        """Whether a call is short enough: as the last cell has it, then as the second of two warm-ups."""
        if name in self.section.failed:
            return False
        seconds = self.costs.get(name, 0.0) * cell.tokens
        if seconds <= 2 * LONGEST_CALL_S:  # more is hopeless, so not even tried
            call = _contender(self.running[name], cell)
            try:
                call(-2)
                seconds = call(-1).seconds
            except ContenderFailed as exc:
                self.section.failed[name] = exc.reason
                return False
            self.costs[name] = seconds / cell.tokens
        if seconds > LONGEST_CALL_S:
            self.skipped.setdefault(name, []).append(cell.workload)
            return False
        return True


def _contender(worker: Worker, cell: Cell) -> Callable[[int], Sample]:
    def run(turn: int) -> Sample:
        texts = [of_length(cell.length, seed=turn * 1000 + i) for i in range(cell.batch)]
        return worker({"texts": texts}, cell.batch)

    return run
