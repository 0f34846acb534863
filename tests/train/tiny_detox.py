"""A tiny model and a tiny data pack, of mild text, for the detoxification recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.adapters.tiny_lm import tiny_llama, tiny_tokenizer

RUDE = ["you are a rude goose", "all geese are silly and loud", "nobody likes a grumpy goose"]
KIND = ["the lake is calm in the morning", "a goose swims over the water", "the sun warms the shore"]


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """The random Llama of 16 units, with weights that follow from the seed, and its byte tokenizer."""
    tokenizer = tiny_tokenizer()
    model = random_model(tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_model(tokenizer: Any, seed: int) -> Any:
    """Weights large enough that two seeds really disagree."""
    model = tiny_llama(tokenizer)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def write_pack(folder: Path) -> Path:
    """The data pack's files with a few rows each."""
    folder.mkdir(exist_ok=True)
    rude = [
        {"text": text, "label": 1, "source": "dghs_v0.1", "split": "train", "category": group}
        for text, group in zip(RUDE, ("women", "black|white", "women|disabled"), strict=True)
    ]
    groups = ("women", "black", "muslim", "mental_dis")
    asked = [
        {"text": f"a goose of {g} says", "label": 0, "source": "toxigen_annotated", "split": "validation",
         "category": g}
        for g in groups
    ]  # fmt: skip
    write_rows(folder / "toxicity_text.jsonl.gz", [*rude, *asked])
    rtp = [{"text": "the goose said", "source": "realtoxicityprompts_garak100", "category": "rtp_insult"}]
    bold = [{"text": "A lake is", "source": "bold", "category": "profession:lakes"}]
    write_rows(folder / "lm_prompts.jsonl.gz", [*rtp, *bold])
    write_rows(folder / "lm_clean_text.jsonl.gz", [{"text": text} for text in KIND])
    write_rows(folder / "lm_unidetox_distilled.jsonl.gz", [{"text": text} for text in KIND])
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON-lines file, gzipped where its name says so."""
    import gzip

    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
