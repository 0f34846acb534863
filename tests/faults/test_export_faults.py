"""Exports that are written: a full disk or a signal at any moment leaves a whole folder or none."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from safeguard.exporters.writing import new_folder
from safeguard.manifest import MANIFEST_NAME
from tests.faults.faults import full_disk, run_script

FILES = ("model.onnx", "tokenizer.json", "deep/heads.npz", MANIFEST_NAME)


def export(out: Path, text: str = "new", *, fail_at: int | None = None, overwrite: bool = False) -> None:
    """What every exporter does in the end: its files into the new folder, the manifest last."""
    with new_folder(out, overwrite=overwrite) as aside:
        for number, name in enumerate(FILES):
            if number == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(text * 100, encoding="utf-8")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text(encoding="utf-8")[:3]
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("write", range(len(FILES)))
def test_disk_that_is_full_at_any_write_leaves_nothing(tmp_path: Path, write: int) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        export(tmp_path / "out", fail_at=write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", range(len(FILES)))
def test_disk_that_is_full_at_any_write_leaves_the_old_export(tmp_path: Path, write: int) -> None:
    export(tmp_path / "out", "old")
    with pytest.raises(OSError, match="No space left on device"):
        export(tmp_path / "out", fail_at=write, overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": "old" for name in FILES}


def test_limit_of_the_system_itself_leaves_nothing(tmp_path: Path) -> None:
    with full_disk(200), pytest.raises(OSError, match="File too large"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.fsync, []

    def keep(handle: int) -> None:
        seen.append((os.fstat(handle).st_ino, (tmp_path / "out").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", keep)
    export(tmp_path / "out")

    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_ino for path in made} == {inode for inode, moved in seen if not moved}
    assert seen[-1] == (tmp_path.stat().st_ino, True)  # then the name


def test_disk_that_fails_when_it_is_told_to_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_EXPORTING = """
import sys
from pathlib import Path
from threading import Event
from safeguard.exporters.writing import new_folder
with new_folder(Path(sys.argv[1]), overwrite=True) as aside:
    (aside / "model.onnx").write_text("new" * 100)
    print("ready", flush=True)
    Event().wait(30)
    (aside / "safeguard.json").write_text("new" * 100)
"""


def test_interrupt_in_the_middle_leaves_the_old_export_alone(tmp_path: Path) -> None:
    export(tmp_path / "out", "old")
    run_script(_EXPORTING, tmp_path / "out", stop=signal.SIGINT)
    assert contents(tmp_path) == {f"out/{name}": "old" for name in FILES}


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_process_that_is_ended_in_the_middle_leaves_the_old_export(
    tmp_path: Path, stop: signal.Signals
) -> None:
    export(tmp_path / "out", "old")
    status, _, _ = run_script(_EXPORTING, tmp_path / "out", stop=stop)

    assert status == -stop
    assert contents(tmp_path / "out") == dict.fromkeys(FILES, "old")
    # an ended process cleans nothing up: what it leaves has a name that nobody takes for an export
    assert all(path.name.startswith(".out.") for path in tmp_path.iterdir() if path.name != "out")
    export(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == dict.fromkeys(FILES, "new")


_REPLACING = """
import sys
from itertools import count
from pathlib import Path
from safeguard.exporters.writing import new_folder
for number in count():
    with new_folder(Path(sys.argv[1]), overwrite=True) as aside:
        for name in ("model.onnx", "safeguard.json"):
            (aside / name).write_text(str(number))
    if number == 3:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_process_that_is_ended_while_it_replaces_leaves_one_whole_export(
    tmp_path: Path, stop: signal.Signals
) -> None:
    run_script(_REPLACING, tmp_path / "out", stop=stop)

    found = [(tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("model.onnx", MANIFEST_NAME)]
    assert found[0] == found[1]
    assert int(found[0]) >= 3
