from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from safeguard.checks.text_classifier import TextClassifier
from safeguard.evaluate.card import card_metrics
from safeguard.evaluate.text_guard import make_text_guard
from safeguard.exporters.narrow import RowScaledEmbedding, RowScaledLinear
from safeguard.exporters.optimise import quantise
from safeguard.packs import resolve
from safeguard.train.classifier import ClassifierConfig, TextHeads, load_model, train_classifier
from safeguard.train.text_data import JUDGED, LABELS, Row, clean
from safeguard.train.text_guard import build_text_guard, flips, sources, write_card
from safeguard.train.text_pack import export_float, open_session
from tests.train.tiny_text import write_pack, write_trunk

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClassifierConfig:
    trunk = write_trunk(tmp_path_factory.mktemp("trunk"))
    return ClassifierConfig(
        trunk=str(trunk),
        steps=3,
        tokens_per_batch=256,
        max_tokens=24,
        hard_texts=False,
        precision="no",
        head_learning_rate=0.01,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(config: ClassifierConfig, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_classifier(config, data, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def pack(config: ClassifierConfig, data: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    build_text_guard(run, data, folder, config, name="tiny-guard")
    return folder


def test_row_scaled_embedding_is_within_half_a_step_of_each_row() -> None:
    # the largest entry of a row is 127 steps, so no entry is off by more than 1/254 of it
    table = torch.tensor([[1.0, -0.5, 0.301], [100.0, 3.0, -7.0]])
    found = RowScaledEmbedding(table)(torch.tensor([0, 1]))
    assert bool(((found - table).abs() <= table.abs().amax(1, keepdim=True) / 254 + 1e-6).all())


def test_row_scaled_linear_is_close_to_the_layer_that_it_replaces() -> None:
    linear = torch.nn.Linear(2, 1)
    linear.weight.data = torch.tensor([[1.0, -0.3]])
    linear.bias.data = torch.tensor([0.5])
    # -0.3 is 38.1 steps of 1/127, stored as 38: 127/127 - 38/127 + .5
    found = RowScaledLinear(linear)(torch.ones(1, 2))
    assert float(found) == pytest.approx(1 - 38 / 127 + 0.5)


def test_export_agrees_with_torch_on_other_shapes(config: ClassifierConfig, tmp_path: Path) -> None:
    model, _ = load_model(config)
    export_float(model, tmp_path / "m.onnx", narrow=False)
    ids = torch.randint(5, 60, (4, 13))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    got = open_session(tmp_path / "m.onnx").run(
        ["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    )[0]
    with torch.no_grad():
        assert got == pytest.approx(model.eval()(ids, mask).numpy(), abs=1e-4)


def test_quantised_model_is_close_and_has_the_same_shape(config: ClassifierConfig, tmp_path: Path) -> None:
    model, _ = load_model(config)
    export_float(model, tmp_path / "wide.onnx")
    quantise(tmp_path / "wide.onnx", tmp_path / "narrow.onnx")
    ids = np.array([[5, 6, 7, 8]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    wide, narrow = (
        open_session(tmp_path / f"{n}.onnx").run(["logits"], feeds)[0] for n in ("wide", "narrow")
    )
    assert narrow.shape == wide.shape == (1, len(LABELS))
    assert np.abs(narrow - wide).max() < 0.1


def test_pooling_by_the_first_token_ignores_the_others() -> None:
    class Fixed(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        config = type("C", (), {"hidden_size": 2})

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            hidden = torch.arange(input_ids.numel() * 2, dtype=torch.float32).reshape(*input_ids.shape, 2)
            return type("Out", (), {"last_hidden_state": hidden})

    model = TextHeads(Fixed(), 1, pooling="cls").eval()
    mean = TextHeads(Fixed(), 1, pooling="mean").eval()
    for m in (model, mean):
        torch.nn.init.ones_(m.head.weight)
        torch.nn.init.zeros_(m.head.bias)
    ids, mask = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]])
    # states (0, 1), (2, 3), (4, 5): the first sums to 1; the mean of the first two is (1, 2), which sums to 3
    assert float(model(ids, mask)) == 1.0
    assert float(mean(ids, mask)) == 3.0


def test_pack_verifies_and_loads_by_its_folder(pack: Path) -> None:
    check = TextClassifier.load(resolve(pack))
    assert set(JUDGED) <= set(check.labels)
    assert check.operating_points.keys() == {"lenient", "standard", "strict"}


def test_points_grow_stricter(pack: Path) -> None:
    points = TextClassifier.load(pack).operating_points
    assert all(points["lenient"][c] >= points["standard"][c] >= points["strict"][c] for c in JUDGED)


def test_pack_has_a_tokenizer_that_cuts_nothing(pack: Path) -> None:
    text = (pack / "tokenizer.json").read_text(encoding="utf-8")
    assert '"truncation":null' in text
    assert '"padding":null' in text


def test_pack_names_every_source_and_licence(pack: Path, data: Path) -> None:
    manifest = resolve(pack).manifest
    named = {source.name for source in manifest.data}
    assert {"dghs_v0.1", "coprov2_train", "malicious_instruct"} <= named
    assert all(source.license for source in manifest.data)
    assert named == {source["name"] for source in sources(data)}


def test_only_a_graph_with_a_scale_for_each_token_says_that_its_rows_are_separate(pack: Path) -> None:
    # the pack of these tests has the exporter's own graph, the shipped one was written with a scale per token
    assert not resolve(pack).manifest.separate_rows
    assert resolve("text-guard-s").manifest.separate_rows


def test_flips_are_shares(pack: Path, run: Path, config: ClassifierConfig) -> None:
    rows = [
        Row("a kind cat", "s", "validation", clean("toxicity")),
        Row("a dog", "s", "validation", clean("t2i")),
    ]
    found = flips(run, pack, config, rows)
    assert found.keys() == set(JUDGED)
    assert all(0 <= share <= 1 for share in found.values())


def test_card_and_metrics_become_part_of_the_pack(pack: Path, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pack, tmp_path / "pack"))
    metrics = card_metrics(TextClassifier.load(copy), data, evasion_texts=2)
    write_card(copy, metrics)
    found = resolve(copy)
    assert {"README.md", "metrics.json", "model.onnx", "tokenizer.json"} == found.manifest.files.keys()
    assert found.path("README.md").read_text(encoding="utf-8").startswith("# tiny-guard 1.0.0")


def test_one_call_makes_the_pack_with_its_card(run: Path, data: Path, tmp_path: Path) -> None:
    goals = make_text_guard(
        run, data, tmp_path / "made", name="tiny-guard", version="2.0.0", activations=None
    )
    manifest = resolve(tmp_path / "made").manifest
    assert (manifest.name, manifest.version) == ("tiny-guard", "2.0.0")
    assert {"README.md", "metrics.json"} <= manifest.files.keys()
    assert any("CoProV2" in goal.what for goal in goals)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]  # nothing else is left


def test_a_pack_is_never_written_over(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="give a new folder"):
        make_text_guard(run, data, tmp_path)
