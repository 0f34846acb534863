"""What the guard costs: import, a guarded call with trivial checks, and its share of a real guarded answer.

Run from the repository: `python tests/bench/overhead.py [--repeats 21] [--json FILE]`. Runs that are compared
are interleaved; every figure is a median of at least 20. Nothing here asserts: timings are shown, not tested.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROMPT = "Give me three tips for baking bread at home."


def import_times(repeats: int) -> dict[str, float]:
    """Median milliseconds to import each module in a fresh process, interleaved."""
    modules = ("safeguard", "transformers", "torch")
    times: dict[str, list[float]] = {m: [] for m in modules}
    for _ in range(repeats):
        for module in modules:
            code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            times[module].append(float(out.stdout) * 1e3)
    return {m: statistics.median(t) for m, t in times.items()}


class Trivial:
    """A check that costs nothing, so that what is left is the guard."""

    name = "trivial"
    modality = "text"

    def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
        return [{"nothing": 0.0} for _ in batch]


def per_call_us(call: Callable[[], object], number: int = 2000) -> float:
    started = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - started) / number * 1e6


def call_overhead(repeats: int) -> dict[str, float]:
    """Median microseconds of a bare and of a guarded call, one trivial check on either side, interleaved."""
    from safeguard import Guard

    def echo(prompt: str) -> str:
        return prompt

    guarded = Guard(inputs=[Trivial()], outputs=[Trivial()])(echo)
    bare: list[float] = []
    full: list[float] = []
    for _ in range(repeats):
        bare.append(per_call_us(lambda: echo(PROMPT)))
        full.append(per_call_us(lambda: guarded(PROMPT)))
    return {
        "bare_us": statistics.median(bare),
        "guarded_us": statistics.median(full),
        "guard_us": statistics.median(f - b for f, b in zip(full, bare, strict=True)),
    }


def answer_share(repeats: int) -> dict[str, float]:
    """Share of the guard in a guarded answer of 64 tokens by SmolLM2-135M-Instruct, standard preset."""
    import torch

    import safeguard
    from safeguard import smollm2

    model, tokenizer = smollm2.load(dtype=torch.bfloat16)
    model = safeguard.guard(model, tokenizer=tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    whole: list[float] = []
    guard: list[float] = []
    for _ in range(repeats + 1):
        with safeguard.capture() as reports:
            started = time.perf_counter()
            model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)
            whole.append((time.perf_counter() - started) * 1e3)
        guard.append(sum(r.latency_ms for r in reports))
    whole, guard = whole[1:], guard[1:]  # the first is warm-up
    return {
        "answer_ms": statistics.median(whole),
        "guard_ms": statistics.median(guard),
        "share": statistics.median(g / w for g, w in zip(guard, whole, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-answer", action="store_true", help="leave out the language model")
    options = parser.parse_args()
    if options.repeats < 20:
        parser.error("a median needs at least 20 runs")
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "repeats": options.repeats,
        "import_ms": import_times(options.repeats),
        "call": call_overhead(options.repeats),
    }
    if not options.no_answer:
        result["answer_64_tokens"] = answer_share(options.repeats)
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
