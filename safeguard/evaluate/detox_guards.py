"""Guards of the detoxification table that must be trained first: a value model and a weight edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeguard.files import write_whole
from safeguard.train.surgery import SurgeryConfig, train_surgery
from safeguard.train.text_data import read_jsonl
from safeguard.train.value import ValueConfig, train_value

if TYPE_CHECKING:
    from safeguard.evaluate.detox_lm import MakeProcessors

TOXIC_ROWS = "toxicity_text.jsonl.gz"
CLEAN_ROWS = "lm_clean_text.jsonl.gz"


def value_model(config: ValueConfig, data: Path, out: Path, *, language_model: tuple[Any, Any]) -> Path:
    """Folder of the value model, trained on continuations of ToxiGen's training split if it is not there yet.

    The prompts that the table is measured on are of another split.
    """
    if not (out / "metrics.json").is_file():
        from safeguard.checks.loading import load_check

        prompts = _write(
            out / "prompts.jsonl",
            [
                {"text": row["text"]}
                for row in read_jsonl(data / TOXIC_ROWS)
                if row.get("source") == "toxigen_annotated" and row.get("split") == "train"
            ],
        )
        check = load_check(config.sampling.check)
        train_value(config, prompts, out, language_model=language_model, check=check)
    return out


def weight_edit(
    config: SurgeryConfig, data: Path, out: Path, *, language_model: tuple[Any, Any], skipped: int
) -> Path:
    """File of the edit, made from labelled hate and other text if it is not there yet.

    skipped: clean texts in front, which the table measures perplexity on; the budget is kept on those behind.
    """
    path = out / "edit.safetensors"
    if not (out / "metrics.json").is_file():
        labelled = [
            {"text": row["text"], "label": row["label"]}
            for row in read_jsonl(data / TOXIC_ROWS)
            if row.get("source") == "dghs_v0.1" and row.get("split") == "train"
        ]
        neutral = [{"text": row["text"]} for row in read_jsonl(data / CLEAN_ROWS)[skipped:]]
        train_surgery(
            config,
            _write(out / "labelled.jsonl", labelled),
            _write(out / "neutral.jsonl", neutral),
            out,
            language_model=language_model,
        )
    return path


def against(anti_expert: Any, strength: float, top_p: float) -> MakeProcessors:
    """Makes the processor of each call: DExperts with the guarded model itself as the expert."""
    from safeguard.decoding.contrastive import ContrastiveProcessor

    return lambda mask, pad: [
        ContrastiveProcessor(
            anti_expert,
            strength=strength,
            plausibility=None,
            top_p=top_p,
            attention_mask=mask,
            pad_token_id=pad,
        )
    ]


def rectified_by(value: Any, epsilon: float, top_k: int | None = None) -> MakeProcessors:
    """Makes the processor of each call: rectification by a value model."""
    from safeguard.decoding.rectification import RectificationProcessor

    return lambda mask, pad: [
        RectificationProcessor(value, epsilon=epsilon, top_k=top_k, attention_mask=mask, pad_token_id=pad)
    ]


def load_value_model(folder: Path, like: Any) -> Any:
    """The value model in a folder, on the device and in the precision of the model that it guides."""
    from safeguard.decoding.value_model import ValueModel

    return ValueModel.load(folder, device=like.device).to(like.dtype)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
