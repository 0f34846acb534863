"""Tiny random models of the real classes, with tokenizers, whose logits are far enough apart to be judged."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

LABELS = ("toxic", "insult", "threat")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(56))]
WINDOW = 40


def tokenizer(pad_id: int = 0) -> Any:
    """Sixty words; the pad token is number `pad_id`."""
    words = WORDS.copy()
    words[0], words[pad_id] = words[pad_id], words[0]
    ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=WINDOW,
    )


def classifier(kind: str, *, seed: int = 0, **config: Any) -> Any:
    """A random classifier: kind is Bert, Roberta or DebertaV2."""
    torch.manual_seed(seed)
    own: dict[str, dict[str, Any]] = {
        "Bert": {"max_position_embeddings": WINDOW, "pad_token_id": 0},
        "Roberta": {
            "max_position_embeddings": WINDOW + 2,
            "pad_token_id": 1,
        },  # counted from pad_token_id + 1
        "DebertaV2": {
            "max_position_embeddings": WINDOW,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pad_token_id": 0,
        },
    }
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,  # the usual 0.02 gives logits that agree whatever is wrong
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        **own[kind],
        **config,
    )
    return getattr(transformers, f"{kind}ForSequenceClassification")(made).eval()


def vision_tower(*, seed: int = 0) -> Any:
    """A random CLIP vision tower: 32 px, 8 px patches, embeddings of 16 numbers."""
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=16,
        initializer_range=0.3,
    )
    return transformers.CLIPVisionModelWithProjection(config).eval()
