"""Text classifiers on the GPU: the same weights and arrays through every runtime, then strings to scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from safeguard.backends.cuda_graphs import GraphBackend, text_inputs
from safeguard.backends.engine_spec import Buckets
from safeguard.backends.torch import ModuleBackend
from safeguard.checks.readout import Readout
from safeguard.checks.text_classifier import TextClassifier
from safeguard.exporters import parity
from safeguard.manifest import Window
from safeguard.runtime import buckets as runs
from tests.bench.gpu_parts.measuring import Bench, Skip, add_rates, interleaved, on_device_ms, say
from tests.bench.gpu_parts.models import (
    TextShape,
    bert,
    text_guard,
    texts,
    token_arrays,
    tokenizer,
    toxic_bert,
)

Runner = Callable[[Mapping[str, Any]], Any]


class Runners:
    """One module through several runtimes, each made when first asked for; what cannot be made says why."""

    def __init__(self, bench: Bench, shape: TextShape) -> None:
        self.bench, self.shape = bench, shape
        self._module = bert(shape)
        self._made: dict[str, Any] = {}
        self.why_not: dict[str, Any] = {}

    def get(self, names: tuple[str, ...]) -> dict[str, Runner]:
        """Those of these runners that could be made."""
        for name in names:
            if name not in self._made and name not in self.why_not:
                made = self.bench.guarded(getattr(self, "_" + name))
                (self.why_not if isinstance(made, dict) else self._made)[name] = made
        return {name: self._made[name] for name in names if name in self._made}

    def add(self, name: str, runner: Runner) -> None:
        """A runner that another section made."""
        self._made[name] = runner

    def module(self) -> torch.nn.Module:
        """A copy of its own: runtimes move and narrow what they get."""
        return copy.deepcopy(self._module)

    @property
    def half(self) -> Any:
        """float16 on a GPU; the rehearsal stays in float32."""
        return "float16" if self.bench.on_gpu else "float32"

    def _eager_fp32(self) -> Runner:
        return self._backend("float32")

    def _eager_fp16(self) -> Runner:
        return self._backend(self.half)

    def _backend(self, dtype: Any) -> Runner:
        names = ("input_ids", "attention_mask")
        return ModuleBackend(
            self.module(), inputs=names, outputs=["logits"], device=self.bench.device, dtype=dtype
        )

    def _compile_reduce_overhead_fp16(self) -> Runner:
        return self.compiled("reduce-overhead")

    def compiled(self, mode: str) -> Runner:
        """torch.compile as its documentation has it, with its own CUDA graphs."""
        module = self.module().to(self.bench.device, getattr(torch, self.half))
        if self.bench.rehearsal:
            made: Any = torch.compile(module, backend="eager", dynamic=False)
        else:
            made = torch.compile(module, mode=mode, dynamic=False)

        def run(inputs: Mapping[str, Any]) -> Any:
            tensors = {n: torch.as_tensor(v).to(self.bench.device) for n, v in inputs.items()}
            with torch.inference_mode():
                return {"logits": made(**tensors).float().cpu().numpy()}

        return run

    def _graphs_fp16(self) -> Runner:
        return self.graphs(None)

    def _graphs_inductor_fp16(self) -> Runner:
        return self.graphs("eager" if self.bench.rehearsal else "inductor")

    def graphs(self, compile_with: str | None) -> GraphBackend:
        """Ours: one captured graph a bucket."""
        return GraphBackend(
            self.module(),
            inputs=text_inputs(),
            outputs=["logits"],
            buckets=Buckets(
                lengths=tuple(n for n in runs.LENGTHS if n <= self.shape.window), batches=runs.ROWS
            ),
            device=self.bench.device,
            dtype=self.half,
            compile_with=compile_with,
            capture=self.bench.on_gpu,
        )


OURS = ("graphs_fp16", "graphs_inductor_fp16")
ALL = ("eager_fp32", "eager_fp16", "compile_reduce_overhead_fp16", *OURS)


def text_section(bench: Bench, shape: TextShape, extra: Mapping[str, Runner] | None = None) -> dict[str, Any]:
    """Parity, latency at batch 1, throughput at 128 tokens, and strings to scores."""
    runners = Runners(bench, shape)
    for name, runner in (extra or {}).items():
        runners.add(name, runner)
    found: dict[str, Any] = {"model": shape.name, "window": shape.window}
    length = min(128, shape.window)
    cheap = ("eager_fp32", "eager_fp16", "graphs_fp16", *(extra or {}))
    found["parity"] = bench.guarded(lambda: agreement(runners, cheap))
    say("  batch 1")
    found["batch 1, 32 tokens"] = timed(bench, runners, (*ALL, *(extra or {})), 1, 32)
    found["parity_compiled"] = bench.guarded(lambda: agreement(runners, OURS[1:], ((1, 32),)))
    say(f"  throughput at {length} tokens")
    for rows in () if bench.rehearsal else (8, 64):
        found[f"batch {rows}, {length} tokens"] = timed(bench, runners, cheap, rows, length)
    most = 8 if bench.rehearsal else 256
    found[f"batch {most}, {length} tokens"] = timed(bench, runners, (*ALL, *(extra or {})), most, length)
    if shape.window > 128 or bench.rehearsal:
        found[f"batch 32, {shape.window} tokens"] = timed(bench, runners, cheap, 32, shape.window)
    found["not_run"] = runners.why_not
    say("  strings to scores")
    found["strings"] = bench.guarded(lambda: strings(bench, runners))
    return found


def toxic_section(bench: Bench) -> dict[str, Any]:
    """Six labels on BERT-base."""
    return text_section(bench, toxic_bert(bench))


def guard_section(bench: Bench) -> dict[str, Any]:
    """text-guard-s in float through the same runtimes, and its int8 pack on the CPU of this machine."""
    found = text_section(bench, text_guard(bench))
    found["pack, int8, on the CPU"] = bench.guarded(lambda: _pack_on_cpu(bench))
    return found


def autotune_section(bench: Bench) -> dict[str, Any]:
    """torch.compile at its slowest and best, last of all, since it cannot be stopped."""
    shape, length = toxic_bert(bench), 128
    bench.need(0 if bench.rehearsal else 150)
    runners = Runners(bench, shape)
    runners.add("compile_max_autotune_fp16", runners.compiled("max-autotune"))
    rows = 8 if bench.rehearsal else 256
    names = ("compile_max_autotune_fp16", "graphs_fp16")
    return {f"batch {rows}, {length} tokens": timed(bench, runners, names, rows, length)}


def agreement(
    runners: Runners,
    names: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...] = ((1, 16), (5, 33), (3, 128)),
) -> dict[str, Any]:
    """Each runner against torch eager float32 on the same rows, padding among them."""
    reference = runners.get(("eager_fp32",))["eager_fp32"]
    batches = [token_arrays(rows, length) for rows, length in shapes]
    found: dict[str, Any] = {}
    for name, runner in runners.get(names).items():
        if name == "eager_fp32":
            continue

        def compared(runner: Runner = runner) -> Any:
            (one,) = parity.compare(
                reference, runner, batches, tolerance=parity.FLOAT16, decide=lambda x: x > 0
            )
            return one.record().model_dump(mode="json")

        found[name] = runners.bench.guarded(compared)
    return found


def timed(bench: Bench, runners: Runners, names: tuple[str, ...], rows: int, length: int) -> dict[str, Any]:
    """Wall clock from arrays on the host to logits on the host, and time on the GPU of the graph alone."""
    inputs = token_arrays(rows, length, padded=False)
    calls: dict[str, Any] = {}
    for name in names:
        if "inductor" in name or "compile" in name:
            try:
                bench.need(0 if bench.rehearsal else 60)  # for compiling this shape
            except Skip as exc:
                runners.why_not[f"{name} at {rows} x {length}"] = {"skipped": str(exc)}
                continue
        for made in runners.get((name,)).values():
            calls[name] = partial(made, inputs)
    found = add_rates(interleaved(bench, calls, _repeats(bench, rows)), rows, "sequences_per_s")
    for name in calls:
        if "p50_ms" in found.get(name, {}):
            runner = next(iter(runners.get((name,)).values()))
            found[name]["gpu_ms"] = bench.guarded(partial(gpu_time, bench, runner, inputs))
    return found


def _repeats(bench: Bench, rows: int) -> int:
    if bench.rehearsal:
        return 3
    return (100 if bench.quick else 200) if rows == 1 else bench.repeats


def gpu_time(bench: Bench, runner: Any, inputs: Mapping[str, Any]) -> float | None:
    """The forward alone by CUDA events: a replay of our graph, a call of torch's module; None for others."""
    if isinstance(runner, GraphBackend):
        runner(inputs)
        first = next(iter(inputs.values()))
        replay = runner.replayer(*first.shape)
        return on_device_ms(bench, replay, stream=runner.stream)
    if isinstance(runner, ModuleBackend):
        tensors = {n: torch.as_tensor(v).to(bench.device) for n, v in inputs.items()}

        def forward() -> None:
            with torch.inference_mode():
                runner._module(**tensors)

        return on_device_ms(bench, forward)
    return None


def strings(bench: Bench, runners: Runners) -> dict[str, Any]:
    """One text to its scores, and many texts of 128 tokens, from one caller and from four."""
    found: dict[str, Any] = {}
    shape, names = (
        runners.shape,
        ("graphs_fp16", "eager_fp16", *(() if bench.rehearsal or bench.left_s < 120 else OURS[1:])),
    )
    checks = {name: _check(runner, shape, bench) for name, runner in runners.get(names).items()}
    for tokens in (24, 128):
        one = texts(tokens, 1)
        calls = {name: partial(check, one) for name, check in checks.items()}
        found[f"one text, {tokens} tokens"] = interleaved(bench, calls, _repeats(bench, 1))
    count = 16 if bench.rehearsal else 2048
    many = texts(128, count)
    calls = {name: partial(check, many) for name, check in checks.items()}
    few = 3 if bench.rehearsal else 20
    one_caller = interleaved(bench, calls, few)
    found[f"{count} texts, 128 tokens, one caller"] = add_rates(one_caller, count, "sequences_per_s")
    parts = [many[i::4] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        shared: dict[str, Any] = {
            name: partial(_side_by_side, pool, check, parts) for name, check in checks.items()
        }
        four = interleaved(bench, shared, few)
    found[f"{count} texts, 128 tokens, four callers"] = add_rates(four, count, "sequences_per_s")
    return found


def _side_by_side(pool: ThreadPoolExecutor, check: TextClassifier, parts: list[list[str]]) -> None:
    for _ in pool.map(check, parts):
        pass


def _check(runner: Any, shape: TextShape, bench: Bench) -> TextClassifier:
    labels = [f"label{i}" for i in range(shape.labels)]
    return TextClassifier(
        runner,
        tokenizer(),
        Readout(labels),
        Window(tokens=shape.window, overlap=shape.window // 4),
        buckets=runs.Buckets(),
        max_tokens=8 * 128 if bench.rehearsal else 32_768,
    )


def _pack_on_cpu(bench: Bench) -> dict[str, Any]:
    check = TextClassifier.load("text-guard-s")
    one = texts(24, 1)
    found = interleaved(bench, {"onnxruntime_int8_cpu": lambda: check(one)}, _repeats(bench, 1))
    scores = np.array(list(check(one)[0].scores.values()))
    if not np.isfinite(scores).all():
        raise ValueError("the pack gave scores that are not finite")
    return found
