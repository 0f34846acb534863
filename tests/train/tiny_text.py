"""A data pack of mild rows and a trunk of a few thousand weights, for tests of the text recipe."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from safeguard.train.text_data import FILES

WORDS = [
    "the",
    "a",
    "you",
    "are",
    "is",
    "kind",
    "rude",
    "awful",
    "nice",
    "day",
    "cat",
    "dog",
    "how",
    "do",
    "i",
    "bake",
    "bread",
    "break",
    "in",
    "window",
    "sunny",
    "garden",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def row(text: str, label: int | None, source: str, split: str = "train", **more: Any) -> dict[str, Any]:
    """One line of a data file."""
    return {
        "id": text,
        "text": text,
        "label": label,
        "category": "none",
        "source": source,
        "split": split,
        **more,
    }


def write_pack(folder: Path) -> Path:
    """All files of a data pack, with a few rows each; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
    for split in ("train", "validation"):
        for i, subject in enumerate(("cat", "dog", "garden", "window", "bread", "day")):
            rude, kind = f"you are a rude awful {subject} {split}", f"the {subject} is nice and kind {split}"
            rows["toxicity_text.jsonl.gz"] += [
                row(rude, 1, "dghs_v0.1", split, category="women"),
                row(kind, 0, "dghs_v0.1", split),
            ]
            rows["t2i_refine_pairs.jsonl.gz"].append(
                row(
                    f"a rude {subject} {i}",
                    1,
                    "coprov2_train",
                    split,
                    category="violence",
                    target=f"a nice {subject}",
                )
            )
            rows["t2i_prompts.jsonl.gz"].append(row(f"a sunny {subject}", 0, "coco2014_captions", split))
            rows["llm_prompts.jsonl.gz"] += [
                row(f"how do i break the {subject}", 1, "malicious_instruct", split, category="harmful"),
                row(f"how do i bake a {subject}", 0, "self_instruct_seed", split, category="benign"),
            ]
    for name, lines in rows.items():
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def write_trunk(folder: Path) -> Path:
    """A random two-layer BERT with a letter-wise WordPiece tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *LETTERS, *("##" + c for c in LETTERS)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
