"""Real model packs that are small enough to be made in a test, with answers that can be worked out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from safeguard.packs import seal

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "rude", "naked", "good", "day"]
HIGH = 1 / (1 + np.exp(-4.0))
"""Score of a text with the word `rude` or `naked`: sigmoid(4)."""
LOW = 1 / (1 + np.exp(4.0))
"""Score of any other text: sigmoid(-4)."""


def rude_pack(folder: Path) -> Path:
    """A text classifier with the label `toxic`, whose logit is 4 for a text with `rude` or `naked`, -4 for
    others.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "rude": np.array(WORDS.index("rude"), np.int64),
        "naked": np.array(WORDS.index("naked"), np.int64),
        "axis": np.array([1], np.int64),
        "eight": np.array(8, np.float32),
        "four": np.array(4, np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["input_ids", "attention_mask"], ["ids"]),
            helper.make_node("Equal", ["ids", "rude"], ["is_rude"]),
            helper.make_node("Equal", ["ids", "naked"], ["is_naked"]),
            helper.make_node("Or", ["is_rude", "is_naked"], ["hit"]),
            helper.make_node("Cast", ["hit"], ["hits"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["hits", "axis"], ["found"], keepdims=1),
            helper.make_node("Mul", ["found", "eight"], ["scaled"]),
            helper.make_node("Sub", ["scaled", "four"], ["logits"]),
        ],
        "rude",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "time"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    _tokenizer().save(str(folder / "tokenizer.json"))
    seal(folder, _fields("text_classifier") | {"window": {"tokens": 16, "overlap": 4}})
    return folder


def refiner_pack(folder: Path) -> Path:
    """A pack that is no check: the same files, called a refiner."""
    rude_pack(folder)
    seal(folder, _fields("refiner"), files=["model.onnx"])
    return folder


def _fields(kind: str) -> dict[str, object]:
    return {
        "name": "rude-words",
        "version": "1",
        "kind": kind,
        "model": {"file": "model.onnx", "inputs": ["input_ids", "attention_mask"], "outputs": ["logits"]},
        "labels": ["toxic"],
        "license": "none",
    }


def _tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return made


def red_pack(folder: Path) -> Path:
    """A tower with one head, `red`: the embedding is the mean of each channel, the logit 8 * red - 4."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from safeguard.checks.clip_heads import HEADS_NAME, Perceptron, write_heads

    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["pixel_values", "axes"], ["image_embeds"], keepdims=0)],
        "red",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array([2, 3], np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    head = Perceptron("red", np.array([[1.0, 0.0, 0.0]]), np.zeros(1), np.array([8.0]), -4.0)
    write_heads(folder / HEADS_NAME, [head])
    fields = _fields("clip_heads") | {
        "name": "red-heads",
        "model": {"file": "model.onnx", "inputs": ["pixel_values"], "outputs": ["image_embeds"]},
        "labels": ["red"],
        "image": {"size": 16, "resize": 16},
    }
    seal(folder, fields)
    return folder
