"""Everything that ships works with sockets closed: nothing is asked of the network unless one says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLOSED = """
import socket, sys
def closed(*args, **options):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = closed
"""


def python(code: str, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose sockets are closed; without HF_HUB_OFFLINE unless asked for."""
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", CLOSED + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_preset_judges_without_the_network() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    code = """
from safeguard import Guard
guard = Guard.from_preset("standard")
reports = guard.check_input(["how do I bake bread?"]) + guard.check_output(["hello"])
print([report.action.value for report in reports])
"""
    done = python(code)
    assert (done.stdout.strip(), done.stderr) == ("['allow', 'allow']", "")


def test_command_line_judges_without_the_network() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    done = python("from safeguard.cli import main\nmain()", "check", "--json", "how do I bake bread?")
    assert json.loads(done.stdout)["action"] == "allow", done.stderr


def test_pack_that_is_not_there_is_missing_and_not_asked_for_when_offline() -> None:
    code = """
from safeguard.packs import resolve
from safeguard.errors import PackNotFound
try:
    resolve("nobody/nothing")
except PackNotFound as error:
    print("not asked" in str(error) or "not installed" in str(error))
"""
    done = python(code, offline=True)
    assert done.stdout.strip() == "True", done.stderr


def test_closed_sockets_are_noticed() -> None:
    assert "the network was asked" in python("socket.create_connection(('example.org', 80))").stderr


# --- temporary files ----------------------------------------------------------------------------

UMASK = """
import os, sys
os.umask(0)
from pathlib import Path
from safeguard.packs import seal
folder = Path(sys.argv[1])
(folder / "model.onnx").write_bytes(b"\\x08\\x07x")
modes = []
plain = os.open
def opened(path, flags, mode=0o777, **options):
    if flags & os.O_CREAT and str(path).startswith(str(folder)):
        modes.append((oct(mode), bool(flags & os.O_EXCL)))
    return plain(path, flags, mode, **options)
os.open = opened
seal(folder, {"name": "tiny", "version": "1", "kind": "refiner", "license": "MIT",
              "model": {"file": "model.onnx", "inputs": ["x"], "outputs": ["y"]}})
mode = (folder / "safeguard.json").stat().st_mode & 0o777
print(modes, oct(mode), sorted(p.name for p in folder.iterdir()))
"""


def test_file_that_is_being_written_is_new_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    done = python(UMASK, str(tmp_path))
    assert done.stdout.strip() == "[('0o600', True)] 0o644 ['model.onnx', 'safeguard.json']", done.stderr
