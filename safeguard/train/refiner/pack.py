"""Turns a finished refiner run into a model pack: adapter in float16, template, figures, card, digests."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackError
from safeguard.exporters.writing import new_folder
from safeguard.files import write_whole
from safeguard.manifest import Manifest
from safeguard.packs import file_digest, seal
from safeguard.refiners.language_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safeguard.refiners.shipped import NAME
from safeguard.refiners.template import FILE_NAME, RefinerTemplate
from safeguard.train.refiner.pack_card import pack_card
from safeguard.train.refiner.run_template import RUN, template_of

try:
    import torch
    from safetensors.torch import load_file, save_file
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

METRICS = "metrics.json"
MOST_BYTES = 12_000_000
"""Of the adapter: it ships inside the package."""
_PLACES = ("auto_mapping", "base_model_name_or_path", "parent_library", "revision")
"""Entries of peft's configuration that name where a model was read from."""


def write_refiner_pack(
    run: Path,
    out: Path,
    *,
    version: str,
    evaluation: Path | None = None,
    contender: str | None = None,
    adapter: Path | None = None,
    name: str = NAME,
    failures: Sequence[str] = (),
    overwrite: bool = False,
) -> Manifest:
    """Writes the pack of the run in a folder to `out`, whole or not at all.

    evaluation: what `safeguard evaluate refine --out` wrote; contender: the row of it that is this adapter,
    needed where it holds more than one trained refiner. adapter: a checkpoint of the run in place of its end.
    failures: sentences for the card's limits, of what was seen to go wrong.
    Raises FileNotFoundError for a run that is not finished, PackError for weights that are not finite, are no
    low-rank adapter or are larger than `MOST_BYTES`, ValueError for an evaluation that does not fit.
    """
    source = adapter or run
    for path in (run / RUN, source / ADAPTER_CONFIG, source / ADAPTER_WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(2, f"no {path.name} of a finished run", str(path.parent))
    facts = _json(run / RUN)
    measured = _json(run / METRICS) if (run / METRICS).is_file() else {}
    base = str(facts["config"]["base"])
    found = None if evaluation is None else _evaluation(evaluation, contender)
    with new_folder(out, overwrite=overwrite) as folder:
        size = _write_adapter(source, folder, base)
        (template_of(source) or template_of(run) or RefinerTemplate.default()).write(folder / FILE_NAME)
        metrics = {"run": facts, "training": measured, "evaluation": found, "adapter_bytes": size}
        text = json.dumps(metrics, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_whole(folder / METRICS, text)
        sources = data_sources(measured.get("sources", {}))
        card = pack_card(
            name,
            version,
            base,
            sources=sources,
            facts=facts,
            measured=measured,
            found=found,
            failures=failures,
        )
        write_whole(folder / "README.md", card)
        fields: dict[str, Any] = {
            "name": name,
            "version": version,
            "kind": "refiner",
            "summary": f"LoRA adapter for {base}: rewrites unsafe prompts for image generators",
            "model": {"file": ADAPTER_WEIGHTS, "inputs": ["input_ids"], "outputs": ["logits"]},
            "precision": "float16",
            "license": "Apache-2.0",
            "data": sources,
            "notes": f"base: {base}; run.json sha256 {file_digest(run / RUN)}",
        }
        return seal(folder, fields)


def data_sources(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Sources of the training data as a manifest lists them, with their licences."""
    text = (resources.files("safeguard.train") / "data" / "sources.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)["source"]
    return [
        {
            "name": name,
            "rows": rows,
            "license": known.get(name, {}).get("license", "given by whoever trained it"),
            "url": known.get(name, {}).get("url", ""),
        }
        for name, rows in sorted(counts.items())
    ]


def _write_adapter(source: Path, folder: Path, base: str) -> int:
    """Weights in float16 and a configuration that names no folder of the machine; returns the bytes."""
    weights = load_file(source / ADAPTER_WEIGHTS)
    strange = [key for key in weights if ".lora_A." not in key and ".lora_B." not in key]
    if strange or not weights:
        raise PackError(
            f"{source / ADAPTER_WEIGHTS} is no low-rank adapter: it holds {strange[:2] or 'nothing'}"
        )
    half = {key: tensor.to(torch.float16).contiguous() for key, tensor in sorted(weights.items())}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in half.values()):
        raise PackError(f"{source / ADAPTER_WEIGHTS} holds numbers that are not finite in float16")
    save_file(half, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
    size = (folder / ADAPTER_WEIGHTS).stat().st_size
    if size > MOST_BYTES:
        raise PackError(f"the adapter is {size} bytes, at most {MOST_BYTES} ship; lower lora.rank")
    settings = {key: value for key, value in _json(source / ADAPTER_CONFIG).items() if key not in _PLACES}
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    targets = settings.get("target_modules")
    if isinstance(targets, list):
        settings["target_modules"] = sorted(targets)  # peft writes a set: another order each time
    write_whole(folder / ADAPTER_CONFIG, json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return size


def _evaluation(path: Path, contender: str | None) -> dict[str, Any]:
    """The evaluation, with the name of our contender in it."""
    found = _json(path)
    names: Sequence[str] = list(dict.fromkeys(row["contender"] for row in found["rows"]))
    ours = [name for name in names if name not in ("none", "span-softener", "zero-shot")]
    chosen = contender or (ours[0] if len(ours) == 1 else None)
    if chosen not in names:
        raise ValueError(f"contender must be one of {', '.join(names)}, got {chosen!r}")
    return {**found, "contender": chosen}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ValueError(f"{path.name} is not valid JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(found).__name__}")
    return found
