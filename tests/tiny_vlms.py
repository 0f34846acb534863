"""Tiny random image-text models of the real classes, with processors made by hand: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from safeguard.refiners.template import RefinerTemplate
from safeguard.refiners.torch_vlm import without_video

KINDS = ("qwen", "idefics", "smolvlm")
TEMPLATE = RefinerTemplate(
    version="test",
    system="Rewrite.",
    user="Prompt: {prompt}\nDrawn from: {current}",
    length_floor=12,
    max_new_tokens=12,
)
_PARTS = (
    "{% for m in messages %}OPEN{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}CLOSE\n{% endfor %}{% if add_generation_prompt %}OPENassistant\n{% endif %}"
)
_QWEN = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IDEFICS = (
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)


def _chat(close: str, image: str) -> str:
    return _PARTS.replace("OPEN", "<|im_start|>").replace("CLOSE", close).replace("IMAGE", image)


def _tokenizer(special: tuple[str, ...], end: str, chat: str) -> Any:
    """One token per byte, then the special ones, of which the second ends an answer."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", *special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token=end,
        extra_special_tokens=[word for word in special if word != end],
        chat_template=chat,
    )


def qwen() -> tuple[Any, Any]:
    """Qwen2.5-VL: four patches of 14 pixels are one token."""
    chat = _chat("<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer = _tokenizer(_QWEN, "<|im_end|>", chat)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in _QWEN}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,  # far apart logits, so that greedy choices do not hang on rounding
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
            "window_size": 56,
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 3136})
    processor = without_video(transformers.Qwen2_5_VLProcessor)
    return model, processor(pictures, tokenizer, chat_template=chat)


def idefics(kind: str = "idefics") -> tuple[Any, Any]:
    """Idefics3, and SmolVLM, which is laid out alike: 28 pixels in patches of 14, four of them one token."""
    chat = _chat("<end_of_utterance>", "<image>")
    tokenizer = _tokenizer(_IDEFICS, "<end_of_utterance>", chat)
    smol = kind == "smolvlm"
    settings = transformers.SmolVLMConfig if smol else transformers.Idefics3Config
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    config = settings(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "initializer_range": 0.2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    torch.manual_seed(0)
    family = (
        transformers.SmolVLMForConditionalGeneration
        if smol
        else transformers.Idefics3ForConditionalGeneration
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=1, chat_template=chat)
    return family(config).eval(), processor


def vlm(kind: str) -> tuple[Any, Any]:
    """Model and processor of one of KINDS."""
    return qwen() if kind == "qwen" else idefics(kind)


def save(folder: Path, kind: str) -> Path:
    """A folder as transformers write it, with processor and refiner template."""
    model, processor = vlm(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    TEMPLATE.write(folder / "refiner_template.json")
    return folder
