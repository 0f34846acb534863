"""Entries to reports: one guard, asked a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeguard.policy import PRESETS, Policy
from safeguard.types import Action, Modality, Report, Stage, Task

if TYPE_CHECKING:
    from safeguard.cli.sources import Entry
    from safeguard.guards import Guard

TEXTS_AT_ONCE, CHARS_AT_ONCE = 256, 200_000
PICTURES_AT_ONCE = 16


def policy_of(name_or_file: str) -> Policy:
    """The preset of that name, or the policy in that file."""
    return Policy.preset(name_or_file) if name_or_file in PRESETS else Policy.from_file(Path(name_or_file))


def without_refiner(policy: Policy) -> Policy:
    """The policy with no refiner: what it would refine is blocked."""
    return Policy.from_data({**policy.model_dump(mode="json"), "refiner": None})


class Judge:
    """Judges entries of one kind at one stage. Loads its models when made.

    folder: where files that the policy names are looked for. most, most_chars: how much it takes at once.
    Raises ValueError for a policy that judges nothing there.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        kind: Modality,
        stage: Stage,
        task: Task,
        device: str,
        folder: Path | None = None,
    ) -> None:
        from safeguard.guards import Guard

        if kind == "image" and stage == "input":
            raise ValueError("pictures are judged at the stage output")
        surface = task if stage == "input" else kind
        self._guard: Guard = Guard(policy=policy, device=device, folder=folder)
        self._kind, self._stage, self._task = kind, stage, task
        judging = (
            self._guard.route(task, kind).inputs
            if stage == "input"
            else self._guard.output_route(kind).outputs
        )
        if not judging.checks:
            raise ValueError(
                f"policy {policy.name!r} has no checks at {stage}.{surface}: nothing would be judged"
            )
        self.most = min(TEXTS_AT_ONCE if kind == "text" else PICTURES_AT_ONCE, policy.max_items)
        self.most_chars = CHARS_AT_ONCE

    def __call__(self, entries: Sequence[Entry]) -> list[Report | None]:
        """A report per entry, in order; None for a bad one."""
        good = [entry.item for entry in entries if entry.bad is None]
        if self._kind == "image":
            reports = self._pictures(good)
        elif self._stage == "input":
            reports = self._guard.check_input(good, task=self._task)
        else:
            reports = self._guard.check_output(good)
        following = iter(reports)
        return [None if entry.bad is not None else next(following) for entry in entries]

    def _pictures(self, paths: Sequence[Path]) -> list[Report]:
        """Reports on picture files; one that cannot be read is reported as such, with the reason."""
        from safeguard import flow
        from safeguard.driving import drive
        from safeguard.images import open_image
        from safeguard.judging import Piece, image_piece

        opened: list[Any] = []
        pieces: list[Piece] = []
        try:
            for path in paths:
                try:
                    opened.append(open_image(path))
                    pieces.append(image_piece(opened[-1]))
                except (ValueError, OSError) as exc:
                    pieces.append(Piece("output", (), 0, str(exc)))
            route = self._guard.route("llm", "image")
            return self._guard.tell(drive(flow.output_reports(route, pieces)))
        finally:
            for image in opened:
                image.close()


def was_flagged(report: Report) -> bool:
    """Whether the policy acts on the item, or would if it did not only monitor."""
    return report.action is not Action.ALLOW


def was_unjudged(report: Report) -> bool:
    """Whether some check could not judge the item."""
    return any(verdict.error for verdict in report.verdicts)
