"""A tiny low-rank adapter as a finished run leaves it, for tests of packing and serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from safeguard.train.refiner.runs import save_adapter
from tests.tiny_decoders import TEMPLATE, decoder, save


def finished_run(folder: Path, *, base: Path | None = None, rank: int = 2, changed: bool = False) -> Path:
    """A run's folder. changed: the adapter does something; a fresh one leaves its base as it is."""
    place = base or save(folder.parent / "base")
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(decoder(), config)
    if changed:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    save_adapter(model, folder, str(place))
    TEMPLATE.write(folder / "refiner_template.json")
    facts = {
        "recipe": "refiner-sft",
        "template": TEMPLATE.version,
        "config": {"base": str(place), "seed": 0, "lora": {"rank": rank}},
    }
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    metrics = {"steps": 4, "validation_loss": 0.5, "sources": {"posi_sft": 3, "ours": 1}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder
