from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
pytest.importorskip("torch", reason="torch is not installed (extra export)")

import onnx
import onnxruntime as ort
import torch

from safeguard.errors import ExportError
from safeguard.exporters.graph import choose_opset, evaluating, export_graph, operators

ROWS = {"x": {0: "batch"}}


class Attend(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """Scaled dot product attention of a tensor with itself, plus half of another."""

    def forward(self, x: Any, y: Any) -> dict[str, Any]:
        heads = x[:, None]  # (batch, head, time, dim)
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)[:, 0]
        return {"unused": x, "mixed": mixed + y / 2}


class Eigen(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    def forward(self, x: Any) -> Any:
        return torch.linalg.eigvals(x @ x.T).real


class Branch(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else x * 2


class Fixed(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    def forward(self, x: Any) -> Any:
        return x + torch.ones(3, 2)


class Doubled(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: Any) -> Any:
        return self.drop(x) * 2


def export_attend(path: Path, **options: Any) -> None:
    shared = torch.rand(3, 5, 8)
    axes = {0: "batch", 1: "time"}
    export_graph(
        Attend(),
        path,
        inputs={"x": shared, "y": shared},  # the same object twice, which torch alone makes one input of
        outputs=["mixed"],
        dynamic={"x": axes, "y": axes},
        **options,
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "m.onnx"
    export_attend(path)
    return path


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decomposed") / "m.onnx"
    export_attend(path, flavour="decomposed")
    return path


def run(path: Path, **feeds: Any) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def test_native_graph_has_attention_as_one_operator(native: Path) -> None:
    assert operators(native)["Attention"] == 1
    assert onnx.load(native).opset_import[0].version == 23


def test_decomposed_graph_has_none(decomposed: Path) -> None:
    found = operators(decomposed)
    assert "Attention" not in found
    assert found["Softmax"] == 1
    assert onnx.load(decomposed).opset_import[0].version == 20


@pytest.mark.parametrize("flavour", ["native", "decomposed"])
def test_one_example_tensor_given_twice_still_makes_two_inputs(
    flavour: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(flavour)
    x, y = (np.random.default_rng(i).standard_normal((2, 7, 8)).astype(np.float32) for i in (0, 1))
    wanted = Attend()(torch.from_numpy(x), torch.from_numpy(y))["mixed"].numpy()

    assert run(path, x=x, y=y) == pytest.approx(wanted, abs=1e-5)


def test_dimensions_have_the_names_given(native: Path) -> None:
    dims = onnx.load(native).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", "time", 8]


def test_file_says_nothing_of_source_lines(native: Path) -> None:
    data = native.read_bytes()
    assert b"stack_trace" not in data
    assert b".py" not in data


def test_operator_without_a_form_in_onnx_is_named_with_the_model(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"Eigen cannot be exported: operator aten\.linalg_eig: ONNX has no"
    ) as e:
        export_graph(
            Eigen(), tmp_path / "m.onnx", inputs={"x": torch.rand(4, 4)}, outputs=["y"], dynamic=ROWS
        )
    assert (e.value.model, e.value.operator) == ("Eigen", "aten.linalg_eig")


def test_branch_on_data_is_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Branch cannot be exported: .*data-dependent"):
        export_graph(
            Branch(), tmp_path / "m.onnx", inputs={"x": torch.rand(4, 4)}, outputs=["y"], dynamic=ROWS
        )


def test_axis_that_the_model_fixes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Fixed cannot be exported: .*"):
        export_graph(
            Fixed(), tmp_path / "m.onnx", inputs={"x": torch.rand(3, 2)}, outputs=["y"], dynamic=ROWS
        )


def test_example_of_one_row_is_refused_since_it_would_become_a_constant(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"example of 'x' must be 2 or more along axis 0 \(batch\), got \(1, 2\)"
    ):
        export_graph(
            Fixed(), tmp_path / "m.onnx", inputs={"x": torch.rand(1, 2)}, outputs=["y"], dynamic=ROWS
        )


def test_dynamic_axis_of_an_unknown_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no input named 'x' for a dynamic axis; inputs: z"):
        export_graph(
            Fixed(), tmp_path / "m.onnx", inputs={"z": torch.rand(3, 2)}, outputs=["y"], dynamic=ROWS
        )


def test_module_in_training_is_exported_for_inference_and_left_in_training(tmp_path: Path) -> None:
    module = Doubled().train()
    export_graph(module, tmp_path / "m.onnx", inputs={"x": torch.rand(3, 2)}, outputs=["y"], dynamic=ROWS)
    assert module.training
    assert module.drop.training
    assert run(tmp_path / "m.onnx", x=np.ones((1, 2), np.float32)).tolist() == [[2.0, 2.0]]


def test_evaluating_restores_each_part_as_it_was() -> None:
    module = Doubled().train()
    module.drop.eval()
    with evaluating(module):
        assert not module.training
    assert (module.training, module.drop.training) == (True, False)


@pytest.mark.parametrize(
    ("flavour", "opset", "message"),
    [
        ("native", 20, "a native graph needs an opset from 23 to 24, got 20"),
        ("decomposed", 23, "a decomposed graph needs an opset from 18 to 22, got 23"),
        ("decomposed", 11, "a decomposed graph needs an opset from 18 to 22, got 11"),
        ("fast", None, "flavour must be native or decomposed, got 'fast'"),
    ],
)
def test_opset_that_the_flavour_cannot_have_is_refused(flavour: Any, opset: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_opset(flavour, opset)
