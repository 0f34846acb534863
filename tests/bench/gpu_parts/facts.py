"""What machine this is, and how fast it copies and multiplies at best."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from tests.bench.gpu_parts.measuring import Bench, Skip, on_device_ms

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx",
)


def facts(bench: Bench) -> dict[str, Any]:
    """Versions and device."""
    import safeguard

    versions = {"safeguard": safeguard.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "versions": versions,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "rehearsal": bench.rehearsal,
        "weights": "random: speed only, no accuracy is claimed",
    }
    if bench.on_gpu:
        device = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": device.name,
            "multiprocessors": device.multi_processor_count,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "capability": f"{device.major}.{device.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": bench.guarded(_driver),
        }
    return found


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def ceilings(bench: Bench) -> dict[str, Any]:
    """Measured copy rates (GB/s, one way; device to device read and written) and products (TFLOP/s)."""
    size = 2**16 if bench.rehearsal else 2**30
    pinned = bench.on_gpu
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    one, other = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    copies = {
        "h2d_pinned": (lambda: one.copy_(host, non_blocking=True), 1),
        "d2h_pinned": (lambda: host.copy_(one, non_blocking=True), 1),
        "d2d": (lambda: other.copy_(one), 2),
    }
    found: dict[str, Any] = {}
    for name, (copy, times) in copies.items():
        taken = on_device_ms(bench, copy, inner=2)
        found[f"{name}_gb_per_s"] = None if taken is None else round(times * size / taken / 1e6, 1)
    small_host = torch.empty(1024, dtype=torch.uint8, pin_memory=pinned)
    small = torch.empty(1024, dtype=torch.uint8, device=bench.device)
    found["h2d_1kib_ms"] = on_device_ms(bench, lambda: small.copy_(small_host, non_blocking=True))
    side = 64 if bench.rehearsal else 8192
    found["matrix_side"] = side
    for name, make in {
        "float16": lambda: _product(bench, side, torch.float16),
        "bfloat16": lambda: _product(bench, side, torch.bfloat16),
        "float32": lambda: _product(bench, side, torch.float32),
        "float8": lambda: _float8(bench, side),
    }.items():
        found[f"{name}_tflop_per_s"] = bench.guarded(make)
    return found


def _product(bench: Bench, side: int, dtype: torch.dtype) -> float | None:
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    return _rate(side, on_device_ms(bench, lambda: a @ b, inner=3))


def _float8(bench: Bench, side: int) -> float | None:
    if not bench.on_gpu or torch.cuda.get_device_capability() < (8, 9):
        raise Skip("float8 products need an NVIDIA GPU of capability 8.9")
    a = torch.randn(side, side, device=bench.device).to(torch.float8_e4m3fn)
    b = torch.randn(side, side, device=bench.device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=bench.device)
    product = lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    return _rate(side, on_device_ms(bench, product, inner=3))


def _rate(side: int, taken_ms: float | None) -> float | None:
    return None if taken_ms is None else round(2 * side**3 / taken_ms / 1e9, 1)
