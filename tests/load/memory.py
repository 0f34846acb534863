"""The memory of this process, measured after what can be given back was given back."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

MACHINE = "2-core x86-64"
"""How results name the machine they were taken on."""


def settled_rss() -> int:
    """Kilobytes that this process holds, after garbage and free memory were given back.

    Pages of files are not counted on Linux: they come and go with what other processes read.
    """
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0])


def growth_percent(rss: list[int]) -> float | None:
    """Growth over the samples by a straight line through them, in percent of the first; None for too few."""
    if len(rss) < 4:
        return None
    middle = (len(rss) - 1) / 2
    mean = sum(rss) / len(rss)
    slope = sum((i - middle) * (kb - mean) for i, kb in enumerate(rss))
    slope /= sum((i - middle) ** 2 for i in range(len(rss)))
    return round(100 * slope * (len(rss) - 1) / rss[0], 3)
