"""A tiny base model in a folder and a file of mild pairs, for tests of the refiner trainers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeguard.testing import WordCheck
from safeguard.train.refiner.judges import Risk
from safeguard.train.refiner.rewards import Weighted
from safeguard.train.refiner.rl import RefinerRlConfig, Rewards, text_rewards
from safeguard.train.refiner.sft import RefinerSftConfig
from tests.tiny_decoders import save

IGNORE_PEFT = "ignore:.*checkpointing.* is deprecated:FutureWarning"
"""peft 0.21 asks transformers 5.23 for a property by its old name."""
WORDS = ["cat", "dog", "man", "boy", "car", "owl", "cow", "hen"]


def write_pairs(path: Path) -> Path:
    """Eight pairs to rewrite and four prompts that stay."""
    rows = [{"prompt": f"a bad {word}", "rewrite": f"a good {word}"} for word in WORDS]
    rows += [{"prompt": f"a calm {word}", "rewrite": "keep"} for word in WORDS[:4]]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def base_model(folder: Path) -> Path:
    """A random Llama with byte tokenizer, as transformers write it."""
    return save(folder)


def sft_config(base: Path | str, **changes: Any) -> RefinerSftConfig:
    """Four steps of two examples, without filters that need a model."""
    settings: dict[str, Any] = {
        "base": str(base),
        "steps": 4,
        "batch_size": 2,
        "precision": "no",
        "minimum_similarity": None,
        "drop_flagged": False,
        "validation_rows": 0,
        "checkpoint_every": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "lora": {"rank": 4, "dropout": 0.0},
    }
    return RefinerSftConfig.model_validate({**settings, **changes})


def rl_config(**changes: Any) -> RefinerRlConfig:
    """Four steps of two groups of two short answers."""
    settings: dict[str, Any] = {
        "steps": 4,
        "prompts_per_step": 2,
        "generations": 2,
        "max_answer_tokens": 6,
        "precision": "no",
        "checkpoint_every": 2,
        "learning_rate": 1e-3,
    }
    return RefinerRlConfig.model_validate({**settings, **changes})


def halves(first: Sequence[str], second: Sequence[str]) -> list[float]:
    """1 for equal texts, 0.5 for others."""
    return [1.0 if a == b else 0.5 for a, b in zip(first, second, strict=True)]


def letters(first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Share of the letters of two texts that both have, so that random answers are paid differently."""
    pairs = [(set(a), set(b)) for a, b in zip(first, second, strict=True)]
    return [len(a & b) / max(1, len(a | b)) for a, b in pairs]


def bad_words() -> Risk:
    """1 for a text with "bad" in it, else 0; flagged from 0.5."""
    return Risk(WordCheck("bad"), "bad")


def rewards(config: RefinerRlConfig) -> Rewards:
    """The text rewards of a recipe on small real fakes."""
    return Rewards(Weighted(text_rewards(config, bad_words(), letters)))
