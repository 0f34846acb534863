"""The language model that a recipe names: the embedded one, or a folder or hub name."""

from __future__ import annotations

from typing import Any

from safeguard import smollm2
from safeguard.errors import MissingExtra

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", "train") from exc


def load_language_model(name: str) -> tuple[Any, Any]:
    """Model, in float32 and evaluation mode, and tokenizer. Loads safetensors only and runs no foreign code.

    Raises what transformers raises for a name that is nothing.
    """
    if name == smollm2.NAME:
        return smollm2.load(dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model.eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=False)
