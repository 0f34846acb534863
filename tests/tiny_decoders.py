"""Tiny random decoders with a byte tokenizer, and one of them exported once for all tests that read it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from safeguard.refiners.template import RefinerTemplate
from tests.adapters.tiny_lm import tiny_tokenizer

TEMPLATE = RefinerTemplate(
    version="test", system="Rewrite.", user="Prompt: {prompt}", length_floor=12, max_new_tokens=12
)
PROMPTS = ("an angry man", "a", "two ünïcode cats 猫 on a very long red wall")
END = 258
"""Id of `</s>`: 256 bytes come first, then `<pad>` and `<s>`."""


def settings(**changes: Any) -> dict[str, Any]:
    """Of two layers with two heads that share one head of keys and values."""
    return {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 257,
        "eos_token_id": END,
        "pad_token_id": 256,
        "initializer_range": 0.2,  # far apart logits, so that greedy choices do not hang on rounding
        **changes,
    }


def decoder(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **changes: Any) -> Any:
    """A decoder with random weights, always the same."""
    torch.manual_seed(0)
    return kind(config(**settings(**changes))).eval()


def save(folder: Path, model: Any = None) -> Path:
    """A folder as transformers write it, with tokenizer and refiner template."""
    (model or decoder()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    TEMPLATE.write(folder / "refiner_template.json")
    return folder


@cache
def onnx_pack() -> Path:
    """The decoder as a graph with its cache, for onnxruntime."""
    from safeguard.exporters.causal_lm import export_causal_lm

    folder = _scratch() / "onnx"
    export_causal_lm(decoder(), tiny_tokenizer(), folder, template=TEMPLATE)
    return folder


@cache
def genai_pack() -> Path:
    """The decoder for onnxruntime-genai, weights in float32 so that its answers are torch's."""
    from safeguard.exporters.genai import export_genai

    folder = _scratch() / "genai"
    export_genai(save(_scratch() / "model"), folder, precision="float32")
    return folder


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="safeguard-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
