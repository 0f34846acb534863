"""Models whose scores are a table, so that every expected value can be worked out by hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


class TableModel:
    """Scores of the next token by the last token alone; counts how often it is asked, keeps no cache."""

    training = False
    device = torch.device("cpu")

    def __init__(self, rows: list[list[float]]) -> None:
        self.table = torch.tensor(rows)
        self.asked: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        self.asked.append(tuple(input_ids.shape))
        return CausalLMOutputWithPast(logits=self.table[input_ids])

    __call__ = forward


def tiny_llama(seed: int, vocabulary: int = 41) -> Any:
    """A Llama of two layers with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.6,  # so that what it says depends on what it read
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int, vocabulary: int = 41) -> Any:
    """A GPT-2, whose positions are learned, with random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        initializer_range=0.6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def prompts(kind: str) -> dict[str, torch.Tensor]:
    """One prompt, or a batch of three padded on the left."""
    if kind == "one":
        ids = torch.tensor([[1, 7, 9, 4]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ids = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 9, 4, 3], [0, 1, 8, 8, 6]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
