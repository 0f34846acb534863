"""Pictures on the GPU: the CLIP tower through every runtime, then device tensors to scores of all heads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from safeguard.backends.cuda_graphs import GraphBackend, image_inputs
from safeguard.backends.engine_spec import Buckets
from safeguard.backends.torch import ModuleBackend
from safeguard.checks.clip_heads import ClipHeads
from safeguard.exporters import parity
from safeguard.image_tensors import preprocess_on_device
from safeguard.manifest import ImagePreprocess
from tests.bench.gpu_parts.measuring import Bench, Skip, add_rates, interleaved, on_device_ms, say
from tests.bench.gpu_parts.models import clip_heads, vision_tower

PIXELS, EMBEDS = "pixel_values", "image_embeds"


def image_section(bench: Bench) -> dict[str, Any]:
    """Parity, one picture, a batch, and the whole way from a tensor on the device."""
    module, spec, dimension = vision_tower(bench)
    heads = clip_heads(dimension)
    half: Any = "float16" if bench.on_gpu else "float32"
    found: dict[str, Any] = {"model": "CLIP ViT-L/14 and 7 heads", "dimension": dimension}
    makers: dict[str, Callable[[], Any]] = {
        "eager_fp32": lambda: _eager(bench, module, "float32"),
        "eager_fp16": lambda: _eager(bench, module, half),
        "graphs_fp16": lambda: graphs(bench, module, spec, None),
        "compile_reduce_overhead_fp16": lambda: _compiled(bench, module),
        "graphs_inductor_fp16": lambda: graphs(bench, module, spec, _inductor(bench)),
    }
    made = {name: bench.guarded(make) for name, make in makers.items()}
    found["not_run"] = {name: runner for name, runner in made.items() if isinstance(runner, dict)}
    runners = {name: runner for name, runner in made.items() if not isinstance(runner, dict)}
    found["parity"] = bench.guarded(lambda: _agreement(bench, runners, spec))
    for rows in (1, 4 if bench.rehearsal else 64):
        say(f"  pictures, batch {rows}")
        found[f"batch {rows}, tensor on the device"] = _timed(bench, runners, spec, rows)
    say("  device tensor to scores")
    found["device tensor to scores"] = bench.guarded(lambda: whole_way(bench, runners, spec, heads))
    return found


def graphs(bench: Bench, module: Any, spec: ImagePreprocess, compile_with: str | None) -> GraphBackend:
    """Ours: one captured graph a batch size."""
    return GraphBackend(
        copy.deepcopy(module),
        inputs=image_inputs(spec.size),
        outputs=[EMBEDS],
        buckets=Buckets(lengths=(), batches=(1, 2, 4, 8, 16, 32, 64)),
        device=bench.device,
        dtype="float16" if bench.on_gpu else "float32",
        compile_with=compile_with,
        capture=bench.on_gpu,
    )


def _inductor(bench: Bench) -> str:
    return "eager" if bench.rehearsal else "inductor"


def _eager(bench: Bench, module: Any, dtype: Any) -> ModuleBackend:
    return ModuleBackend(
        copy.deepcopy(module), inputs=[PIXELS], outputs=[EMBEDS], device=bench.device, dtype=dtype
    )


def _compiled(bench: Bench, module: Any) -> Any:
    moved = copy.deepcopy(module).to(bench.device, torch.float16 if bench.on_gpu else torch.float32)
    options: dict[str, Any] = {"backend": "eager"} if bench.rehearsal else {"mode": "reduce-overhead"}
    made: Any = torch.compile(moved, dynamic=False, **options)

    def run(inputs: Mapping[str, Any]) -> Any:
        with torch.inference_mode():
            pixels = torch.as_tensor(inputs[PIXELS]).to(bench.device, next(moved.parameters()).dtype)
            return {EMBEDS: made(pixels).float().cpu().numpy()}

    return run


def _agreement(bench: Bench, runners: Mapping[str, Any], spec: ImagePreprocess) -> dict[str, Any]:
    batches = parity.pixel_batches((3, spec.size, spec.size), rows=5)
    found = {}
    for name in ("eager_fp16", "graphs_fp16"):
        if name in runners:

            def compared(name: str = name) -> Any:
                (one,) = parity.compare(
                    runners["eager_fp32"], runners[name], batches, tolerance=parity.FLOAT16
                )
                return one.record().model_dump(mode="json")

            found[name] = bench.guarded(compared)
    return found


def _timed(bench: Bench, runners: Mapping[str, Any], spec: ImagePreprocess, rows: int) -> dict[str, Any]:
    """Wall clock from pixels on the device to embeddings on the host, and the graph alone by CUDA events."""
    pixels = torch.randn(rows, 3, spec.size, spec.size, device=bench.device)
    calls: dict[str, Any] = {}
    left_out: dict[str, Any] = {}
    for name, runner in runners.items():
        if ("inductor" in name or "compile" in name) and not bench.rehearsal:
            try:
                bench.need(75)  # for compiling 24 layers in this shape
            except Skip as exc:
                left_out[name] = {"skipped": str(exc)}
                continue
        calls[name] = partial(runner, {PIXELS: pixels})
    found = add_rates(interleaved(bench, calls), rows, "images_per_s")
    for name, runner in runners.items():
        if isinstance(runner, GraphBackend) and "p50_ms" in found.get(name, {}):
            found[name]["gpu_ms"] = bench.guarded(partial(_graph_ms, bench, runner, rows))
    return found | left_out


def _graph_ms(bench: Bench, runner: GraphBackend, rows: int) -> float | None:
    return on_device_ms(bench, runner.replayer(rows, None), stream=runner.stream)


def whole_way(
    bench: Bench, runners: Mapping[str, Any], spec: ImagePreprocess, heads: list[Any]
) -> dict[str, Any]:
    """A picture (3, height, width) on the device, as a VAE gives it, to a probability a head on the host."""
    sides = (32,) if bench.rehearsal else (512, 1024)
    found: dict[str, Any] = {}
    chosen = {n: r for n, r in runners.items() if n in ("eager_fp16", "graphs_fp16", "graphs_inductor_fp16")}
    for side in sides:
        picture = torch.rand(3, side, side, device=bench.device)
        calls: dict[str, Any] = {}
        for name, runner in chosen.items():
            check = ClipHeads(runner, heads, spec, input=PIXELS, output=EMBEDS)
            calls[f"{name}, the check as it is"] = partial(check, [picture])
            calls[f"{name}, pixels kept on the device"] = partial(_direct, runner, picture, spec, heads)
        calls["preprocessing alone"] = partial(preprocess_on_device, picture, spec)
        found[f"{side} px"] = add_rates(interleaved(bench, calls), 1, "images_per_s")
    return found


def _direct(runner: Any, picture: Any, spec: ImagePreprocess, heads: list[Any]) -> list[Any]:
    """As the check does it, without the way of the pixels over the host."""
    rows = runner({PIXELS: preprocess_on_device(picture, spec)})[EMBEDS].astype(np.float64)
    return [head.probability(head.raw(rows)) for head in heads]
