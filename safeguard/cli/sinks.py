"""Where `safeguard check` puts its reports: a table, lines of JSON, or a file that appears when complete."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from safeguard.cli.judge import was_flagged, was_unjudged
from safeguard.files import put_on_disk
from safeguard.types import Report

if TYPE_CHECKING:
    from safeguard.cli.sources import Entry

_SHOWN_CHARS = 60
_COLOURS = {"allow": "green", "monitor": "yellow", "block": "red", "replace": "red"}  # the rest: cyan


class Sink(Protocol):
    """Takes entries with their reports, in order; None for an entry that is bad."""

    def write(self, entry: Entry, report: Report | None) -> None: ...
    def flush(self) -> None: ...


def to_line(data: Any) -> bytes:
    """One line of strict JSON in UTF-8; text that is no valid Unicode is escaped."""
    try:
        line = json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates
        line = json.dumps(data, allow_nan=False).encode()
    return line + b"\n"


def to_row(entry: Entry, report: Report | None) -> dict[str, Any]:
    """The entry's own object with the report, or with the error, added; for a picture or a text its name."""
    row: dict[str, Any] = dict(entry.row) if entry.row is not None else {}
    if entry.row is None and entry.bad is None:
        row["path" if isinstance(entry.item, Path) else "index"] = (
            str(entry.item) if isinstance(entry.item, Path) else int(entry.name)
        )
    if report is None:
        return {**row, "error": entry.bad}
    return {**row, "report": report.to_dict()}


class JsonLines:
    """One report a line on standard output."""

    def write(self, entry: Entry, report: Report | None) -> None:
        """Write a report, or the error of a bad entry."""
        sys.stdout.buffer.write(to_line({"error": entry.bad} if report is None else report.to_dict()))

    def flush(self) -> None:
        """Hand on what was written."""
        sys.stdout.buffer.flush()


class RowFile:
    """A JSONL file of rows with their reports, packed when its name ends in .gz; `-` is standard output.

    Written as NAME.part beside it and renamed by `finish`, so that NAME is never half a file; the part stays
    without `finish`. What is no plain file (a pipe, a device) is written directly.
    """

    def __init__(self, name: str) -> None:
        self.path = Path(os.path.realpath(name)) if name != "-" else None
        self.part: Path | None = None
        if self.path is None:
            self._raw: IO[bytes] = sys.stdout.buffer
        elif self.path.exists() and not self.path.is_file():
            self._raw = self.path.open("wb")
        else:
            self.part = self.path.with_name(self.path.name + ".part")
            self._raw = self.part.open("wb")
        self._file: Any = gzip.GzipFile("", "wb", fileobj=self._raw) if name.endswith(".gz") else self._raw

    def write(self, entry: Entry, report: Report | None) -> None:
        """Write one row."""
        self._file.write(to_line(to_row(entry, report)))

    def flush(self) -> None:
        """Hand on what was written."""
        self._file.flush()

    def close(self) -> None:
        """Close the file, complete or not."""
        if self._file is not self._raw:
            self._file.close()
        if self.path is not None:
            self._raw.close()
        else:
            self._raw.flush()

    def finish(self) -> None:
        """Close the file and give it its name."""
        if self.part is not None:
            self._file.flush()
        self.close()
        if self.part is not None and self.path is not None:
            put_on_disk(self.part)
            self.part.replace(self.path)
            put_on_disk(self.path.parent)


class Table:
    """A line per entry for people, with nothing of the content unless asked for."""

    def __init__(self, *, show_text: bool, name: str = "#", width: int = 5) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        self._show_text = show_text
        self._heading = name
        self._width = width
        self._begun = False

    def write(self, entry: Entry, report: Report | None) -> None:
        """Print a line, and the heading before the first."""
        from rich.text import Text

        if not self._begun:
            self._begun = True
            heading = f"{self._heading:>{self._width}}  {'action':<10}  {'risk':>5}  {'ms':>8}  categories"
            self._console.print(Text(heading, "bold"))
        name = f"{_printable(entry.name):>{self._width}}  "
        if report is None:
            self._console.print(Text(name), Text("error       ", "red"), Text(entry.bad or ""), sep="")
            return
        action = report.action.value
        numbers = f"  {report.risk:5.2f}  {report.latency_ms:8.1f}  "
        self._console.print(
            Text(name),
            Text(f"{action:<10}", _COLOURS.get(action, "cyan")),
            Text(numbers + _why(report)),
            sep="",
        )
        if self._show_text:
            self._show("text", entry.item)
            self._show("revised", report.revised_prompt)

    def flush(self) -> None:
        """Nothing is held back."""

    def _show(self, what: str, text: Any) -> None:
        from rich.text import Text

        if isinstance(text, str):
            shown = _printable(text)
            cut = shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 3] + "..."
            self._console.print(Text(f"{'':{self._width}}  {what}: {cut}", "dim"))


class Tally:
    """Counts what became of the entries."""

    def __init__(self) -> None:
        self.clean = self.flagged = self.errors = 0

    def write(self, entry: Entry, report: Report | None) -> None:
        """Count one entry; an error counts as nothing else."""
        if report is None or was_unjudged(report):
            self.errors += 1
        elif was_flagged(report):
            self.flagged += 1
        else:
            self.clean += 1

    def flush(self) -> None:
        """Nothing is held back."""

    def __str__(self) -> str:
        total = self.clean + self.flagged + self.errors
        return f"{total} judged: {self.clean} clean, {self.flagged} flagged, {self.errors} with errors"


def _why(report: Report) -> str:
    """Flagged categories of all rounds, and what could not be judged."""
    flagged = dict.fromkeys(c for v in report.verdicts for c in v.flagged)
    errors = dict.fromkeys(f"{v.check}: {v.error}" for v in report.verdicts if v.error)
    return _printable(", ".join(flagged) + ("; " if flagged and errors else "") + "; ".join(errors)) or "-"


def _printable(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
