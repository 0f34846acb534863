"""Smaller and faster ONNX files from an exported one: int8 weights, and fused layers for onnxruntime."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from safeguard.backends.onnx import external_files
from safeguard.errors import MissingExtra

try:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
except ImportError as exc:
    raise MissingExtra(exc.name or "onnxruntime", "export") from exc


def quantise(source: Path, target: Path, *, keep: Sequence[str] = ()) -> None:
    """Dynamic int8 of all linear layers, weights per output channel; `keep` names nodes that stay float32.

    Always per channel: one scale for a whole matrix costs as much time and loses a quarter of the nearest
    neighbours of MiniLM, a scale per channel a tenth.
    """
    model = onnx.load(str(source))
    del model.graph.value_info[:]  # the exporter's shapes are stale to the quantiser
    large = bool(external_files(source))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, _quiet():
        plain = Path(folder) / "plain.onnx"
        onnx.save(model, str(plain), save_as_external_data=large)
        quantize_dynamic(
            plain,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],  # of `Attention` it would make a node that cannot load
            nodes_to_exclude=[*keep, *(f"{name}_MatMul" for name in keep)],  # what a Gemm is renamed to first
            use_external_data_format=large,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # behind onnxruntime's own operators
        )


def fuse(source: Path, target: Path, *, heads: int, hidden: int) -> dict[str, int]:
    """Fuses layers of a BERT-like graph into onnxruntime's own operators; gives how many of each.

    Only onnxruntime reads the result. What it does at load time anyway is done once and for all; attention
    stays as it was exported, since the fusion does not know these graphs.
    """
    from onnxruntime.transformers import optimizer

    with _quiet(), redirect_stdout(io.StringIO()):  # it prints what it could not infer
        found = optimizer.optimize_model(
            str(source), model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=0
        )
        found.save_model_to_file(str(target), use_external_data_format=bool(external_files(source)))
    return {name: count for name, count in found.get_fused_operator_statistics().items() if count}


def downstream(path: Path, tensor: str) -> list[str]:
    """Names of the nodes that compute from a tensor, directly or not."""
    reached, names = {tensor}, []
    for node in onnx.load(str(path), load_external_data=False).graph.node:  # in topological order
        if reached & set(node.input):
            reached |= set(node.output)
            names.append(node.name)
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime's tools say to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
