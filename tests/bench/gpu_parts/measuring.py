"""How the GPU bench times things, and how one part of it cannot take the others along."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]


class Skip(Exception):
    """Raised by a section that has nothing to measure here; says why."""


@dataclass
class Bench:
    """What all sections share: sizes, the clock, and the results, written after each of them."""

    out: Path
    device: str
    rehearsal: bool
    quick: bool
    budget_s: float
    began: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def repeats(self) -> int:
        return 3 if self.rehearsal else 20 if self.quick else 40

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.began)

    def need(self, seconds: float) -> None:
        """Raises Skip where less time than that is left."""
        if self.left_s < seconds:
            raise Skip(f"no time left: it takes about {seconds:g} s, {self.left_s:.0f} s are left")

    def section(self, name: str, work: Callable[[Bench], Any]) -> None:
        """Runs a section; what goes wrong in it is its result."""
        started = time.monotonic()
        print(f"[{started - self.began:6.1f} s] {name}", flush=True)  # noqa: T201
        found = self.guarded(lambda: work(self))
        if isinstance(found, dict):
            found["seconds"] = round(time.monotonic() - started, 2)
        self.results[name] = found
        self.write()

    def guarded(self, work: Callable[[], Any]) -> Any:
        """What the work gives, or {"skipped": why}, or {"failed": what happened}."""
        try:
            return work()
        except Skip as exc:
            return {"skipped": str(exc)}
        except Exception as exc:  # each runtime has errors of its own, and none may end the run
            name = type(exc).__name__
            kind = "skipped" if name in ("MissingExtra", "ImportError", "ModuleNotFoundError") else "failed"
            tail = traceback.format_exc().splitlines()[-6:]
            return {kind: f"{name}: {exc}"[:800], "where": tail}

    def write(self) -> None:
        """The results so far, as one file that is whole at every moment."""
        part = self.out.with_name(self.out.name + ".part")
        part.write_text(json.dumps(self.results, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(part, self.out)  # noqa: PTH105


def synchronise(bench: Bench) -> None:
    """Waits for the GPU."""
    if bench.on_gpu:
        import torch

        torch.cuda.synchronize()


def interleaved(bench: Bench, calls: Mapping[str, Call], repeats: int | None = None) -> dict[str, Any]:
    """Wall clock of each call in turn, so that all see the same machine; each must end with its result.

    A call that fails is left out from then on and says why.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, Any] = {}
    for name, call in calls.items():
        found = bench.guarded(partial(_warm, call))
        if isinstance(found, dict):
            failed[name] = found
    for _ in range(repeats or bench.repeats):
        for name, call in calls.items():
            if name in failed:
                continue
            synchronise(bench)
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: failed.get(name) or summary(values) for name, values in times.items()}


def _warm(call: Call) -> None:
    for _ in range(3):
        call()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and least, in milliseconds."""
    values = np.array(seconds) * 1e3
    return {
        "p50_ms": round(float(np.median(values)), 4),
        "p99_ms": round(float(np.quantile(values, 0.99)), 4),
        "least_ms": round(float(values.min()), 4),
        "repeats": len(seconds),
    }


def on_device_ms(bench: Bench, call: Call, *, stream: Any = None, inner: int = 10) -> float | None:
    """Milliseconds of one call on the GPU by CUDA events, the median over runs of `inner`; None on a CPU.

    call: enqueues work on `stream` (the current one by default) and does not wait for it.
    """
    if not bench.on_gpu:
        call()
        return None
    import torch

    found = []
    with torch.cuda.stream(stream or torch.cuda.current_stream()):
        for _ in range(3):
            call()
        for _ in range(bench.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / inner)
    return round(float(np.median(found)), 4)


def add_rates(found: dict[str, Any], items: int, unit: str) -> dict[str, Any]:
    """The same with items a second, at the median."""
    for value in found.values():
        if isinstance(value, dict) and "p50_ms" in value:
            value[unit] = round(items / value["p50_ms"] * 1e3, 1)
    return found


def table(results: Mapping[str, Any]) -> str:
    """All times, skips and failures as text."""
    lines: list[str] = []

    def walk(path: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            return
        if "p50_ms" in value:
            rate = next((f"  {value[k]:>12,.0f} {k}" for k in value if k.endswith("_per_s")), "")
            gpu = f"  on GPU {value['gpu_ms']:.3f} ms" if value.get("gpu_ms") else ""
            lines.append(
                f"{path:<64} p50 {value['p50_ms']:>9.3f} ms  p99 {value['p99_ms']:>9.3f} ms{gpu}{rate}"
            )
            return
        if "max_abs" in value:
            lines.append(
                f"{path:<64} off by {value['max_abs']:.2g} of {value['scale']:.3g}, "
                f"{value['flips']} of {value['decisions']} decisions differ"
            )
            return
        for key, number in value.items():
            if key.endswith("_per_s") and isinstance(number, int | float):
                lines.append(f"{path + '/' + key:<64} {number:>10,.1f}")
        for word in ("skipped", "failed"):
            if word in value:
                lines.append(f"{path:<64} {word}: {str(value[word])[:90]}")
        for key, inner in value.items():
            walk(f"{path}/{key}" if path else str(key), inner)

    walk("", results)
    return "\n".join(lines)


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
