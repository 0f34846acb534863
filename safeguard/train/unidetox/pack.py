"""Packs the adapter of a finished UniDetox run: a model pack with its card, to be merged when loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safeguard import detoxified, smollm2
from safeguard.errors import PackError
from safeguard.files import write_whole
from safeguard.manifest import Manifest
from safeguard.packs import seal
from safeguard.train.unidetox.models import card

MOST_BYTES = 12_000_000
"""What the adapter may weigh, so that it can be shipped inside the package."""


def pack_adapter(
    run: Path, out: Path, *, name: str = detoxified.NAME, version: str = "1.0.0", table: Path | None = None
) -> Manifest:
    """Writes the pack of a run's folder (`detox-<texts>`, trained with LoRA) into out.

    table: `table.md` of `safeguard evaluate detox-table`, which goes into the card. Raises PackError for a
    run that is not finished, was not trained with LoRA or is of another model than the embedded one, and for
    an adapter of more than 12 MB.
    """
    metrics = _metrics(run)
    weights = run / "adapter" / detoxified.WEIGHTS
    if weights.stat().st_size > MOST_BYTES:
        raise PackError(
            f"the adapter has {weights.stat().st_size} bytes, at most {MOST_BYTES} may be; use a lower rank"
        )
    out.mkdir(parents=True, exist_ok=True)
    for file in (detoxified.WEIGHTS, detoxified.SETTINGS):
        shutil.copyfile(run / "adapter" / file, out / file)
    base = {"name": smollm2.NAME, "sha256": metrics["model_digest"]}
    write_whole(out / detoxified.BASE, json.dumps(base, indent=1) + "\n")
    write_whole(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_whole(out / "README.md", _card(metrics, table))
    texts = metrics["texts"]
    fields = {
        "format": 1,
        "name": name,
        "version": version,
        "kind": "adapter",
        "summary": "Low-rank adapter (UniDetox) that makes SmolLM2-135M-Instruct less toxic.",
        "model": {
            "file": detoxified.WEIGHTS,
            "inputs": ["input_ids", "attention_mask"],
            "outputs": ["logits"],
        },
        "precision": "bfloat16",
        "license": "Apache-2.0",
        "data": [
            {
                "name": f"{texts['name']} texts of UniDetox",
                "license": "see the card",
                "rows": texts["count"],
                "sha256": texts["sha256"],
            }
        ],
        "notes": "Less toxic, not safe: keep a guard around the model.",
    }
    return seal(out, fields)


def _metrics(run: Path) -> dict[str, Any]:
    path = run / "metrics.json"
    if not path.is_file():
        raise PackError(f"{run.name} holds no finished run; its stage apply has not ended")
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if metrics.get("stage") != "apply" or not (run / "adapter" / detoxified.WEIGHTS).is_file():
        raise PackError(f"{run.name} holds no adapter; train the stage apply with lora")
    if metrics["model_digest"] != smollm2.SHA256:
        raise PackError(f"{run.name} is of {metrics['model']}, not of {smollm2.NAME}")
    return metrics


def _card(metrics: dict[str, Any], table: Path | None) -> str:
    use = (
        "\n## Use\n\n```python\nfrom safeguard import detoxified\n\n"
        "model, tokenizer = detoxified.load()\n```\n\n"
        "or `safeguard demo --detoxified`. The files are PEFT's, too (`PeftModel.from_pretrained`).\n"
    )
    measured = "" if table is None else "\n## Measured\n\n" + table.read_text(encoding="utf-8")
    return card(metrics) + use + measured
