"""`import safeguard` is light, and says all it offers."""

from __future__ import annotations

import subprocess
import sys

import safeguard

HEAVY = (
    "torch",
    "transformers",
    "diffusers",
    "onnxruntime",
    "onnx",
    "tokenizers",
    "PIL",
    "numpy",
    "rich",
    "typer",
    "yaml",
)


def test_import_pulls_in_no_heavy_library() -> None:
    code = f"import sys, safeguard; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_import_starts_no_thread_and_no_event_loop() -> None:
    code = "import sys, threading, safeguard; print(threading.active_count(), 'asyncio' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["1", "False"]


def test_every_public_name_is_documented() -> None:
    assert [n for n in safeguard.__all__ if not (getattr(safeguard, n).__doc__ or "").strip()] == []


def test_all_lists_what_is_there() -> None:
    public = {
        name
        for name, value in vars(safeguard).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("safeguard")
    }
    assert set(safeguard.__all__) == public
