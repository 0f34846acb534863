"""What a guarded stream costs: time of each look with text-guard-s, their number, and what is held back.

Run: python tests/bench/streaming.py [pack]. Streams English text a token's length at a time through the
rules of preset standard, at three lengths, RUNS times; prints machine, medians and 95th percentiles in ms,
characters scored per character streamed (linear work: the same at each length), and the largest hold-back.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from safeguard import Guard, Policy
from safeguard.checks.text_classifier import TextClassifier
from safeguard.driving import drive
from safeguard.held_text import HeldText
from safeguard.types import Finding, Modality

RUNS = 20
LENGTHS = (1000, 2000, 4000)
TOKEN = 4  # characters
TEXT = (
    "The bakery at the corner opens at seven, and the bread is still warm when the first people come in. "
    "Later in the day the garden wants water, since the summer was dry and the roses hang their heads. "
    "In the evening the family sits at the long table, and somebody reads from the paper what was new. "
)


class Timed:
    """A check that keeps the time and the characters of each of its calls."""

    modality: Modality = "text"

    def __init__(self, check: TextClassifier) -> None:
        self.name, self._check = check.name, check
        self.operating_points = check.operating_points
        self.calls: list[tuple[float, int]] = []

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        start = time.perf_counter()
        found = self._check(batch)
        self.calls.append((time.perf_counter() - start, sum(map(len, batch))))
        return found


def policy() -> Policy:
    """Preset standard without checks of its own."""
    preset = Policy.preset("standard")
    rules = preset.output.text.model_copy(update={"checks": ()})
    return preset.model_copy(
        update={"output": preset.output.model_copy(update={"text": rules}), "check_timeout_s": None}
    )


def stream(check: Timed, length: int) -> dict[str, Any]:
    """Figures of one stream of this many characters; the last call is that on the whole text."""
    check.calls.clear()
    text = HeldText(Guard(outputs=[check], policy=policy()).output_route("text"))
    whole = (TEXT * (length // len(TEXT) + 1))[:length]
    held = out = 0
    for i in range(0, length, TOKEN):
        out += len(drive(text.feed(whole[i : i + TOKEN])))
        held = max(held, min(i + TOKEN, length) - out)
    drive(text.finish())
    if text.stopped:
        raise RuntimeError("the text was flagged; take another")
    *looks, last = check.calls
    return {
        "looks": [seconds * 1000 for seconds, _ in looks],
        "whole_ms": last[0] * 1000,
        "scored": sum(size for _, size in check.calls) / length,
        "held_chars": held,
    }


def main(pack: str) -> dict[str, Any]:
    """All figures, for printing."""
    check = Timed(TextClassifier.load(pack))
    stream(check, LENGTHS[0])  # warms up
    rows = {}
    for length in LENGTHS:
        runs = [stream(check, length) for _ in range(RUNS)]
        looks = sorted(ms for run in runs for ms in run["looks"])
        rows[length] = {
            "looks": len(runs[0]["looks"]),
            "look_ms_median": round(statistics.median(looks), 2),
            "look_ms_p95": round(looks[int(len(looks) * 0.95)], 2),
            "whole_ms_median": round(statistics.median(run["whole_ms"] for run in runs), 1),
            "scored_per_character": round(runs[0]["scored"], 2),
            "held_chars": runs[0]["held_chars"],
        }
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "runs": RUNS,
        "pack": pack,
        "streams": rows,
    }


if __name__ == "__main__":
    figures = main(sys.argv[1] if len(sys.argv) > 1 else "text-guard-s")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
