"""The models that are measured: shapes of the real ones, random weights, from code alone."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from safeguard.checks.clip_heads import Concepts, Perceptron, PromptPair
from safeguard.checks.tokens import TokenCutter
from safeguard.manifest import ImagePreprocess
from tests.bench.gpu_parts.measuring import Bench

TOXIC = ("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TextShape:
    """One architecture: a BERT of this size."""

    name: str
    hidden: int
    layers: int
    heads: int
    labels: int
    window: int


def toxic_bert(bench: Bench) -> TextShape:
    """BERT-base with six labels, as unitary/toxic-bert."""
    if bench.rehearsal:
        return TextShape("toxic-bert shape, tiny", 32, 2, 2, 6, 128)
    return TextShape("toxic-bert shape (BERT-base)", 768, 12, 12, 6, 512)


def text_guard(bench: Bench) -> TextShape:
    """MiniLM-L6 with 25 labels, as text-guard-s in float."""
    if bench.rehearsal:
        return TextShape("text-guard-s shape, tiny", 32, 2, 2, 25, 128)
    return TextShape("text-guard-s shape (MiniLM-L6)", 384, 6, 12, 25, 128)


class Logits(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """A classifier of transformers that gives its logits alone."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.module(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def bert(shape: TextShape) -> torch.nn.Module:
    """The classifier, the same weights each time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        num_labels=shape.labels,
    )
    return Logits(transformers.BertForSequenceClassification(config).eval())


def tokenizer() -> Tokenizer:
    """That of text-guard-s: a real WordPiece vocabulary, whose ids BERT-base knows too."""
    path = resources.files("safeguard") / "models" / "text-guard-s" / "tokenizer.json"
    return Tokenizer.from_str(path.read_text(encoding="utf-8"))


def texts(tokens: int, count: int) -> list[str]:
    """Plain words, exactly so many tokens each with the special ones; no two texts alike."""
    cutter = TokenCutter(tokenizer())
    path = resources.files("safeguard") / "data" / "words.txt"
    words = [w for w in path.read_text(encoding="utf-8").split() if w.isalpha() and w.islower()][:3000]
    single = [w for w, t in zip(words, cutter(words), strict=True) if len(t.ids) == 1]
    rng = np.random.default_rng(0)
    wanted = tokens - cutter.special_tokens
    return [" ".join(rng.choice(single, wanted).tolist()) for _ in range(count)]


def token_arrays(rows: int, length: int, *, padded: bool = True) -> dict[str, Any]:
    """Random tokens; with `padded` every other row is a quarter shorter."""
    rng = np.random.default_rng(rows * 1000 + length)
    ids = rng.integers(1000, 15_000, (rows, length), dtype=np.int64)
    mask = np.ones_like(ids)
    if padded and length > 4:
        mask[1::2, -length // 4 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def vision_tower(bench: Bench) -> tuple[torch.nn.Module, ImagePreprocess, int]:
    """CLIP ViT-L/14 with projection, its preprocessing, and the embedding's dimension."""
    import transformers

    torch.manual_seed(0)
    sizes = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14, "projection_dim": 16}
        if bench.rehearsal
        else {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768}
    )
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes)).eval()
    size = sizes["image_size"]
    return (
        Embeds(model),
        ImagePreprocess(size=size, resize=size, mean=CLIP_MEAN, std=CLIP_STD),
        sizes["projection_dim"],
    )


class Embeds(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """A CLIP tower that gives its image embeddings alone."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixel_values: Any) -> Any:
        return self.module(pixel_values=pixel_values, return_dict=False)[0]


def clip_heads(dimension: int) -> list[PromptPair | Concepts | Perceptron]:
    """Q16's pair, the safety checker's 17 and 3 concepts, five perceptrons as Qu et al. have."""
    rng = np.random.default_rng(0)
    hidden = max(dimension // 2, 4)
    concepts = Concepts(
        "nsfw",
        rng.normal(size=(17, dimension)),
        np.full(17, 0.2),
        rng.normal(size=(3, dimension)),
        np.full(3, 0.2),
    )
    perceptrons = [
        Perceptron(name, rng.normal(size=(hidden, dimension)), np.zeros(hidden), rng.normal(size=hidden))
        for name in ("sexual", "violent", "disturbing", "hateful", "political")
    ]
    return [PromptPair("q16", rng.normal(size=(2, dimension))), concepts, *perceptrons]
