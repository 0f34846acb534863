"""Importing does nothing but define names: no file, process, socket, thread, handler or changed setting."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.test_layers import ROOT, module_level_imports, sources

WATCH = """
import sys, sysconfig
from pathlib import Path
seen = []
events = {"os." + name for name in sys.argv[2].split()}
prefixes = ("socket.", "subprocess.", "shutil.", "tempfile.", "urllib.", "ftplib.", "smtplib.")
library = sysconfig.get_path("stdlib")
packages = sysconfig.get_path("purelib")

def doer():
    # the file that did it: the innermost that is neither the interpreter's nor its library's
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith("<frozen") and (name.startswith(packages) or not name.startswith(library)):
            return name
        frame = frame.f_back
    return ""

def hook(event, args):
    writes = event == "open" and (args[2] or 0) & 3 and "__pycache__" not in str(args[0])
    watched = writes or event.startswith(prefixes) or event in events
    if watched and not doer().startswith(packages):
        seen.append(event)

sys.addaudithook(hook)
"""
"""What installed libraries do is theirs: numpy sets a variable and takes it back."""
CALLS = "system putenv unsetenv fork exec posix_spawn mkdir rename remove rmdir chdir kill"
STATE = """
import json, logging, os, signal, threading, warnings
def state():
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)
    signals = {s.name: repr(signal.getsignal(s)) for s in watched}
    ours = [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "safeguard"]
    return {
        "env": dict(os.environ), "cwd": os.getcwd(), "threads": threading.active_count(), "signals": signals,
        "filters": len(warnings.filters), "path": list(sys.path), "recursion": sys.getrecursionlimit(),
        "root": [repr(h) for h in logging.root.handlers], "level": logging.root.level,
        "handlers": [repr(h) for n in ours for h in logging.getLogger(n).handlers],
        "excepthook": repr(sys.excepthook),
    }
"""


def effects(*modules: str) -> dict[str, Any]:
    """What importing the modules in a fresh process did: `seen` by the audit hook, and settings `changed`."""
    code = f"{WATCH}{STATE}before = state()\nimport {', '.join(modules)}\nafter = state()\n"
    code += "print(json.dumps({'seen': seen, 'changed': [k for k in before if before[k] != after[k]]}))"
    command = [sys.executable, "-c", code, "-", CALLS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _names() -> list[str]:
    """Modules of ours that import no heavy library when they are imported."""
    return [
        ".".join(("safeguard", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for layer, path in sources()
        if layer in LIGHT and path.is_relative_to(ROOT) and path.stem != "__main__"
    ]


LIGHT = {
    *(
        "errors",
        "types",
        "registry",
        "manifest",
        "text",
        "policy_files",
        "policy",
        "packs",
        "images",
        "testing",
    ),
    *("driving", "judging", "flow", "streams", "guards", "schemas", "calibrate", "doctor", "cli"),
}


def test_importing_the_package_has_no_effect() -> None:
    assert effects("safeguard") == {"seen": [], "changed": []}


def test_importing_every_light_module_has_no_effect() -> None:
    names = _names()
    assert len(names) > 30
    found = effects(*names)
    assert found["seen"] == []
    assert set(found["changed"]) <= {"filters"}  # numpy's


def test_light_modules_do_not_import_heavier_ones_of_ours() -> None:
    allowed = LIGHT | {layer for layer, _ in sources()} - {"checks", "refiners", "train", "demo", "exporters"}
    wrong = {
        n for layer, path in sources() if layer in LIGHT - {"cli"} for n in module_level_imports(path)
    } - allowed
    assert wrong == set()


def test_importing_the_model_checks_opens_no_socket_and_writes_no_file() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    found = effects(
        "safeguard.checks.text_classifier", "safeguard.backends.onnx", "safeguard.checks.image_classifier"
    )
    assert found["seen"] == []
    assert set(found["changed"]) <= {"threads", "filters"}  # those of numpy and onnxruntime


@pytest.mark.parametrize(
    "effect",
    [
        "open('x', 'w')",
        "__import__('socket').socket().connect(('127.0.0.1', 9))",
        "__import__('os').environ.update(A='1')",
    ],
)
def test_effects_are_seen(effect: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acting.py").write_text(f"try:\n    {effect}\nexcept OSError:\n    pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert effects("acting")["seen"]
