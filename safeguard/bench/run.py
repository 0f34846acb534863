"""A whole benchmark: the sections asked for, then a JSON file, a picture and tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from safeguard.bench.machine import describe_machine
from safeguard.bench.plot import svg
from safeguard.bench.report import Section, document
from safeguard.bench.settings import SECTIONS, Settings

JSON_NAME, PLOT_NAME = "bench.json", "bench.svg"


def run_bench(settings: Settings, sections: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """Measure the sections in turn; a document as `safeguard.bench.report.document` describes it.

    Raises ValueError for an unknown section, MissingExtra for a library that is not there.
    """
    unknown = sorted(set(sections) - set(SECTIONS))
    if unknown:
        raise ValueError(f"no section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    started = time.monotonic()
    machine = describe_machine()
    found = []
    for name in dict.fromkeys(sections):
        module = import_module(f"safeguard.bench.{name}")
        measure: Callable[[Settings], Section] = getattr(module, f"run_{name}")
        found.append(measure(settings))
    return document(
        found,
        machine,
        repeats=settings.repeats,
        tiny=settings.tiny,
        took_s=round(time.monotonic() - started, 1),
    )


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Writes the document and its picture into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    (folder / PLOT_NAME).write_text(svg(found), encoding="utf-8")
