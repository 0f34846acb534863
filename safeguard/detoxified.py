"""SmolLM2-135M-Instruct made less toxic: the pack `smollm2-detox`, a small adapter, merged into its weights.

The adapter is what `safeguard train unidetox` leaves in `adapter/`; no PEFT is needed to merge it. It makes
the model less toxic, not safe: keep a guard around it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from safeguard import smollm2
from safeguard.errors import MissingExtra, PackError
from safeguard.packs import Pack, resolve

NAME = "smollm2-detox"
WEIGHTS, SETTINGS, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
"""Files of the pack: low-rank matrices, their settings (PEFT's), the model that they belong to."""
_PREFIX = "base_model.model."  # of PEFT, before every name of the model
_UNKNOWN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")


def load(
    *,
    dtype: Any = "bfloat16",
    device: str = "cpu",
    pack: str | Path = NAME,
    cache: Path | None = None,
) -> tuple[Any, Any]:
    """The detoxified model, in evaluation mode, and its tokenizer.

    dtype, cache: as in `smollm2.load`. pack: a name or folder. Raises PackError for an adapter of another
    model, and what `packs.resolve` and `smollm2.load` raise.
    """
    found = resolve(pack).expect("adapter")
    about = _json(found, BASE)
    if about.get("sha256") != smollm2.SHA256:
        raise PackError(
            f"pack {found.manifest.name!r} is for {about.get('name')!r}, not for {smollm2.NAME!r}"
        )
    model, tokenizer = smollm2.load(dtype="float32", device="cpu", cache=cache)
    merge(model, found)
    wanted = getattr(_torch(), dtype) if isinstance(dtype, str) else dtype
    return model.to(device=device, dtype=wanted).eval(), tokenizer


def merge(model: Any, pack: Pack) -> Any:
    """Adds the pack's low-rank matrices to the model's weights, in place: W + B A alpha / r.

    Raises PackError, before anything is changed, for matrices that do not fit and for unknown settings.
    """
    torch = _torch()
    changes = _changes(model, pack)
    with torch.no_grad():
        for weight, change in changes:
            weight += change.to(device=weight.device, dtype=weight.dtype)
    return model


def _changes(model: Any, pack: Pack) -> list[tuple[Any, Any]]:
    from safetensors.torch import load as read

    name = pack.manifest.name
    settings = _json(pack, SETTINGS)
    other = [key for key in _UNKNOWN if settings.get(key)]
    if settings.get("peft_type") != "LORA" or other:
        what = ", ".join(other) or settings.get("peft_type")
        raise PackError(f"pack {name!r} has an adapter that cannot be merged: {what}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not _is_number(alpha):
        raise PackError(f"pack {name!r}: r and lora_alpha must be numbers, got {rank!r} and {alpha!r}")
    try:
        tensors = read(pack.read(WEIGHTS))
    except Exception as exc:
        if isinstance(exc, PackError):
            raise
        raise PackError(f"pack {name!r}: {WEIGHTS} cannot be read ({type(exc).__name__})") from exc
    pairs = _pairs(tensors, name)
    found = []
    for path, (down, up) in pairs.items():
        try:
            weight = model.get_submodule(path).weight
        except AttributeError as exc:
            raise PackError(
                f"pack {name!r} changes {path}, which {type(model).__name__} does not have"
            ) from exc
        if tuple(down.shape) != (rank, weight.shape[1]) or tuple(up.shape) != (weight.shape[0], rank):
            raise PackError(f"pack {name!r}: the matrices of {path} do not fit the model")
        change = up.float() @ down.float() * (float(alpha) / rank)
        if not bool(change.isfinite().all()):
            raise PackError(f"pack {name!r}: the matrices of {path} are no finite numbers")
        found.append((weight, change))
    return found


def _pairs(tensors: Mapping[str, Any], name: str) -> dict[str, tuple[Any, Any]]:
    """Module -> its matrices A (rank, in) and B (out, rank)."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        path, dot, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not key.startswith(_PREFIX) or not dot or kind not in ("A.weight", "B.weight") or value.dim() != 2:
            raise PackError(f"pack {name!r}: {key} is no low-rank matrix")
        found.setdefault(path, {})[kind[0]] = value
    if not found or any(set(pair) != {"A", "B"} for pair in found.values()):
        raise PackError(f"pack {name!r} must hold two matrices for every module that it changes")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _json(pack: Pack, file: str) -> dict[str, Any]:
    try:
        found = json.loads(pack.read(file))
    except ValueError as exc:
        raise PackError(f"pack {pack.manifest.name!r}: {file} is no JSON file") from exc
    if not isinstance(found, dict):
        raise PackError(f"pack {pack.manifest.name!r}: {file} must hold a JSON object")
    return found


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _torch() -> Any:
    try:
        import torch
    except ImportError as exc:
        raise MissingExtra("torch", extra="torch") from exc
    return torch
