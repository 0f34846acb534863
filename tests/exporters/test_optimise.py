from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from safeguard.exporters.graph import operators
from safeguard.exporters.optimise import downstream, fuse, quantise

WEIGHT = np.array([[1.0, 100.0], [-0.5, 60.0]], np.float32)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """x (batch, 2) -> first = x @ WEIGHT, second = first @ WEIGHT; one column is 100 times larger."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["first"], name="one"),
            helper.make_node("MatMul", ["first", "w"], ["second"], name="two"),
        ],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2]) for n in ("first", "second")],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "plain.onnx"))
    return tmp_path / "plain.onnx"


def run(path: Path, x: Any) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})


def test_each_output_channel_has_a_scale_of_its_own(plain: Path, tmp_path: Path) -> None:
    quantise(plain, tmp_path / "int8.onnx")
    first, _ = run(tmp_path / "int8.onnx", np.array([[1.0, 1.0]], np.float32))
    # 1 - 0.5 to within a step of the small column; with one scale for both (100 / 127) it would be 0.787
    assert first[0, 0] == pytest.approx(0.5, abs=0.02)


def test_nodes_to_keep_stay_float32(plain: Path, tmp_path: Path) -> None:
    quantise(plain, tmp_path / "int8.onnx", keep=downstream(plain, "first"))
    found = operators(tmp_path / "int8.onnx")
    assert (found["MatMulInteger"], found["MatMul"]) == (1, 1)


def test_downstream_names_what_computes_from_a_tensor(plain: Path) -> None:
    assert downstream(plain, "x") == ["one", "two"]
    assert downstream(plain, "first") == ["two"]
    assert downstream(plain, "second") == []


def test_quantising_leaves_only_its_result(plain: Path, tmp_path: Path) -> None:
    quantise(plain, tmp_path / "int8.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"plain.onnx", "int8.onnx"}


def test_fused_gelu_gives_the_same(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Add", ["a", "bias"], ["b"]),
            helper.make_node("Gelu", ["b"], ["y"]),
        ],
        "gelu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(WEIGHT / 100, "w"),
            numpy_helper.from_array(np.array([0.1, -0.2], np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, str(tmp_path / "gelu.onnx"))

    fused = fuse(tmp_path / "gelu.onnx", tmp_path / "fused.onnx", heads=1, hidden=2)

    assert fused == {"BiasGelu": 1}
    x = np.array([[1.0, -3.0], [0.5, 2.0]], np.float32)
    assert run(tmp_path / "fused.onnx", x)[0] == pytest.approx(run(tmp_path / "gelu.onnx", x)[0], abs=1e-6)
