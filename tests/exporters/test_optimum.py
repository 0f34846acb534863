from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
pytest.importorskip("transformers", reason="transformers is not installed (extra export)")

from safeguard.checks import hub
from safeguard.checks.loading import load_check
from safeguard.errors import ExportError, PackError
from safeguard.exporters import optimum
from safeguard.exporters.text_classifier import write_token_graph
from safeguard.packs import resolve
from tests.exporters.tiny import WINDOW, classifier, tokenizer

TEXTS = ["w1 w2 w3", "w7 " * 100]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with what optimum-cli writes (graph, config, tokenizer), and the model that it came from."""
    folder, weights = tmp_path_factory.mktemp("optimum") / "tiny-bert", tmp_path_factory.mktemp("weights")
    model = classifier("Bert", problem_type="single_label_classification")
    model.save_pretrained(weights)  # which writes the name of the class into the config
    for place in (folder, weights):
        tokenizer().save_pretrained(place)
        model.config.save_pretrained(place)
    write_token_graph(model, folder / "model.onnx", 60, WINDOW, flavour="decomposed", opset=18)
    return folder, weights


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | values), encoding="utf-8")


def test_folder_is_told_from_packs_and_from_weights(made: tuple[Path, Path]) -> None:
    assert optimum.is_optimum(made[0])
    assert not optimum.is_optimum(made[1])


def test_folder_scores_as_the_model_that_it_came_from(made: tuple[Path, Path]) -> None:
    wanted, found = hub.load(made[1])(TEXTS), optimum.load(made[0])(TEXTS)
    for one, other in zip(wanted, found, strict=True):
        assert other.scores == pytest.approx(one.scores, abs=1e-5)


def test_problem_type_becomes_the_activation(made: tuple[Path, Path], copy: Path) -> None:
    assert optimum.read_optimum(made[0]).activation == "softmax"
    change(copy / "config.json", problem_type="multi_label_classification")
    assert optimum.read_optimum(copy).activation == "sigmoid"


def test_converted_folder_is_a_pack_that_loads_by_its_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = optimum.convert(made[0], tmp_path / "out")
    assert (manifest.name, manifest.activation) == ("tiny-bert", "softmax")
    assert manifest.export is not None
    assert (manifest.export.exporter, manifest.export.source) == ("optimum", "BertForSequenceClassification")
    assert resolve(tmp_path / "out").manifest.files.keys() == {"model.onnx", "tokenizer.json"}
    check: Any = load_check(str(tmp_path / "out"))
    assert check(TEXTS)[1].scores == optimum.load(made[0])(TEXTS)[1].scores


def test_more_than_ten_labels_stay_in_their_order(copy: Path) -> None:
    change(copy / "config.json", id2label={str(i): f"kind {i}" for i in range(12)})
    assert optimum.read_optimum(copy).labels[9:] == (
        "kind 9",
        "kind 10",
        "kind 11",
    )  # not kind 1, kind 10, ...


def test_graph_that_gives_another_number_of_labels_is_refused(copy: Path, tmp_path: Path) -> None:
    change(copy / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(ExportError, match=r"gives logits \(1, 3\) for 1 texts and 2 labels"):
        optimum.convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", r"it has no tokenizer\.json; export again with a fast tokenizer"),
        ("config.json", r"it has no config\.json, so its labels have no names"),
        ("model.onnx", r"it must hold one model\.onnx, found: none"),
    ],
)
def test_missing_file_is_named(copy: Path, name: str, message: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ExportError, match=message):
        optimum.read_optimum(copy)


def test_labels_without_names_are_refused_unless_names_are_given(copy: Path) -> None:
    change(copy / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"})
    with pytest.raises(PackError, match="does not name its labels"):
        optimum.read_optimum(copy)
    assert optimum.read_optimum(copy, labels=["a", "b", "c"]).labels == ("a", "b", "c")


def test_config_that_is_no_object_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ExportError, match=r"its config\.json must hold a JSON object, got list"):
        optimum.read_optimum(copy)


def test_file_that_is_no_graph_is_refused(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"\x08 nothing")
    with pytest.raises(ExportError, match="onnxruntime cannot open it"):
        optimum.read_optimum(copy)


def test_exporting_via_optimum_without_it_says_why_it_is_not_there(tmp_path: Path) -> None:
    if optimum.find_optimum():
        pytest.skip("optimum-onnx is installed")
    with pytest.raises(ExportError, match=r"'optimum-onnx' is not installed; it pins transformers<4\.58"):
        optimum.export_via_optimum("owner/name", tmp_path / "out")


def test_policy_names_such_a_folder_as_a_check(made: tuple[Path, Path]) -> None:
    check: Any = load_check(f"optimum:{made[0]}")
    assert (check.name, check.digest) == ("tiny-bert", optimum.load(made[0]).digest)
    assert check(TEXTS)[0].scores == optimum.load(made[0])(TEXTS)[0].scores


def test_folder_that_is_none_is_named_by_the_check(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it is no folder"):
        load_check(f"optimum:{tmp_path / 'gone'}")
