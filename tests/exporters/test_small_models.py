from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("onnxscript", reason="needs onnxscript")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from safeguard.backends import open_backend  # noqa: E402
from safeguard.errors import ExportError  # noqa: E402
from safeguard.exporters.small_models import export_module  # noqa: E402
from safeguard.packs import read_pack  # noqa: E402

Module: Any = torch.nn.Module


class Value(Module):  # type: ignore[misc]  # torch is untyped
    """How good each next token is: hidden (batch, width), tokens (batch, token) -> (batch, token)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 4)

    def forward(self, hidden: Any, tokens: Any) -> Any:
        return torch.einsum("bh,bth->bt", torch.tanh(self.head(hidden)), self.table(tokens))


class Growing(Module):  # type: ignore[misc]  # torch is untyped
    """Asks its input how often to go on, which no graph can say."""

    def forward(self, hidden: Any) -> Any:
        while hidden.sum() < 10:
            hidden = hidden + 1
        return hidden


EXAMPLE = {"hidden": torch.zeros(2, 4), "tokens": torch.arange(6).reshape(2, 3)}
AXES = {"hidden": {0: "batch"}, "tokens": {0: "batch", 1: "token"}}


def test_a_value_model_says_the_same_from_its_pack(tmp_path: Path) -> None:
    module = Value()
    manifest = export_module(
        module, tmp_path / "out", inputs=EXAMPLE, outputs=["value"], dynamic=AXES, fields={"name": "value"}
    )
    pack = read_pack(tmp_path / "out").verify().expect("module")
    assert (manifest.name, manifest.model.inputs) == ("value", ("hidden", "tokens"))
    run = open_backend(pack.model, inputs=manifest.model.inputs, outputs=manifest.model.outputs)
    hidden, tokens = torch.randn(1, 4), torch.tensor([[6, 0, 3, 3, 1]])
    found = run({"hidden": hidden.numpy(), "tokens": tokens.numpy()})["value"]
    np.testing.assert_allclose(found, module(hidden, tokens).detach().numpy(), atol=1e-5)


def test_a_module_that_no_graph_can_say_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Growing cannot be exported"):
        export_module(Growing(), tmp_path / "out", inputs={"hidden": torch.zeros(2, 4)}, outputs=["out"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be float32 or float16, got 'int8'"):
        export_module(Value(), tmp_path, inputs=EXAMPLE, outputs=["value"], dtype="int8")  # type: ignore[arg-type]
