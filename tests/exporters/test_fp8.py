"""fp8 up to the device boundary: modelopt is stood in for, the graphs with fp8 nodes are really built."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.errors import ExportError, MissingExtra
from safeguard.exporters.fp8 import calibration_rows, quantise_fp8, quantised
from safeguard.exporters.tensorrt_pack import export_tensorrt
from safeguard.packs import Pack, resolve, seal
from tests.exporters.tiny_onnx import bag_of_words
from tests.tiny_packs import refiner_pack, rude_pack

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")

ROW = {"input_ids": np.ones((1, 8), np.int64)}


@pytest.fixture
def modelopt(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the library: its `quantize` can be set."""
    made = SimpleNamespace(quantize=None)
    for name in ("modelopt", "modelopt.onnx"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", made)
    return made


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return bag_of_words(tmp_path / "model.onnx")[0]


@pytest.fixture
def pack(tmp_path: Path, words: Path) -> Pack:
    """A text pack with a matrix product; the window has 16 tokens."""
    folder = rude_pack(tmp_path / "words")
    shutil.copyfile(words, folder / "model.onnx")
    fields = resolve(rude_pack(tmp_path / "rude")).manifest.model_dump(mode="json", exclude={"files"})
    seal(folder, {**fields, "labels": ["one", "two", "three"]}, files=["model.onnx", "tokenizer.json"])
    return resolve(folder)


def texts(folder: Path, *lines: str) -> Path:
    path = folder / "texts.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def quantize(path: str, *, output_path: str, **_: Any) -> None:
    """What modelopt does for one product: both its inputs through fp8 and back."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path)
    graph = model.graph
    (product,) = (node for node in graph.node if node.op_type == "MatMul")
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.05])
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\x00", raw=True)
    graph.initializer.extend([scale, zero])
    for i, name in enumerate(list(product.input)):
        narrow, wide = f"narrow_{i}", f"wide_{i}"
        for node in (
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [narrow], name=narrow),
            helper.make_node("DequantizeLinear", [narrow, "scale", "zero"], [wide], name=wide),
        ):
            graph.node.insert(len(graph.node) - 1, node)
        product.input[i] = wide
    onnx.save(model, output_path)


def test_without_modelopt_it_is_said_what_to_install(
    tmp_path: Path, words: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)  # which makes it impossible to import
    said = r"'modelopt' is not installed; run: pip install 'nvidia-modelopt\[onnx\]'"

    with pytest.raises(MissingExtra, match=said):
        quantise_fp8(words, tmp_path / "fp8.onnx", ROW)
    with (
        pytest.raises(MissingExtra, match=said),
        quantised(pack, tmp_path / "not looked for yet"),
    ):
        pass


def test_it_is_calibrated_on_the_rows_given(tmp_path: Path, words: Path, modelopt: SimpleNamespace) -> None:
    told: dict[str, Any] = {}

    def note(path: str, **options: Any) -> None:
        told.update(options, path=path)
        quantize(path, **options)

    modelopt.quantize = note
    quantise_fp8(words, tmp_path / "fp8.onnx", ROW)

    assert told == {
        "path": str(words),
        "quantize_mode": "fp8",
        "calibration_data": ROW,
        "output_path": str(tmp_path / "fp8.onnx"),
        "log_level": "WARNING",
    }


@pytest.mark.usefixtures("modelopt")
def test_no_rows_are_refused(tmp_path: Path, words: Path) -> None:
    with pytest.raises(ValueError, match="fp8 needs rows of real inputs to calibrate on, got none"):
        quantise_fp8(words, tmp_path / "fp8.onnx", {"input_ids": np.ones((0, 8), np.int64)})


def test_what_fails_leaves_nothing_behind(tmp_path: Path, words: Path, modelopt: SimpleNamespace) -> None:
    def fail(_: str, *, output_path: str, **__: Any) -> None:
        Path(output_path).write_bytes(b"half")
        raise RuntimeError("no calibration")

    modelopt.quantize = fail
    with pytest.raises(
        ExportError, match=r"model.onnx cannot be exported: modelopt cannot quantise it: no calib"
    ):
        quantise_fp8(words, tmp_path / "fp8.onnx", ROW)
    assert not (tmp_path / "fp8.onnx").exists()


def test_a_graph_that_was_not_written_is_an_error(
    tmp_path: Path, words: Path, modelopt: SimpleNamespace
) -> None:
    modelopt.quantize = lambda *_, **__: None

    with pytest.raises(ExportError, match="modelopt wrote no fp8 graph of it"):
        quantise_fp8(words, tmp_path / "fp8.onnx", ROW)


def test_texts_become_padded_windows_with_special_tokens(pack: Pack, tmp_path: Path) -> None:
    lines = ["good day", "", "rude", *["day " * 40] * 6]
    rows = calibration_rows(pack, texts(tmp_path, *lines))

    # [PAD] [UNK] [CLS] [SEP] rude naked good day are 0 to 7; the empty line is no text; windows end at 16
    assert rows["input_ids"].shape == rows["attention_mask"].shape == (8, 16)
    assert rows["input_ids"][0].tolist() == [2, 6, 7, 3] + [0] * 12
    assert rows["attention_mask"][0].tolist() == [1] * 4 + [0] * 12
    assert rows["input_ids"][1].tolist() == [2, 4, 3] + [0] * 13
    assert rows["input_ids"][2].tolist() == [2, *[7] * 14, 3]


def test_pictures_become_pixels(tmp_path: Path) -> None:
    folder = rude_pack(tmp_path / "rude")
    fields = resolve(folder).manifest.model_dump(mode="json", exclude={"files", "window"})
    image = {"size": 16, "resize": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    model = {"file": "model.onnx", "inputs": ["pixel_values"], "outputs": ["logits"]}
    seal(folder, {**fields, "kind": "image_classifier", "image": image, "model": model}, files=["model.onnx"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        Image.new("RGB", (30, 20), (255 * (i % 2), 0, 0)).save(pictures / f"{i}.png")
    (pictures / "notes.txt").write_text("no picture", encoding="utf-8")

    (found,) = calibration_rows(resolve(folder), pictures).values()

    assert found.shape == (8, 3, 16, 16)
    assert [float(row[0].mean()) for row in found[:2]] == [0, 1]  # black, red


def test_content_of_the_wrong_kind_is_refused(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of texts or folder of pictures"):
        calibration_rows(pack, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a text pack is calibrated on a file of texts, one a line"):
        calibration_rows(pack, tmp_path)
    with pytest.raises(ValueError, match=r"fp8 is calibrated on 8 texts or pictures or more, .* has 1"):
        calibration_rows(pack, texts(tmp_path, "good"))
    with pytest.raises(ValueError, match="has 0"):
        calibration_rows(pack, texts(tmp_path))
    with pytest.raises(ExportError, match="fp8 is for checks of texts or pictures, it is refiner"):
        calibration_rows(resolve(refiner_pack(tmp_path / "refiner")), texts(tmp_path, "good"))


def test_an_engine_with_fp8_products_is_built_and_packed(
    pack: Pack, tmp_path: Path, modelopt: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    modelopt.quantize = quantize
    options: dict[str, Any] = {"flavour": "tensorrt_rtx", "architectures": ["sm89"]}

    made = export_tensorrt(pack, tmp_path / "out", fp8=texts(tmp_path, *["good day"] * 8), **options)

    assert made.precision == "float8"
    assert resolve(tmp_path / "out").manifest.model.file == "model.engine"


def test_an_engine_without_fp8_products_is_not_called_one(
    pack: Pack, tmp_path: Path, modelopt: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    modelopt.quantize = lambda path, *, output_path, **_: shutil.copyfile(path, output_path)
    lines = texts(tmp_path, *["good day"] * 8)

    with pytest.raises(ExportError, match="modelopt found nothing in it for fp8; its engine is float32"):
        export_tensorrt(pack, tmp_path / "out", fp8=lines, flavour="tensorrt_rtx")
    assert not (tmp_path / "out").exists()
