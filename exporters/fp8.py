"""fp8 graphs for TensorRT: real inputs to calibrate on, and the quantisation nodes that modelopt writes."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from safeguard.checks.tokens import TokenCutter
from safeguard.errors import ExportError, MissingExtra
from safeguard.exporters.tensorrt import weight_files
from safeguard.images import open_image, prepare
from safeguard.packs import Pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST, MOST = 8, 512
"""Rows to calibrate on: fewer say too little of the ranges, more only take longer."""
_COMMAND = "pip install 'nvidia-modelopt[onnx]'"
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def require_modelopt() -> None:
    """Raises MissingExtra where modelopt is not installed, before anything long begins."""
    if importlib.util.find_spec("modelopt") is None:
        # no extra of ours: it pins older onnx and onnxruntime than we use
        raise MissingExtra("modelopt", "", command=_COMMAND)


def calibration_rows(pack: Pack, source: Path) -> dict[str, NDArray[Any]]:
    """The inputs of a pack's model for real content, by name, one row each, MOST of them at most.

    source: a file of texts, one a line, for a text pack; a folder of pictures for one that reads pictures.
    Raises ValueError for fewer than FEWEST rows, FileNotFoundError, ExportError for a pack of another kind.
    """
    if not source.exists():
        raise FileNotFoundError(2, "no such file of texts or folder of pictures", str(source))
    rows: dict[str, NDArray[Any]]
    if pack.manifest.window is not None:
        rows = _text_rows(pack, source)
    elif pack.manifest.image is not None:
        rows = _picture_rows(pack, source)
    else:
        kind = pack.manifest.kind
        raise ExportError(pack.manifest.name, f"fp8 is for checks of texts or pictures, it is {kind}")
    count = min(map(len, rows.values()))
    if count < FEWEST:
        raise ValueError(f"fp8 is calibrated on {FEWEST} texts or pictures or more, {source} has {count}")
    return rows


@contextmanager
def quantised(pack: Pack, source: Path) -> Iterator[Path]:
    """The pack's ONNX file with fp8 quantisation nodes, calibrated on `source`, for the time of the block.

    Raises what `calibration_rows` and `quantise_fp8` raise.
    """
    require_modelopt()
    rows = calibration_rows(pack, source)
    with tempfile.TemporaryDirectory() as scratch:
        wide, made = Path(scratch) / "wide", Path(scratch) / "fp8"
        for folder in (wide, made):
            folder.mkdir()
        for name in (pack.model.name, *weight_files(pack.model)):  # modelopt writes beside what it reads
            shutil.copyfile(pack.model.with_name(name), wide / name)
        quantise_fp8(wide / pack.model.name, made / pack.model.name, rows)
        yield made / pack.model.name


def quantise_fp8(model: Path, out: Path, calibration: Mapping[str, NDArray[Any]]) -> None:
    """Writes an ONNX file with fp8 quantisation nodes, for GPUs from Ada on; the rest becomes fp16.

    calibration: some hundred rows of real inputs, by name. Raises MissingExtra where modelopt is not
    installed, ExportError with its reason where it fails.
    """
    try:
        from modelopt.onnx.quantization import quantize
    except ImportError as exc:
        raise MissingExtra("modelopt", "", command=_COMMAND) from exc
    if not calibration or not all(len(rows) for rows in calibration.values()):
        raise ValueError("fp8 needs rows of real inputs to calibrate on, got none")
    try:
        quantize(
            str(model),
            quantize_mode="fp8",
            calibration_data=dict(calibration),
            output_path=str(out),
            log_level="WARNING",
        )
    except Exception as exc:  # modelopt's errors have no common base class
        out.unlink(missing_ok=True)
        raise ExportError(model.name, f"modelopt cannot quantise it: {exc}") from exc
    if not out.is_file():
        raise ExportError(model.name, "modelopt wrote no fp8 graph of it")


def _text_rows(pack: Pack, source: Path) -> dict[str, NDArray[Any]]:
    """Windows as the check would read them, each text its first, padded to the longest."""
    if not source.is_file():
        raise ValueError(f"a text pack is calibrated on a file of texts, one a line, got {source}")
    lines = source.read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line.strip()][:MOST]
    cut = TokenCutter(Tokenizer.from_str(pack.read("tokenizer.json").decode()))
    window = pack.manifest.window
    size = (window.tokens if window else 0) - cut.special_tokens
    rows = [[*cut.prefix, *tokens.ids[:size].tolist(), *cut.suffix] for tokens in cut(texts)] if texts else []
    ids = np.full((len(rows), max(map(len, rows), default=0)), cut.pad_id, np.int64)  # (text, token)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: arrays[name] for name in pack.manifest.model.inputs}


def _picture_rows(pack: Pack, source: Path) -> dict[str, NDArray[Any]]:
    if not source.is_dir():
        raise ValueError(f"a pack for pictures is calibrated on a folder of them, got {source}")
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in _PICTURES)[:MOST]
    spec = pack.manifest.image
    if spec is None or not files:
        raise ValueError(f"{source} holds no pictures; known: {', '.join(_PICTURES)}")
    views = [prepare([open_image(path)], spec, max_frames=1).array[:1] for path in files]
    return {pack.manifest.model.inputs[0]: np.concatenate(views)}
