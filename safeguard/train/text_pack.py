"""Turns a trained text classifier into a model pack: ONNX, int8, checked against the model that it came from.

Weights of linear layers become int8 per output channel, activations int8 at run time. Two parts are sensitive
and keep float32 activations, with weights still int8: the word embeddings have a scale per word (one for the
whole table loses too much), and so do the outputs of the feed-forward layers, whose inputs (after GELU) have
outliers that one scale for all activations cannot hold. Both are written as Cast and Mul.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.errors import MissingExtra
from safeguard.packs import seal
from safeguard.train.classifier import (
    ClassifierConfig,
    TextHeads,
    build_model,
    read_trunk_tokenizer,
    row_scales,
)
from safeguard.train.text_data import HEADS, LABELS

try:
    import onnx
    import torch
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from torch import Tensor, nn
except ImportError as exc:
    raise MissingExtra(exc.name or "onnx", "export") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.manifest import Manifest

OPSET = 23
_TOLERANCE = 2e-3  # of logits, ONNX fp32 against torch fp32


class RowScaledEmbedding(nn.Module):  # type: ignore[misc]  # torch is not followed
    """An embedding table in int8 with one scale per row."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        scales = row_scales(table)
        self.register_buffer("weight", torch.round(table / scales).to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table for integer ids, float32."""
        rows: Tensor = self.weight[ids].to(torch.float32)
        return rows * self.scales[ids]


class RowScaledLinear(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A linear layer with weights in int8, one scale per output, and float32 activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = row_scales(weight)
        self.register_buffer("weight", torch.round(weight / scales).to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(x, self.weight.to(torch.float32) * self.scales, self.bias)


def _narrow_sensitive(model: TextHeads) -> None:
    """Puts row-scaled int8 weights into the sensitive parts of a BERT-like trunk, in place."""
    embeddings: Any = model.trunk.embeddings
    embeddings.word_embeddings = RowScaledEmbedding(embeddings.word_embeddings.weight.detach())
    for module in list(model.trunk.modules()):
        dense = getattr(module, "dense", None)
        if isinstance(dense, nn.Linear) and dense.in_features > dense.out_features:
            module.dense = RowScaledLinear(dense)


def export_float(model: TextHeads, path: Path, *, narrow: bool = True) -> None:
    """Writes the model as ONNX: input_ids, attention_mask (batch, token) int64 -> logits (batch, label).

    narrow: the sensitive parts get int8 weights (in place); what remains is for `quantise`.

    Raises ValueError when ONNX Runtime does not agree with torch on padded batches of other shapes.
    """
    model = model.eval()
    if narrow:
        _narrow_sensitive(model)
    ids, mask = _example(3, 11)
    batch, tokens = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("token", min=2, max=512)
    torch.onnx.export(
        model,
        (ids, mask),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}),
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = open_session(path)
    for rows, length in ((1, 7), (5, 29)):
        ids, mask = _example(rows, length)
        with torch.no_grad():
            wanted = model(ids, mask).numpy()
        got = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        worst = float(np.abs(got - wanted).max())
        if not worst < _TOLERANCE:
            raise ValueError(
                f"ONNX and torch disagree by {worst:.2g} on logits {wanted.shape}, tolerance {_TOLERANCE}"
            )


def _example(rows: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    ids = torch.randint(5, 100, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[rows // 2, length // 2 :] = 0
    return ids, mask


def quantise(source: Path, target: Path, *, keep: Sequence[str] = ()) -> None:
    """Dynamic int8 of all linear layers, per channel; `keep` names nodes that stay float32."""
    model = onnx.load(source)
    del model.graph.value_info[:]  # the exporter's shapes are stale to the quantiser
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        onnx.save(model, plain)
        quantize_dynamic(
            plain,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=list(keep),
        )


def open_session(path: Path, threads: int = 1) -> InferenceSession:
    """An ONNX Runtime session on the CPU."""
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def write_text_pack(
    run: Path,
    out: Path,
    fields: dict[str, Any],
    config: ClassifierConfig,
    *,
    keep: Sequence[str] = (),
) -> Manifest:
    """Exports, quantises and seals the model of a run as a pack in `out`.

    fields: what the manifest says beyond what is fixed here (name, version, license, data, ...).
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export_float(build_model(run, config), plain)
        quantise(plain, out / "model.onnx", keep=keep)
    read_trunk_tokenizer(run).save(str(out / "tokenizer.json"), pretty=False)
    fixed: dict[str, Any] = {
        "kind": "text_classifier",
        "model": {"file": "model.onnx", "inputs": ["input_ids", "attention_mask"], "outputs": ["logits"]},
        "labels": list(LABELS),
        "heads": {head: list(labels) for head, labels in HEADS.items()},
        "activation": "sigmoid",
        "window": {"tokens": config.max_tokens, "overlap": config.max_tokens // 4},
        "precision": "int8-dynamic",
    }
    return seal(out, {**fixed, **fields})


def session_logits(
    session: InferenceSession, examples: Sequence[Sequence[int]], *, isolated: bool = True
) -> NDArray[np.float32]:
    """Logits (text, label) of tokenised texts, one run each, as the guard runs int8 models."""
    del isolated
    rows = []
    for ids in examples:
        array = np.array([ids], np.int64)
        rows.append(
            session.run(["logits"], {"input_ids": array, "attention_mask": np.ones_like(array)})[0][0]
        )
    return np.array(rows, np.float32)
