from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
pytest.importorskip("transformers", reason="transformers is not installed (extra export)")

import torch

from safeguard.checks import hub
from safeguard.checks.loading import load_check
from safeguard.checks.text_classifier import TextClassifier
from safeguard.errors import ExportError, PackError, ParityError
from safeguard.exporters.graph import operators
from safeguard.exporters.text_classifier import (
    TextModel,
    check_text_graph,
    decisions,
    export_text_classifier,
    pack_name,
    read_text_model,
    text_model,
)
from safeguard.packs import resolve
from tests.exporters.tiny import LABELS, WINDOW, classifier, tokenizer

TEXTS = ["w1 w2 w3", "w9", "", "w7 " * 100, "w55 never seen w4"]


def source(kind: str = "Bert") -> TextModel:
    return text_model(classifier(kind), tokenizer(1 if kind == "Roberta" else 0), name=f"tiny-{kind}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them."""
    path = tmp_path_factory.mktemp("models") / "tiny-bert"
    classifier("Bert").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pack(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "native"
    export_text_classifier(read_text_model(folder), out)
    return out


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "int8"
    export_text_classifier(source(), out, dtype="int8", max_flips=0.05)
    return out


def test_export_scores_as_the_model_that_it_came_from(folder: Path, pack: Path) -> None:
    wanted, found = hub.load(folder)(TEXTS), TextClassifier.load(pack)(TEXTS)
    for one, other in zip(wanted, found, strict=True):
        assert other.scores == pytest.approx(one.scores, abs=1e-5)


def test_export_loads_by_its_folder_as_any_pack(pack: Path) -> None:
    check: Any = load_check(str(pack))
    assert check.name == "tiny-bert"
    assert check(["w1"])[0].scores.keys() == set(LABELS)


def test_manifest_says_how_it_was_made_and_how_far_it_is_off(pack: Path) -> None:
    record = resolve(pack).manifest.export
    assert record is not None
    assert (record.exporter, record.source) == ("torch.onnx", "BertForSequenceClassification")
    assert (record.opset, record.flavour, record.dtype) == (23, "native", "float32")
    assert "torch" in record.versions
    (logits,) = record.parity
    # one row, five padded rows twice, and one row of the whole window; three labels each
    assert logits.shapes == ((1, 3), (5, 3))
    assert (logits.rows, logits.decisions, logits.flips) == (12, 36, 0)
    assert logits.max_abs < 1e-4 < logits.scale


def test_pack_holds_model_tokenizer_and_manifest_only(pack: Path) -> None:
    assert {p.name for p in pack.iterdir()} == {"model.onnx", "tokenizer.json", "safeguard.json"}
    assert list(pack.parent.iterdir()) == [pack]


def test_native_pack_has_one_attention_a_layer(pack: Path) -> None:
    assert operators(pack / "model.onnx")["Attention"] == 2


def test_decomposed_pack_has_none_and_loads(tmp_path: Path, pack: Path) -> None:
    manifest = export_text_classifier(source(), tmp_path / "out", flavour="decomposed")
    assert manifest.export is not None
    assert manifest.export.opset == 20
    assert "Attention" not in operators(tmp_path / "out" / "model.onnx")
    wanted, found = TextClassifier.load(pack)(TEXTS), TextClassifier.load(tmp_path / "out")(TEXTS)
    assert found[0].scores == pytest.approx(wanted[0].scores, abs=1e-5)


@pytest.mark.parametrize("kind", ["Roberta", "DebertaV2"])
def test_positions_hold_with_padding_and_over_the_whole_window(kind: str, tmp_path: Path) -> None:
    manifest = export_text_classifier(source(kind), tmp_path / "out")
    assert manifest.window is not None
    assert manifest.window.tokens == WINDOW
    assert manifest.export is not None
    assert manifest.export.parity[0].flips == 0
    check = TextClassifier.load(tmp_path / "out")
    together = check(["w5 w6", "w7 " * 30])  # padded to the longer
    assert together[0].scores == pytest.approx(check(["w5 w6"])[0].scores, abs=1e-5)


def test_float16_is_half_the_size_and_gives_float32_logits(tmp_path: Path, pack: Path) -> None:
    manifest = export_text_classifier(source(), tmp_path / "out", dtype="float16")
    assert manifest.precision == "float16"
    sizes = [(p / "model.onnx").stat().st_size for p in (tmp_path / "out", pack)]
    assert sizes[0] < 0.7 * sizes[1]
    wanted, found = TextClassifier.load(pack)(TEXTS), TextClassifier.load(tmp_path / "out")(TEXTS)
    assert found[0].scores == pytest.approx(wanted[0].scores, abs=0.02)


def test_int8_has_integer_products_and_is_run_one_text_at_a_time(int8: Path) -> None:
    assert operators(int8 / "model.onnx")["MatMulInteger"] == 14  # 2 layers of 6, pooler, classifier
    found = resolve(int8).manifest
    assert found.precision == "int8-dynamic"
    check = TextClassifier.load(int8)
    assert check(["w1", "w2 w3"])[0].scores == check(["w1"])[0].scores


def test_int8_is_judged_by_its_decisions_on_single_texts_too(int8: Path) -> None:
    record = resolve(int8).manifest.export
    assert record is not None
    assert record.parity[0].rows == 12 + 64


def test_texts_take_the_place_of_random_rows(tmp_path: Path, int8: Path) -> None:
    (found,) = check_text_graph(source(), int8 / "model.onnx", dtype="int8", texts=TEXTS, max_flips=1.0)
    assert found.rows == 12 + len(TEXTS)


def test_int8_that_flips_too_many_decisions_is_an_error_with_advice(int8: Path) -> None:
    made = source()
    with torch.no_grad():  # the opposite of the model that the graph came from: everything flips
        made.model.classifier.weight.neg_()
        made.model.classifier.bias.neg_()
    with pytest.raises(ParityError, match=r"flips 22\d of 228 decisions.*judge it on texts like those"):
        check_text_graph(made, int8 / "model.onnx", dtype="int8")


def test_export_that_disagrees_leaves_nothing(tmp_path: Path) -> None:
    class Fickle(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        """Says something else once it was exported."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier("Bert")

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits + (0.5 if not torch.compiler.is_compiling() else 0.0)

    with pytest.raises(ParityError, match=r"logits \(1, 3\) differs by 0\.5"):
        export_text_classifier(replace(source(), model=Fickle()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unexportable_operator_is_named_with_the_class_of_the_model(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return torch.special.bessel_j0((input_ids * attention_mask).float())[:, :3]

    with pytest.raises(ExportError, match=r"Odd cannot be exported: operator .*bessel_j0"):
        export_text_classifier(replace(source(), model=Odd()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(step: str) -> None:
        assert [p.name[:5] for p in tmp_path.iterdir()] == [".out."]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_text_classifier(source(), tmp_path / "out", say=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype must be float32, float16 or int8, got 'bfloat16'"),
        ({"dtype": "int8", "flavour": "decomposed"}, "int8 graphs are for onnxruntime on the CPU"),
        (
            {"optimise": True, "flavour": "decomposed"},
            "optimised graphs have operators that only onnxruntime knows",
        ),
        ({"opset": 9, "flavour": "decomposed"}, "needs an opset from 18 to 22, got 9"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_text_classifier(source(), tmp_path / "out", **options)


def test_file_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "m.bin").touch()
    with pytest.raises(ExportError, match="it is no folder; give one, or the name of a model on the hub"):
        read_text_model(tmp_path / "m.bin")


def test_folder_without_config_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the folder has no config\.json"):
        read_text_model(tmp_path)


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tarot"}', encoding="utf-8")
    with pytest.raises(ExportError, match=r"no text classifier could be loaded from it: .*tarot"):
        read_text_model(tmp_path)


def test_model_for_another_task_is_refused_instead_of_getting_a_random_head(tmp_path: Path) -> None:
    classifier("Bert").bert.save_pretrained(tmp_path)
    with pytest.raises(
        ExportError, match=r"names BertModel, a text classifier is \.\.\.ForSequenceClassification"
    ):
        read_text_model(tmp_path)


def test_weights_that_lack_the_head_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    classifier("Bert").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(
        ExportError, match=r"its weights lack classifier\.bias, classifier\.weight; train the model"
    ):
        read_text_model(tmp_path)


def test_labels_without_names_are_refused_unless_names_are_given() -> None:
    model = classifier("Bert")
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    with pytest.raises(PackError, match="does not name its labels"):
        text_model(model, tokenizer(), name="x")
    assert text_model(model, tokenizer(), labels=["a", "b", "safe"]).ignored == ("safe",)


def test_number_of_names_must_be_that_of_the_labels() -> None:
    with pytest.raises(ExportError, match="it has 3 labels, got 2 names for them"):
        text_model(classifier("Bert"), tokenizer(), labels=["a", "b"])


def test_decision_of_a_softmax_is_the_likeliest_label() -> None:
    logits = np.array([[1.0, -2.0], [-3.0, -2.0]])
    assert decisions("softmax")(logits).tolist() == [0, 1]
    assert decisions("sigmoid")(logits).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("given", "name"),
    [("unitary/toxic-bert", "toxic-bert"), ("./a b/", "a-b"), ("/", "model"), (".hidden", "hidden")],
)
def test_name_of_a_pack_is_the_last_part_in_plain_characters(given: str, name: str) -> None:
    assert pack_name(given) == name
