"""Exports of the same models, and onnxruntime and TensorRT on them, where this machine has them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safeguard.backends import open_backend
from safeguard.exporters import parity
from safeguard.packs import seal
from tests.bench.gpu_parts.measuring import Bench, Skip, say
from tests.bench.gpu_parts.models import (
    TextShape,
    bert,
    text_guard,
    token_arrays,
    toxic_bert,
    vision_tower,
)

INPUTS = ("input_ids", "attention_mask")


def export_section(bench: Bench, work: Path) -> dict[str, Any]:
    """Float16 graphs in both flavours, compared with torch by onnxruntime on the CPU where it is there."""
    found: dict[str, Any] = {}
    models = {"toxic": toxic_bert(bench)} | ({} if bench.rehearsal else {"guard": text_guard(bench)})
    for name, shape in models.items():
        flavours = ("decomposed", "native") if name == "toxic" else ("decomposed",)
        for flavour in flavours:
            say(f"  exporting {shape.name}, {flavour}")
            folder = work / f"{name}-{flavour}"
            found[folder.name] = bench.guarded(partial(_export_text, bench, shape, folder, flavour))
    say("  exporting the tower")
    found["tower-decomposed"] = bench.guarded(lambda: _export_tower(bench, work / "tower-decomposed"))
    return found


def _export_text(bench: Bench, shape: TextShape, folder: Path, flavour: Any) -> dict[str, Any]:
    from safeguard.exporters.graph import export_graph

    bench.need(0 if bench.rehearsal else 45)
    started = time.perf_counter()
    folder.mkdir()
    module = _Half(bert(shape)) if bench.on_gpu else bert(shape)
    tokens = token_arrays(3, 16)
    axes = {0: "batch", 1: "token"}
    export_graph(
        module.to(bench.device),
        folder / "model.onnx",
        inputs={name: torch.as_tensor(tokens[name]).to(bench.device) for name in INPUTS},
        outputs=["logits"],
        dynamic={name: axes for name in INPUTS},
        flavour=flavour,
    )
    _write_pack(folder, shape)
    found: dict[str, Any] = {"export_s": round(time.perf_counter() - started, 1)}
    found["parity"] = bench.guarded(lambda: _compare(bench, shape, folder))
    return found


def _write_pack(folder: Path, shape: TextShape) -> None:
    from tests.bench.gpu_parts.models import tokenizer

    tokenizer().save(str(folder / "tokenizer.json"))
    seal(
        folder,
        {
            "name": folder.name,
            "version": "1",
            "kind": "text_classifier",
            "model": {"file": "model.onnx", "inputs": list(INPUTS), "outputs": ["logits"]},
            "labels": [f"label{i}" for i in range(shape.labels)],
            "window": {"tokens": shape.window, "overlap": 0},
            "precision": "float16",
            "license": "none",
        },
    )


def _compare(bench: Bench, shape: TextShape, folder: Path) -> dict[str, Any]:
    from safeguard.backends.torch import ModuleBackend
    from safeguard.exporters.graph import beside

    path = folder / "model.onnx"
    candidate = open_backend(path, inputs=INPUTS, outputs=["logits"], external=beside(path))
    reference = ModuleBackend(bert(shape), inputs=INPUTS, outputs=["logits"], device=bench.device)
    batches = [token_arrays(rows, length) for rows, length in ((1, 16), (5, 33))]
    (one,) = parity.compare(reference, candidate, batches, tolerance=parity.FLOAT16, decide=lambda x: x > 0)
    return one.record().model_dump(mode="json")


def _export_tower(bench: Bench, folder: Path) -> dict[str, Any]:
    from safeguard.exporters.graph import export_graph

    bench.need(0 if bench.rehearsal else 90)
    started = time.perf_counter()
    folder.mkdir()
    module, spec, _ = vision_tower(bench)
    made = _HalfTower(module) if bench.on_gpu else module
    export_graph(
        made.to(bench.device),
        folder / "model.onnx",
        inputs={"pixel_values": torch.rand(3, 3, spec.size, spec.size, device=bench.device)},
        outputs=["image_embeds"],
        dynamic={"pixel_values": {0: "batch"}},
        flavour="decomposed",
    )
    return {"export_s": round(time.perf_counter() - started, 1)}


class _Half(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """float16 inside, float32 logits."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module.half()

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.module(input_ids, attention_mask).float()


class _HalfTower(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """float16 inside, float32 pixels and embeddings."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module.half()

    def forward(self, pixel_values: Any) -> Any:
        return self.module(pixel_values.half()).float()


def onnxruntime_runner(bench: Bench, work: Path) -> dict[str, Any]:
    """onnxruntime on CUDA with IO binding, on the native graph of toxic-bert's shape."""
    path = work / "toxic-native" / "model.onnx"
    if not path.is_file():
        raise Skip("the graph was not exported")
    return {"onnxruntime_fp16": _opened(path, "cuda" if bench.on_gpu else "cpu")}


def _opened(path: Path, device: str) -> Any:
    from safeguard.exporters.graph import beside

    return open_backend(path, inputs=INPUTS, outputs=["logits"], device=device, external=beside(path))


def tensorrt_runner(bench: Bench, work: Path, notes: dict[str, Any]) -> dict[str, Any]:
    """TensorRT, or its twin for RTX where only that is installed; builds, then opens from the cache."""
    from safeguard.backends.engine_cache import EngineCache
    from safeguard.backends.engine_spec import Buckets
    from safeguard.exporters.tensorrt import build_engine

    folder = work / "toxic-decomposed"
    if not (folder / "model.onnx").is_file():
        raise Skip("the graph was not exported")
    bench.need(0 if bench.rehearsal else 120)
    flavour = _flavour()
    shape = toxic_bert(bench)
    buckets = (
        Buckets(lengths=(32, 128), batches=(1, 8))
        if bench.rehearsal
        else Buckets(lengths=(32, 128, shape.window), batches=(1, 8, 32, 64, 256))
    )
    started = time.perf_counter()
    cache = EngineCache(work / "engines")
    build_engine(folder / "model.onnx", flavour=flavour, buckets=buckets, cache=cache)
    notes["build_s"] = round(time.perf_counter() - started, 1)
    notes["flavour"] = flavour
    from safeguard.backends.tensorrt import open_engine
    from safeguard.exporters.graph import beside

    path = folder / "model.onnx"
    engine = open_engine(
        path, inputs=INPUTS, outputs=["logits"], device=flavour, external=beside(path), cache=cache
    )
    engine.warmup()
    notes["graphs"] = engine.graphs
    return {f"{flavour}_fp16": engine}


def _flavour() -> Any:
    import importlib

    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return name
    raise Skip("neither tensorrt nor tensorrt_rtx is installed")


def exported_timing(bench: Bench, runners: Mapping[str, Any]) -> dict[str, Any]:
    """The exported graphs beside ours, in turn."""
    from tests.bench.gpu_parts.text import Runners, agreement, timed

    if not runners:
        raise Skip("no runtime for exported graphs could be started here")
    mine = Runners(bench, toxic_bert(bench))
    for name, runner in runners.items():
        mine.add(name, runner)
    names = ("eager_fp16", "graphs_fp16", *runners)
    found: dict[str, Any] = {"parity": bench.guarded(lambda: agreement(mine, names))}
    for rows, length in ((1, 32), (8 if bench.rehearsal else 64, 128), (8 if bench.rehearsal else 256, 128)):
        found[f"batch {rows}, {length} tokens"] = timed(bench, mine, names, rows, length)
    return found


def exported_section(bench: Bench, work: Path) -> dict[str, Any]:
    """Build, parity and timing of what the exports run on."""
    notes: dict[str, Any] = {}
    made = {
        "onnxruntime": bench.guarded(lambda: onnxruntime_runner(bench, work)),
        "tensorrt": bench.guarded(lambda: tensorrt_runner(bench, work, notes)),
    }
    runners: dict[str, Any] = {}
    found: dict[str, Any] = {"tensorrt_notes": notes}
    for name, one in made.items():
        if "skipped" in one or "failed" in one:
            found[name] = one
        else:
            runners |= one
    found |= bench.guarded(lambda: exported_timing(bench, runners))
    return found
