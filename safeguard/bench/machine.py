"""What a measurement was made on: processor, cores, instruction sets, memory and versions. No names."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "tokenizers", "onnxruntime", "torch", "transformers", "diffusers", "onnx", "pillow")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Instruction sets that decide how fast these models run."""


def describe_machine() -> dict[str, Any]:
    """Processor, cores that may be used, instruction sets, memory, load, and versions."""
    from safeguard import __version__

    cpu = _cpu_facts(_text(Path("/proc/cpuinfo")))
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "flags": sorted(set(FLAGS) & set(cpu.get("flags", "").split())),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "memory_gib": _memory_gib(_text(Path("/proc/meminfo"))),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"safeguard": __version__, **versions(PACKAGES)},
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def _cpu_facts(text: str) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_gib(text: str) -> float | None:
    for line in text.splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 1024**2, 1)
    return None
