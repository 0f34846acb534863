"""Files that are written: a full disk or a signal at any moment leaves the old file or the new one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeguard import Guard, PackError, Policy
from safeguard.calibrate import Calibration, write_calibration
from safeguard.checks.clip_heads import Perceptron, read_heads, write_heads
from safeguard.files import replaced, write_whole
from safeguard.packs import read_pack, resolve, seal
from safeguard.refiners.template import RefinerTemplate
from safeguard.smollm2 import save_atomically
from tests.faults.faults import full_disk, run_script
from tests.tiny_packs import rude_pack

Write = Callable[[Path], Any]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


def calibration() -> Calibration:
    points = {"lenient": 0.9, "standard": 0.5, "strict": 0.1}
    return Calibration("toxic", 1.0, 0.0, points, points, 0.9, 0.1, 0.1, 5, 5)


def head() -> Perceptron:
    return Perceptron("red", np.array([[1.0, 0.0, 0.0]]), np.zeros(1), np.array([8.0]), -4.0)


def seal_again(folder: Path) -> None:
    fields = read_pack(folder).manifest.model_dump(mode="json", exclude={"files"})
    seal(folder, fields | {"notes": "again"})


def write_card(folder: Path) -> None:
    from safeguard.train import text_guard

    text_guard.write_card(folder, {})


def write_safetensors(folder: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    write_heads(folder / "heads.safetensors", [head()])


WRITERS: dict[str, Write] = {
    "seal": seal_again,
    "calibration": lambda folder: write_calibration(folder, [calibration()]),
    "policy.yaml": lambda folder: Policy(name="x" * 100).to_file(folder / "policy.yaml"),
    "policy.json": lambda folder: Policy(name="x" * 100).to_file(folder / "policy.json"),
    "template": lambda folder: RefinerTemplate.default().write(folder / "template.json"),
    "heads.npz": lambda folder: write_heads(folder / "heads.npz", [head()]),
    "heads.safetensors": write_safetensors,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return rude_pack(tmp_path / "pack")


@pytest.mark.parametrize("after", [0, 1, 40, 90])
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_leaves_what_was_there_and_nothing_else(folder: Path, writer: str, after: int) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with full_disk(after), pytest.raises(Exception, match=r"too large|TooLarge|I/O|os error 27"):
        WRITERS[writer](folder)

    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert resolve(folder).manifest.notes == ""


@pytest.mark.parametrize("writer", WRITERS)
def test_writing_works_once_there_is_room_again(folder: Path, writer: str) -> None:
    with full_disk(0), pytest.raises(Exception, match=r"too large|TooLarge|I/O|os error 27"):
        WRITERS[writer](folder)
    WRITERS[writer](folder)

    assert not [name for name in names(folder) if name.startswith(".")]


def test_old_file_survives_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    write_heads(path, [head()])
    with full_disk(100), pytest.raises(OSError, match="too large"):
        write_heads(path, [head()])
    assert read_heads(path)[0].category == "red"
    assert names(tmp_path) == ["heads.npz"]


def test_language_model_copy_that_does_not_fit_is_not_half_there(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed").save_file

    class Saved:
        def save_pretrained(self, folder: Path, **how: Any) -> None:
            save_file({"weight": np.zeros(1000)}, folder / "model.safetensors")

    with full_disk(1000), pytest.raises(OSError, match="SafetensorError while saving"):
        save_atomically(tmp_path / "cache" / "copy", Saved(), Saved())
    assert names(tmp_path) == ["cache"]
    save_atomically(tmp_path / "cache" / "copy", Saved(), Saved())
    assert names(tmp_path / "cache") == ["copy", "model.safetensors"]


def test_block_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replaced(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_written_file_can_be_read_by_others_and_has_no_companion(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "new é")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new é"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["file"]


def test_device_is_written_to_and_not_replaced() -> None:
    write_whole(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()


def test_policy_written_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    Policy(name="mine").to_file(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert Policy.from_file(tmp_path / "real.json").name == "mine"


# --- the command line -------------------------------------------------------------------------

_MAIN = "import sys; from safeguard.cli import main; sys.argv[0] = 'safeguard'; main()"
_LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, -1)); " + _MAIN


def rude_policy(folder: Path) -> Path:
    path = folder.parent / "policy.json"
    path.write_text(json.dumps({"input": {"llm": {"checks": [str(folder)]}}}))
    return path


def test_full_disk_under_an_output_file_is_an_error_and_no_file(folder: Path, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"text": f"good day {n}"}) + "\n" for n in range(5)))
    status, _, errors = run_script(
        _LIMITED, "check", "--input", rows, "--output", out, "--policy", rude_policy(folder)
    )
    assert status == 2
    assert "File too large" in errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_full_disk_under_standard_output_is_an_error(folder: Path) -> None:
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); " + _MAIN
    status, _, errors = run_script(full, "check", "--json", "--policy", rude_policy(folder), "good day")
    assert (status, errors.count("No space left on device")) == (2, 1)
    assert "Traceback" not in errors


def test_full_disk_under_a_calibration_is_an_error_and_leaves_the_pack(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in (("rude", 1), ("good day", 0)))
    )
    status, _, errors = run_script(_LIMITED, "calibrate", folder, rows, "--label", "toxic", "--write")
    assert (status, "File too large" in errors, "Traceback" in errors) == (2, True, False)
    assert resolve(folder).manifest.temperatures == {}
    assert "model.onnx" in names(folder)
    assert len(names(folder)) == 3


# --- signals ----------------------------------------------------------------------------------

_WRITING = """
import sys
from pathlib import Path
from threading import Event
from safeguard.files import replaced
with replaced(Path(sys.argv[1])) as part:
    with part.open("w") as file:
        file.write("half")
        file.flush()
        print("ready", flush=True)
        Event().wait(30)
"""


@pytest.mark.parametrize(
    ("stop", "left"), [(signal.SIGINT, ["file"]), (signal.SIGTERM, None)], ids=["interrupt", "terminate"]
)
def test_signal_while_a_file_is_written_leaves_the_old_one(
    tmp_path: Path, stop: signal.Signals, left: list[str] | None
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    status, _, _ = run_script(_WRITING, path, stop=stop)

    assert status == -stop or status == 130 or status == 1
    assert path.read_text() == "old"
    if left is not None:  # a terminated process cannot clean up; what it leaves has a name that is ignored
        assert names(tmp_path) == left
    else:
        assert [n for n in names(tmp_path) if not n.startswith(".part-")] == ["file"]


_SEALING = """
import sys
from pathlib import Path
from safeguard.packs import read_pack, seal
folder = Path(sys.argv[1])
fields = read_pack(folder).manifest.model_dump(mode="json", exclude={"files"})
for number in range(100_000):
    seal(folder, fields | {"notes": str(number) * 1000})
    if number == 3:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_while_packs_are_sealed_leaves_a_whole_pack(folder: Path, stop: signal.Signals) -> None:
    run_script(_SEALING, folder, stop=stop)

    assert resolve(folder).manifest.name == "rude-words"
    seal_again(folder)  # what a killed process left behind is not taken for a part of the pack
    assert set(resolve(folder).manifest.files) == {"model.onnx", "tokenizer.json"}


def test_pack_without_its_manifest_is_no_pack(folder: Path) -> None:
    (folder / "safeguard.json").unlink()
    with pytest.raises(PackError, match=r"has no safeguard.json"):
        resolve(folder)
    assert Guard(policy=Policy()).stats().total == 0
