"""What `safeguard check` judges: texts, pictures and lines of JSON, read one at a time."""

from __future__ import annotations

import gzip
import json
import os
import select
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safeguard.types import Modality

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
MAX_LINE_BYTES = 64_000_000
"""Longer lines are refused, so that a file without line ends does not fill the memory."""
_CHUNK_BYTES = 65_536
_OR_TEXT = "for a text of that name add --kind text"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to judge. item: a text or the Path of a picture. row: the object of a JSONL line.

    bad: why there is nothing to judge, None for everything that can be tried.
    """

    name: str
    item: Any = None
    row: dict[str, Any] | None = None
    bad: str | None = None


def pictures(arguments: Sequence[str], *, forced: bool) -> tuple[list[Path], int] | None:
    """Files that the arguments name, and how many others in their folders were left out; None for texts.

    An argument is a picture when it is a folder, ends like one, or when forced.
    Raises ValueError for a mixture with texts, missing pictures and folders without any.
    """
    named = [a for a in arguments if forced or _names_pictures(a)]
    if not named:
        return None
    if len(named) < len(arguments):
        raise ValueError(
            f"give texts or pictures, not both ({named[0]} is a picture; --kind says what is meant)"
        )
    found: list[Path] = []
    left_out = 0
    for argument in named:
        path = Path(argument)
        if not path.is_dir():
            if not path.is_file():
                raise FileNotFoundError(
                    2, "no such picture (for a text of that name add --kind text)", argument
                )
            found.append(path)
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file())
        inside = [p for p in files if p.suffix.lower() in PICTURE_SUFFIXES]
        if not inside:
            raise ValueError(
                f"no pictures in the folder {argument} (for a text of that name add --kind text)"
            )
        left_out += len(files) - len(inside)
        found += inside
    return found, left_out


def _names_pictures(argument: str) -> bool:
    try:
        return Path(argument).is_dir() or Path(argument).suffix.lower() in PICTURE_SUFFIXES
    except (OSError, ValueError):  # too long for a file name, or with a zero byte: a text
        return False


class Arriving:
    """Lines from a pipe or terminal; tells whether the next has come in, for its sender may wait for us."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()
        self._ended = False

    def waits(self) -> bool:
        """Whether reading on would have to wait."""
        if self._ended or b"\n" in self._buffer:
            return False
        return not select.select([self._descriptor], [], [], 0)[0]

    def readline(self, limit: int) -> bytes:
        """The next line with its end, or its first `limit` bytes; nothing at the end."""
        end = self._buffer.find(b"\n", 0, limit)
        while end < 0 and len(self._buffer) < limit and not self._ended:
            seen = len(self._buffer)
            chunk = os.read(self._descriptor, _CHUNK_BYTES)
            self._ended = not chunk
            self._buffer += chunk
            end = self._buffer.find(b"\n", seen, limit)
        size = min(limit, len(self._buffer)) if end < 0 else end + 1
        line = bytes(self._buffer[:size])
        del self._buffer[:size]
        return line


def open_stdin() -> Any:
    """Standard input as bytes: `Arriving` where it is a pipe or a terminal that can be asked."""
    try:
        descriptor = sys.stdin.fileno()
        if sys.platform != "win32" and not stat.S_ISREG(
            os.fstat(descriptor).st_mode
        ):  # select knows no pipes there
            return Arriving(descriptor)
    except (OSError, ValueError):  # not a real stream
        return sys.stdin.buffer
    return sys.stdin.buffer


def stdin_texts(file: Any, *, whole: bool) -> Iterator[Entry]:
    """Texts from standard input: one per line, or all of it as one. What is not UTF-8 is bad."""
    if whole:
        yield _text("1", sys.stdin.buffer.read(), "standard input")
        return
    for number, line in _numbered(file):
        if len(line) > MAX_LINE_BYTES:
            yield Entry(str(number), bad=f"line {number} is longer than {MAX_LINE_BYTES} bytes")
        else:
            yield _text(str(number), line.removesuffix(b"\n").removesuffix(b"\r"), f"line {number}")


def _text(name: str, raw: bytes, where: str) -> Entry:
    try:
        return Entry(name, _decoded(raw, where))
    except ValueError as exc:
        return Entry(name, bad=str(exc))


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig" if where in ("line 1", "standard input") else "utf-8")
    except UnicodeDecodeError as exc:
        raise ValueError(f"{where} is not UTF-8 text (byte {exc.start})") from exc


def _numbered(file: Any) -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers from 1; of one that is too long only a beginning that is too long as well."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield number, line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):  # the rest of a refused line
            line = file.readline(MAX_LINE_BYTES + 1)


class Lines:
    """The lines of a JSONL file as entries. `-` is standard input; names ending in .gz are unpacked.

    field: the key of the text, or of the picture's path (relative to the file's folder). size: bytes of the
    file, None where that is unknown; position: how many of them were read.
    """

    def __init__(self, path: str, field: str, kind: Modality) -> None:
        self._field, self._kind = field, kind
        self._folder = Path() if path == "-" else Path(path).parent
        self._raw: IO[bytes] | None = None if path == "-" else Path(path).open("rb")  # noqa: SIM115 - see close
        self.file: Any = open_stdin() if self._raw is None else self._raw
        if path.endswith(".gz"):
            self.file = gzip.GzipFile(fileobj=self._raw)
        self.size = Path(path).stat().st_size if self._raw is not None and Path(path).is_file() else None

    @property
    def position(self) -> int:
        """Bytes of the file read so far; packed ones where it is packed."""
        return 0 if self.size is None or self._raw is None else self._raw.tell()

    def close(self) -> None:
        """Close the file."""
        if self._raw is not None:
            self._raw.close()

    def __iter__(self) -> Iterator[Entry]:
        """One entry per line; a bad one says so. Empty lines at the very end are no lines."""
        empty: list[int] = []
        number = 0
        try:
            for number, line in _numbered(self.file):
                if not line.strip():
                    empty.append(number)
                    continue
                yield from (Entry(f"{n}", bad=f"line {n} is empty") for n in empty)
                empty.clear()
                yield self._entry(number, line)
        except (gzip.BadGzipFile, zlib.error, EOFError) as exc:
            raise ValueError(f"the packed file is damaged after line {number}: {exc}") from exc

    def _entry(self, number: int, line: bytes) -> Entry:
        name = str(number)
        if len(line) > MAX_LINE_BYTES:
            return Entry(name, bad=f"line {number} is longer than {MAX_LINE_BYTES} bytes")
        try:
            row = json.loads(
                _decoded(line, f"line {number}"), parse_constant=_no_constant, parse_float=_finite
            )
        except (ValueError, RecursionError) as exc:
            why = str(exc) if str(exc).startswith("line ") else f"line {number} is not JSON: {exc}"
            return Entry(name, bad=why)
        if not isinstance(row, dict):
            return Entry(name, bad=f"line {number} must hold an object, got {type(row).__name__}")
        if self._field not in row:
            keys = ", ".join(map(repr, list(row)[:10])) or "none"
            return Entry(name, None, row, f"line {number} has no field {self._field!r}; its fields: {keys}")
        value = row[self._field]
        if not isinstance(value, str):
            return Entry(
                name, None, row, f"line {number}: {self._field!r} must be text, got {type(value).__name__}"
            )
        return Entry(name, value if self._kind == "text" else self._folder / value, row)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value


def batches(
    entries: Iterable[Entry], most: int, most_chars: int, *, waits: Callable[[], bool] | None = None
) -> Iterator[list[Entry]]:
    """The entries in lists of at most `most`, with at most `most_chars` characters (or one longer text).

    waits: whether the next entry has not come in yet; then those that have are not held back.
    """
    batch: list[Entry] = []
    chars = 0
    source = iter(entries)
    failure: Exception | None = None
    while True:
        try:
            entry = next(source)
        except StopIteration:
            break
        except (OSError, ValueError) as exc:  # what was read before is judged first, so that nothing is lost
            failure = exc
            break
        size = len(entry.item) if isinstance(entry.item, str) else 0
        if batch and (len(batch) >= most or chars + size > most_chars):
            yield batch
            batch, chars = [], 0
        batch.append(entry)
        chars += size
        if waits is not None and waits():
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
    if failure is not None:
        raise failure
