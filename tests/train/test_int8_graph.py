from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import BertConfig, BertModel

from safeguard.exporters.optimise import quantise
from safeguard.train.classifier import TextHeads
from safeguard.train.int8_graph import rewrite
from safeguard.train.text_pack import export_float, open_session

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations


def classifier(pooling: str) -> TextHeads:
    """96 wide, three heads; all weights differ, since the exporter folds or merges tiny and equal ones."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=120,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        max_position_embeddings=64,
    )
    model: TextHeads = TextHeads(BertModel(config, add_pooling_layer=False), 5, pooling=pooling).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            middle = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            weight.copy_(middle + 0.1 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wide.onnx`, a small random classifier with row-scaled parts, and `int8.onnx`, the same quantised."""
    folder = tmp_path_factory.mktemp("graphs")
    export_float(classifier("mean"), folder / "wide.onnx")
    quantise(folder / "wide.onnx", folder / "int8.onnx")
    return folder


def logits(path: Path, ids: Any, mask: Any) -> Any:
    return open_session(path).run(None, {"input_ids": ids, "attention_mask": mask})[0]


def batch(rows: int, length: int) -> tuple[Any, Any]:
    ids = np.random.default_rng(rows * 100 + length).integers(5, 40, (rows, length))
    return ids, np.ones_like(ids)


@pytest.mark.parametrize("activations", ["run", "token"])
@pytest.mark.parametrize("shape", [(1, 2), (1, 9), (3, 7)])
def test_the_new_graph_comes_as_near_to_float_as_the_old_one(
    folder: Path, tmp_path: Path, activations: Any, shape: tuple[int, int]
) -> None:
    rewrite(folder / "int8.onnx", tmp_path / "new.onnx", activations=activations)
    given = batch(*shape)
    wide = logits(folder / "wide.onnx", *given)

    off = np.abs(logits(tmp_path / "new.onnx", *given) - wide).max()

    # int8 steps are 1/127 of the largest value; a wrong layer, bias or mask is off by the size of the logits
    assert off < 0.1 * max(1.0, float(np.abs(wide).max()))


def test_scales_per_token_keep_padding_out(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "int8.onnx", tmp_path / "new.onnx", activations="token")
    ids, mask = batch(1, 6)
    padded = np.concatenate([ids, np.full((1, 3), 39)], axis=1)
    longer = np.concatenate([mask, np.zeros((1, 3), np.int64)], axis=1)

    alone, with_padding = (
        logits(tmp_path / "new.onnx", ids, mask),
        logits(tmp_path / "new.onnx", padded, longer),
    )

    np.testing.assert_allclose(with_padding, alone, atol=1e-2)


def test_scales_per_token_keep_neighbours_out(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "int8.onnx", tmp_path / "new.onnx", activations="token")
    ids, mask = batch(4, 6)

    together = logits(tmp_path / "new.onnx", ids, mask)

    alone = logits(tmp_path / "new.onnx", ids[2:3], mask[2:3])
    np.testing.assert_allclose(together[2:3], alone, rtol=0, atol=1e-5)


def test_scales_per_token_keep_neighbours_out_of_padded_rows(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "int8.onnx", tmp_path / "new.onnx", activations="token")
    ids, mask = batch(5, 8)
    mask[1, 5:] = 0
    mask[3, 7:] = 0

    together = logits(tmp_path / "new.onnx", ids, mask)

    alone = logits(tmp_path / "new.onnx", ids[1:2], mask[1:2])
    np.testing.assert_allclose(together[1:2], alone, rtol=0, atol=1e-5)


def test_one_zero_of_activations_serves_all_layers(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "int8.onnx", tmp_path / "new.onnx", activations="token")
    nodes = onnx.load(tmp_path / "new.onnx").graph.node

    zeros = [node.input[2] for node in nodes if node.op_type == "QuantizeLinear" and len(node.input) == 3]

    assert len(zeros) == 6  # two layers with three such products each
    assert len(set(zeros)) == 1


def test_no_weight_is_kept_in_float(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "int8.onnx", tmp_path / "new.onnx")
    model = onnx.load(tmp_path / "new.onnx")
    matrices = [i for i in model.graph.initializer if len(i.dims) == 2 and min(i.dims) > 1]
    kinds = {tuple(i.dims): i.data_type for i in matrices}
    hidden = next(i.dims[1] for i in matrices if i.data_type == onnx.TensorProto.INT8)

    # in float stay only the table of places and the head, (places, hidden) and (hidden, labels)
    floats = [dims for dims, kind in kinds.items() if kind == onnx.TensorProto.FLOAT]
    assert len(floats) == 2
    assert all(hidden in dims for dims in floats)


def test_only_standard_operators_are_used(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "int8.onnx", tmp_path / "new.onnx")
    model = onnx.load(tmp_path / "new.onnx")

    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)


def test_a_graph_that_is_not_quantised_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no int8 layer of this graph, so it cannot be written anew"):
        rewrite(folder / "wide.onnx", tmp_path / "new.onnx")
    assert not (tmp_path / "new.onnx").exists()


def test_unknown_activations_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activations must be run or token, got 'batch'"):
        rewrite(folder / "int8.onnx", tmp_path / "new.onnx", activations="batch")  # type: ignore[arg-type]


def test_a_model_that_looks_at_its_first_token_only_is_refused(folder: Path, tmp_path: Path) -> None:
    export_float(classifier("cls"), tmp_path / "wide.onnx")
    quantise(tmp_path / "wide.onnx", tmp_path / "int8.onnx")

    with pytest.raises(ValueError, match="does not score the mean of its tokens"):
        rewrite(tmp_path / "int8.onnx", tmp_path / "new.onnx")
