"""A tiny real Llama, a byte tokenizer with a ChatML template, and a script of what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


@cache
def _backend() -> str:
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tok = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(list(SPECIAL))
    return str(tok.to_str())


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    """One token per byte, so that every word is split over several; pads on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
        chat_template=template,
    )


def tiny_llama(tokenizer: Any, kind: Any = LlamaForCausalLM) -> Any:
    """A Llama of 16 hidden units with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config).eval()


class Script(LogitsProcessor):  # type: ignore[misc]
    """Makes the model give known answers: prompt word -> answer, or several, the first the likeliest.

    An answer begins after the last question mark of a row, or after the template's generation prompt. It
    depends on the row alone, as a processor must. `rows` has the rows asked in each first step.
    """

    def __init__(
        self, tokenizer: Any, answers: Mapping[str, str | Sequence[str]], default: str = "fine"
    ) -> None:
        self.tokenizer, self.answers, self.default = tokenizer, answers, default
        self.rows: list[int] = []
        self.prompts: list[str] = []
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        starts = [self._start(ids) for ids in input_ids.tolist()]
        self.steps += 1
        if starts and starts[0] == input_ids.shape[1]:
            self.rows.append(len(starts))
            self.prompts += [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in input_ids]
        for row, (ids, start) in enumerate(zip(input_ids.tolist(), starts, strict=True)):
            done, best = ids[start:], 0.0
            for answer in self._answers(self.tokenizer.decode(ids[:start])):
                wanted = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], 258]
                if wanted[: len(done)] == done and len(done) < len(wanted):
                    forced[row, wanted[len(done)]] = max(best, float(forced[row, wanted[len(done)]]))
                    best -= 0.1
        return forced

    def _answers(self, prompt: str) -> Sequence[str]:
        found = next((a for word, a in self.answers.items() if word in prompt), self.default)
        return [found] if isinstance(found, str) else found

    def _start(self, ids: list[int]) -> int:
        opening = self.tokenizer.convert_tokens_to_ids("<|im_start|>")
        if opening in ids:
            return len(ids) - 1 - ids[::-1].index(opening) + 1 + len("assistant\n")
        mark = self.tokenizer("?", add_special_tokens=False)["input_ids"][0]
        return len(ids) - ids[::-1].index(mark)


def asked(tokenizer: Any, *prompts: str) -> dict[str, torch.Tensor]:
    """Prompts as a padded batch for `generate()`."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def chatted(tokenizer: Any, *turns: tuple[str, str]) -> dict[str, torch.Tensor]:
    """A conversation of (role, content) as the template renders it, with the generation prompt."""
    text = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in turns], tokenize=False, add_generation_prompt=True
    )
    batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
