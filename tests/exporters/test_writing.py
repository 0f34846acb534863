from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from safeguard.errors import ExportError
from safeguard.exporters.writing import new_folder
from safeguard.manifest import MANIFEST_NAME


def pack(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return folder


def write(folder: Path, text: str = "new") -> None:
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def test_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as aside:
        write(aside)
        assert not out.exists()
        assert aside.parent == out.parent
    assert (out / MANIFEST_NAME).read_text(encoding="utf-8") == "new"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as aside:
        write(aside)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space left"), KeyboardInterrupt(), ValueError("no")]
)
def test_full_disk_interrupt_or_failure_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as aside:
            write(aside)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    out = pack(tmp_path / "out", "old")
    with (
        pytest.raises(FileExistsError, match="is there already; give another folder, or --overwrite"),
        new_folder(out),
    ):
        pytest.fail("nothing may be written")
    assert (out / MANIFEST_NAME).read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("swap", [True, False])
def test_overwriting_replaces_the_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    out = pack(tmp_path / "out", "old")
    (out / "stale").touch()
    if not swap:  # a system without the call that exchanges two folders
        monkeypatch.setattr(sys, "platform", "other")
    with new_folder(out, overwrite=True) as aside:
        write(aside)
        assert (out / MANIFEST_NAME).read_text(encoding="utf-8") == "old"
    assert [p.name for p in out.iterdir()] == [MANIFEST_NAME]
    assert (out / MANIFEST_NAME).read_text(encoding="utf-8") == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failure_while_overwriting_keeps_the_old_one(tmp_path: Path) -> None:
    out = pack(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="no"), new_folder(out, overwrite=True):
        raise ValueError("no")
    assert (out / MANIFEST_NAME).read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folder_that_is_no_pack_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with (
        pytest.raises(ExportError, match=r"it is no folder with a safeguard\.json, so it is not replaced"),
        new_folder(tmp_path / "photos", overwrite=True),
    ):
        pytest.fail("nothing may be written")
    assert (tmp_path / "photos" / "one.jpg").exists()


def test_link_to_a_pack_is_never_replaced(tmp_path: Path) -> None:
    pack(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(ExportError, match="not replaced"), new_folder(tmp_path / "out", overwrite=True):
        pytest.fail("nothing may be written")


def test_empty_folder_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", overwrite=True) as aside:
        write(aside)
    assert (tmp_path / "out" / MANIFEST_NAME).exists()


def test_one_who_was_faster_wins(tmp_path: Path) -> None:
    def race() -> None:
        with new_folder(tmp_path / "out") as aside:
            write(aside)
            pack(tmp_path / "out", "other")

    with pytest.raises(FileExistsError):
        race()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / MANIFEST_NAME).read_text(encoding="utf-8") == "other"
