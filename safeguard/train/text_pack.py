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
from safeguard.exporters.narrow import RowScaledEmbedding, RowScaledLinear
from safeguard.exporters.optimise import quantise
from safeguard.exporters.text_classifier import write_token_graph
from safeguard.files import replaced
from safeguard.packs import seal
from safeguard.train.classifier import (
    ClassifierConfig,
    TextHeads,
    build_model,
    read_trunk_tokenizer,
)
from safeguard.train.int8_graph import Activations, rewrite
from safeguard.train.text_data import HEADS, LABELS

try:
    import torch
    from onnxruntime import InferenceSession
    from torch import Tensor, nn
except ImportError as exc:
    raise MissingExtra(exc.name or "onnx", "export") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.manifest import Manifest

OPSET = 23
_TOLERANCE = 2e-3  # of logits, ONNX fp32 against torch fp32


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
    write_token_graph(model, path, model.trunk.config.vocab_size, 512, flavour="native", opset=OPSET)
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
    activations: Activations | None = None,
) -> Manifest:
    """Exports, quantises and seals the model of a run as a pack in `out`.

    fields: what the manifest says beyond what is fixed here (name, version, license, data, ...). activations:
    the graph is written anew with the same weights, see `int8_graph.rewrite`; None leaves it as quantised. So
    does `keep`, and pooling by the first token.
    """
    out.mkdir(parents=True, exist_ok=True)
    plain_graph = activations is None or bool(keep) or config.pooling != "mean"
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export_float(build_model(run, config), plain)
        with replaced(out / "model.onnx") as part:
            narrow = part if plain_graph else Path(folder) / "int8.onnx"
            quantise(plain, narrow, keep=keep)
            if narrow != part:
                rewrite(narrow, part, activations=activations or "run")
    with replaced(out / "tokenizer.json") as part:
        read_trunk_tokenizer(run).save(str(part), pretty=False)
    fixed: dict[str, Any] = {
        "kind": "text_classifier",
        "model": {"file": "model.onnx", "inputs": ["input_ids", "attention_mask"], "outputs": ["logits"]},
        "labels": list(LABELS),
        "heads": {head: list(labels) for head, labels in HEADS.items()},
        "activation": "sigmoid",
        "window": {"tokens": config.max_tokens, "overlap": config.max_tokens // 4},
        "precision": "int8-dynamic",
        "separate_rows": activations == "token" and not plain_graph,
    }
    return seal(out, {**fixed, **fields})


def session_logits(session: InferenceSession, examples: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Logits (text, label) of tokenised texts, one run each."""
    rows = []
    for ids in examples:
        array = np.array([ids], np.int64)
        rows.append(
            session.run(["logits"], {"input_ids": array, "attention_mask": np.ones_like(array)})[0][0]
        )
    return np.array(rows, np.float32)
