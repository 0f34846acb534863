"""The first half of the demo: a guarded chat model is asked, prompt by prompt."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from safeguard import detoxified, smollm2
from safeguard.demo.results import Prompt, Result
from safeguard.errors import Blocked, CheckFailed, MissingExtra
from safeguard.guards import Guard, capture

EMBEDDED = "SmolLM2-135M-Instruct"
DETOXIFIED = f"{EMBEDDED} + {detoxified.NAME}"
NEW_TOKENS = 48


def load(name: str | None, *, device: str = "cpu", is_detoxified: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer: the embedded SmolLM2, or a hub name or folder. Never a fake in its place.

    is_detoxified: the embedded one with the shipped adapter. Raises ValueError for that with a name.
    """
    if is_detoxified and name is not None:
        raise ValueError(f"the detoxified model is the embedded one; give it without the model {name!r}")
    if is_detoxified:
        return detoxified.load(device=device)
    if name is None:
        return smollm2.load(device=device)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as exc:
        raise MissingExtra("transformers", extra="torch") from exc
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True)
    return model.to(device).eval(), tokenizer


def ask(
    model: Any, tokenizer: Any, guard: Guard, prompts: Sequence[Prompt], *, max_new_tokens: int = NEW_TOKENS
) -> Iterator[Result]:
    """Guard the model in place and put each prompt to it, greedily decoded; a result per prompt, in order."""
    guard(model, tokenizer=tokenizer)
    guard.check_input(
        ["Good morning."], task="llm"
    )  # the first run of a model file is slower than all others
    guard.check_output(["Good morning."])
    for prompt in prompts:
        yield _ask(model, tokenizer, prompt, max_new_tokens)


@contextmanager
def half_of_the_cores() -> Iterator[None]:
    """Run torch on at most half of the cores, and as before afterwards.

    Threads of a small model that wait for each other on a busy machine cost far more than they bring: two on
    two busy cores took 25 s for 16 tokens in bfloat16, one took 0.9 s (one run each).
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ask(model: Any, tokenizer: Any, prompt: Prompt, max_new_tokens: int) -> Result:
    inputs = _tokens(tokenizer, prompt.text).to(model.device)
    answer: str | None = None
    started = time.perf_counter()
    with capture() as reports:
        try:
            ids = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
            )
        except (Blocked, CheckFailed):
            ids = None
    took_ms = (time.perf_counter() - started) * 1000
    report = reports[-1]
    if ids is not None and not report.blocked:
        answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return Result(prompt, report, max(took_ms - report.latency_ms, 0.0), answer)


def _tokens(tokenizer: Any, text: str) -> Any:
    """The prompt as a chat where the model is one, else as it is."""
    if getattr(tokenizer, "chat_template", None) is None:
        return tokenizer(text, return_tensors="pt")
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
