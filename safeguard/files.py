"""Files that appear whole or not at all: written beside their place, put on disk, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and else is removed.

    So whoever reads `path` finds the old file or the new one, also after a full disk, a signal or a power
    cut. The temporary name begins with a dot and ends as `path` does. What is there and no plain file (a
    pipe, a device) is handed out itself. A process killed outright may leave the temporary file behind.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    handle, name = tempfile.mkstemp(prefix=".part-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        put_on_disk(part)
        part.replace(path)
        put_on_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, as UTF-8 where it is text, so that it is never half there."""
    with replaced(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def put_on_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in memory."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
