"""A folder that is there whole or not at all: made aside, moved into place at the end."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safeguard.errors import ExportError
from safeguard.files import put_on_disk
from safeguard.manifest import MANIFEST_NAME

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and is removed otherwise.

    All of it is on the disk before it is moved, so a power cut leaves the old folder or the new one. A
    process killed outright may leave the temporary folder, whose name begins with a dot, behind.
    overwrite: an `out` that is there is replaced at the end, in one step where the system can; only one that
    holds the file `marker` (or nothing), so that no other folder is lost by a slip.
    Raises FileExistsError for an `out` that is there, ExportError for one that is not ours to replace.
    """
    out = Path(os.path.abspath(out.expanduser()))  # noqa: PTH100  # resolve() would follow a link at `out`
    refuse_existing(out, overwrite=overwrite, marker=marker)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield aside
        aside.chmod(0o755)
        _put_all_on_disk(aside)
        refuse_existing(out, overwrite=overwrite, marker=marker)  # somebody may have been faster
        _move(aside, out)
        put_on_disk(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(out: Path, *, overwrite: bool = False, marker: str = MANIFEST_NAME) -> None:
    """Raises what `new_folder` raises, before any work is done."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise FileExistsError(
            17, "is there already; give another folder, or --overwrite to replace it", str(out)
        )
    ours = out.is_dir() and not out.is_symlink() and ((out / marker).is_file() or not any(out.iterdir()))
    if not ours:
        raise ExportError(str(out), f"it is no folder with a {marker}, so it is not replaced")


def _put_all_on_disk(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            put_on_disk(path)
    put_on_disk(folder)


def _move(aside: Path, out: Path) -> None:
    """Puts `aside` at `out`; what was there ends up at `aside`, which is removed afterwards."""
    if not out.exists():
        aside.rename(out)
        return
    if _exchange(aside, out):
        return
    old = aside.with_suffix(".old")
    out.rename(old)
    try:
        aside.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system has no such call."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    return int(call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0
