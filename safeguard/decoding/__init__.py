"""Guards that act while tokens or pictures are made: logits processors, diffusion guidance, weight edits.

Each works alone, in `generate(logits_processor=[...])` or on a pipeline, and the language ones through the
policy's `decoding` part. What is made here is never a promise: the output is checked all the same.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeguard.decoding.contrastive import ContrastiveProcessor
    from safeguard.decoding.rectification import RectificationProcessor
    from safeguard.decoding.safety_guidance import SafetyGuidance
    from safeguard.decoding.surgery import WeightEdit
    from safeguard.decoding.value_model import ValueModel

__all__ = ["ContrastiveProcessor", "RectificationProcessor", "SafetyGuidance", "ValueModel", "WeightEdit"]

_PLACES = {
    "ContrastiveProcessor": "contrastive",
    "RectificationProcessor": "rectification",
    "SafetyGuidance": "safety_guidance",
    "ValueModel": "value_model",
    "WeightEdit": "surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
