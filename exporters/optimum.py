"""Folders that `optimum-cli export onnx` made: read as checks, or made into packs; optimum is not needed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from safeguard.backends import Backend, open_backend
from safeguard.backends.onnx import external_files
from safeguard.checks.hub import IGNORED_LABELS, activation_of, label_columns, window_of
from safeguard.checks.readout import Activation, Readout
from safeguard.checks.text_classifier import TOKENIZER_NAME, TextClassifier, read_tokenizer
from safeguard.checks.tokens import TokenCutter
from safeguard.errors import ExportError
from safeguard.exporters import parity
from safeguard.exporters.record import describe
from safeguard.exporters.writing import new_folder
from safeguard.manifest import MANIFEST_NAME, Manifest, Window
from safeguard.packs import canonical_digest, file_digest, seal

_NO_LIMIT = 10**9  # tokenizers without a length of their own say 1e30
_QUANTISED = (b"DynamicQuantizeLinear", b"DynamicQuantizeMatMul")


@dataclass(frozen=True)
class OptimumFolder:
    """A text classifier as optimum writes it: `model.onnx`, `config.json`, `tokenizer.json`."""

    model: Path
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    ignored: tuple[str, ...]
    activation: Activation
    window: Window
    inputs: tuple[str, ...]
    source: str
    vocabulary: int

    @property
    def int8(self) -> bool:
        """Whether its activations are quantised at run time."""
        data = self.model.read_bytes()
        return any(name in data for name in _QUANTISED)

    def backend(self, device: str = "cpu", threads: int | None = None) -> Backend:
        """Its model, opened."""
        return open_backend(
            self.model,
            inputs=self.inputs,
            outputs=["logits"],
            device=device,
            threads=threads,
            external=external_files(self.model),
        )


def is_optimum(folder: Path) -> bool:
    """Whether a folder looks like one that optimum wrote, and is no pack yet."""
    return (
        (folder / "config.json").is_file()
        and not (folder / MANIFEST_NAME).exists()
        and any(folder.glob("*.onnx"))
        and not any(folder.glob("*.safetensors"))
    )


def read_optimum(folder: Path, *, labels: Sequence[str] | None = None) -> OptimumFolder:
    """What such a folder holds. ExportError names what it lacks; PackError for labels without names."""
    model = _model_file(folder)
    config = _json(folder / "config.json", str(folder))
    if not (folder / TOKENIZER_NAME).is_file():
        raise ExportError(str(folder), f"it has no {TOKENIZER_NAME}; export again with a fast tokenizer")
    options = SimpleNamespace(**{"problem_type": None, "pad_token_id": None, **config})
    named = {int(key): value for key, value in dict(config.get("id2label", {})).items()}
    columns = tuple(labels) if labels is not None else tuple(label_columns(named, str(folder)))
    length = _NO_LIMIT
    if (folder / "tokenizer_config.json").is_file():
        said = _json(folder / "tokenizer_config.json", str(folder)).get("model_max_length")
        length = int(min(float(said or _NO_LIMIT), _NO_LIMIT))
    ignored = tuple(c for c in columns if c.lower() in IGNORED_LABELS)
    Readout(columns, ignored=ignored)  # raises for labels that are none
    return OptimumFolder(
        model,
        read_tokenizer(folder / TOKENIZER_NAME),
        columns,
        ignored,
        activation_of(options),
        window_of(options, length),
        _inputs(model),
        str(next(iter(config.get("architectures") or ["unknown"]))),
        int(config.get("vocab_size", 2)),
    )


def load(folder: str | Path, *, device: str = "cpu") -> TextClassifier:
    """The check in a folder that optimum wrote, as it lies there."""
    found = read_optimum(Path(folder).expanduser())
    isolated = found.int8 and device == "cpu"
    return TextClassifier(
        found.backend(device, threads=1 if isolated else None),
        found.tokenizer,
        Readout(found.labels, ignored=found.ignored, activation=found.activation),
        found.window,
        name=Path(folder).expanduser().resolve().name,
        inputs=found.inputs,
        digest=canonical_digest([file_digest(found.model), list(found.labels), found.activation]),
        isolated=isolated,
    )


def convert(
    folder: Path,
    out: Path,
    *,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Turns such a folder into a pack, with digests; the model is run at two shapes first.

    The weights that it was exported from are not there, so agreement with them is optimum's own word.
    """
    from safeguard.exporters.text_classifier import MODEL_NAME, pack_name, save_tokenizer

    found = read_optimum(folder, labels=labels)
    say(f"reading {found.model.name}")
    _try(found)
    with new_folder(out, overwrite=overwrite) as aside:
        beside = external_files(found.model)
        for file in beside:
            if Path(file).name != file:
                raise ExportError(str(folder), f"its weights lie outside of it: {file!r}")
            shutil.copyfile(folder / file, aside / file)
        shutil.copyfile(found.model, aside / MODEL_NAME)
        save_tokenizer(found.tokenizer, aside / TOKENIZER_NAME)
        say("sealing the pack")
        fixed = {
            "name": name or pack_name(str(folder.expanduser().resolve())),
            "version": "1",
            "kind": "text_classifier",
            "model": {"file": MODEL_NAME, "inputs": list(found.inputs), "outputs": ["logits"]},
            "labels": list(found.labels),
            "ignored_labels": list(found.ignored),
            "activation": found.activation,
            "window": found.window.model_dump(),
            "precision": "int8-dynamic" if found.int8 else "float32",
            "license": "unknown",
            "export": describe(
                found.source,
                opset=None,
                flavour=None,
                dtype="int8" if found.int8 else "float32",
                parity=(),
                exporter="optimum",
            ),
        }
        return seal(aside, {**fixed, **(fields or {})})


def export_via_optimum(source: str | Path, out: Path, **options: Any) -> Manifest:
    """Exports with optimum instead of torch directly, then converts; `options` as for `convert`.

    Raises ExportError where optimum-onnx is not installed, which it cannot be beside transformers 5.
    """
    if not find_optimum():
        raise ExportError(
            str(source),
            "'optimum-onnx' is not installed; it pins transformers<4.58, so it needs an environment of its "
            "own: run there pip install 'optimum-onnx[onnxruntime]' and optimum-cli export onnx --model "
            "MODEL FOLDER, then here safeguard export onnx FOLDER OUT; or leave out --via optimum",
        )
    main_export = import_module("optimum.exporters.onnx").main_export
    with tempfile.TemporaryDirectory() as scratch:
        main_export(str(source), output=scratch, task="text-classification")
        return convert(Path(scratch), out, **options)


def find_optimum() -> bool:
    """Whether optimum's ONNX exporter is installed."""
    try:
        return find_spec("optimum.exporters.onnx") is not None
    except ModuleNotFoundError:  # no optimum at all, or one without exporters
        return False


def _try(found: OptimumFolder) -> None:
    """Runs one row and five padded ones: shapes that a graph without dynamic axes refuses."""
    backend, cutter = found.backend(), TokenCutter(found.tokenizer)
    batches = parity.token_batches(
        found.vocabulary, found.window.tokens, inputs=found.inputs, pad_id=cutter.pad_id
    )
    for batch in batches:
        rows = len(batch["input_ids"])
        logits = backend(batch)["logits"]
        if logits.shape != (rows, len(found.labels)) or not np.isfinite(logits).all():
            raise ExportError(
                found.source,
                f"its graph gives logits {logits.shape} for {rows} texts and {len(found.labels)} labels, or "
                "some that are not finite",
            )


def _model_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise ExportError(str(folder), "it is no folder")
    files = sorted(folder.glob("*.onnx"))
    chosen = [f for f in files if f.name == "model.onnx"] or files
    if len(chosen) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise ExportError(str(folder), f"it must hold one model.onnx, found: {found}")
    if not (folder / "config.json").is_file():
        raise ExportError(str(folder), "it has no config.json, so its labels have no names")
    return chosen[0]


def _inputs(model: Path) -> tuple[str, ...]:
    """Names of the graph's inputs: those of a text classifier, with logits among its outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime's errors have no common base class of their own
        raise ExportError(str(model), f"onnxruntime cannot open it: {exc}") from exc
    inputs = tuple(i.name for i in session.get_inputs())
    outputs = [o.name for o in session.get_outputs()]
    if set(inputs) - {"input_ids", "attention_mask", "token_type_ids"} or "logits" not in outputs:
        raise ExportError(
            str(model), f"it is no text classifier: inputs {', '.join(inputs)}, outputs {', '.join(outputs)}"
        )
    return inputs


def _json(path: Path, folder: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ExportError(folder, f"its {path.name} cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise ExportError(folder, f"its {path.name} must hold a JSON object, got {type(data).__name__}")
    return data
