"""Tiny ONNX graphs with answers that can be worked out, written without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Expected = Callable[[Any, Any], Any]


def bag_of_words(
    path: Path, *, half: bool = False, change: Callable[[Any], None] | None = None
) -> tuple[Path, Expected]:
    """Sum of the embeddings under the mask, times a matrix: logits (batch, 3); and the same in numpy.

    half: weights and products in float16. change: applied to the graph before it is saved.
    """
    from onnx import TensorProto, helper, numpy_helper, save

    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    rng = np.random.default_rng(0)
    table, weight = rng.normal(size=(50, 16)).astype(dtype), rng.normal(size=(16, 3)).astype(dtype)
    constants = {"table": table, "weight": weight, "one": np.array([1]), "two": np.array([2])}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="lookup"),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=kind, name="cast_mask"),
        helper.make_node("Unsqueeze", ["kept", "two"], ["weights"], name="widen"),
        helper.make_node("Mul", ["x", "weights"], ["masked"], name="apply_mask"),
        helper.make_node("ReduceSum", ["masked", "one"], ["pooled"], keepdims=0, name="pool"),
        helper.make_node("MatMul", ["pooled", "weight"], ["logits"], name="classify"),
    ]
    graph = helper.make_graph(
        nodes,
        "bag_of_words",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", kind, ["batch", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    if change is not None:
        change(graph)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))

    def expected(ids: Any, mask: Any) -> Any:
        return (table[ids] * mask[..., None]).sum(axis=1) @ weight

    return path, expected
