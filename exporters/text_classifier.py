"""Text classifiers as ONNX packs: any sequence classifier of transformers, or a module with logits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from safeguard.backends import open_backend
from safeguard.checks.hub import IGNORED_LABELS, activation_of, label_columns, window_of
from safeguard.checks.readout import Activation, Readout
from safeguard.checks.text_classifier import TOKENIZER_NAME
from safeguard.checks.tokens import TokenCutter
from safeguard.errors import ExportError, MissingExtra
from safeguard.exporters import graph, narrow, parity
from safeguard.exporters.graph import Flavour
from safeguard.exporters.optimise import fuse, quantise
from safeguard.exporters.record import describe
from safeguard.exporters.writing import new_folder
from safeguard.manifest import Manifest, Window
from safeguard.packs import is_offline, seal

try:
    import torch
    from torch import nn
except ImportError as exc:
    raise MissingExtra("torch", "export") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.backends import Backend

Dtype = Literal["float32", "float16", "int8"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")
INPUTS = ("input_ids", "attention_mask")
MODEL_NAME = "model.onnx"
MAX_FLIPS: Mapping[Dtype, float] = {"float32": 0.0, "float16": 0.01, "int8": 0.02}
"""Largest share of decisions that may differ from the float32 model."""
_SINGLES = 64  # runs of one text each, on which a narrower export is judged as well
_TOLERANCES: Mapping[Dtype, float] = {
    "float32": parity.FLOAT32,
    "float16": parity.FLOAT16,
    "int8": np.inf,  # judged by its decisions
}
_ADVICE: Mapping[Dtype, str] = {
    "float32": "the exported graph is wrong for these shapes; try the other flavour or opset",
    "float16": "the model leaves float16's range; keep float32",
    "int8": "judge it on texts like those it will see (texts), keep float16 or float32, or allow more flips",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class TextModel:
    """A text classifier in memory: token ids and mask in, logits (text, label) out.

    model: takes `input_ids` and `attention_mask` by name and gives a tensor, or a mapping with `logits`.
    vocabulary: how many token ids it knows.
    """

    model: nn.Module
    tokenizer: Tokenizer
    name: str
    labels: tuple[str, ...]
    window: Window
    vocabulary: int
    activation: Activation = "sigmoid"
    ignored: tuple[str, ...] = ()
    license: str = "unknown"


def read_text_model(
    source: str | Path,
    *,
    labels: Sequence[str] | None = None,
    ignored: Sequence[str] | None = None,
    revision: str | None = None,
) -> TextModel:
    """A sequence classifier of transformers with its fast tokenizer, from a folder or the hub.

    Safetensors only, no code from the hub. labels: names of the logits, the model's own by default; ignored:
    those that are no risk, those known to be by default, as the check `hub:` has it.
    Raises ExportError for what is no such model, PackError for labels that name nothing.
    """
    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as exc:
        raise MissingExtra("transformers", "export") from exc
    where = _existing(source)
    options = {"revision": revision, "local_files_only": is_offline(), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(where, **options)
        _refuse_other_tasks(str(source), config)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            where, use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as exc:
        raise ExportError(str(source), f"no text classifier could be loaded from it: {exc}") from exc
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ExportError(str(source), f"its weights lack {missing}; train the model first")
    return text_model(model, tokenizer, name=str(source), labels=labels, ignored=ignored)


def text_model(
    model: Any,
    tokenizer: Any,
    *,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    ignored: Sequence[str] | None = None,
) -> TextModel:
    """A sequence classifier and tokenizer of transformers that are in memory already."""
    source = name or type(model).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(source, "it has no fast tokenizer (tokenizer.json), so windows cannot be cut")
    config = model.config
    columns = list(labels) if labels is not None else label_columns(config.id2label, source)
    if len(columns) != config.num_labels:
        raise ExportError(source, f"it has {config.num_labels} labels, got {len(columns)} names for them")
    if ignored is None:
        ignored = [c for c in columns if c.lower() in IGNORED_LABELS]
    Readout(columns, ignored=ignored)  # raises for labels that are not unique or all ignored
    return TextModel(
        model,
        tokenizer.backend_tokenizer,
        pack_name(source),
        tuple(columns),
        window_of(config, tokenizer.model_max_length),
        int(config.vocab_size),
        activation_of(config),
        tuple(ignored),
    )


def export_text_classifier(
    source: TextModel,
    out: Path,
    *,
    dtype: Dtype = "float32",
    flavour: Flavour = "native",
    opset: int | None = None,
    keep_io: bool = True,
    optimise: bool = False,
    texts: Sequence[str] | None = None,
    max_flips: float | None = None,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
    say: Say = lambda _: None,
) -> Manifest:
    """Writes a pack with the model as ONNX that agrees with it, or nothing.

    dtype: int8 has weights per channel and activations scaled at run time; its decisions are compared.
    keep_io: float16 graphs give float32 logits. optimise: fuses layers into onnxruntime's own operators
    (native flavour only). texts: what decisions are compared on beside seeded tokens. max_flips: largest
    share of decisions that may differ, by default as in MAX_FLIPS. fields: more for the manifest.
    say: told each step as it begins.

    Raises ExportError for a model that cannot be exported, ParityError for one that comes out different,
    ValueError for options that do not go together, FileExistsError for an `out` that is there.
    """
    opset = graph.choose_opset(flavour, opset)
    _refuse_options(dtype, flavour, optimise)
    with new_folder(out, overwrite=overwrite) as folder:
        say(f"exporting {type(source.model).__name__}, opset {opset}, {flavour}")
        path = folder / MODEL_NAME
        _write_graph(
            source, path, dtype=dtype, flavour=flavour, opset=opset, keep_io=keep_io, optimise=optimise
        )
        say("comparing with the model")
        agreed = check_text_graph(source, path, dtype=dtype, texts=texts, max_flips=max_flips)
        save_tokenizer(source.tokenizer, folder / TOKENIZER_NAME)
        say("sealing the pack")
        return seal(
            folder,
            {
                **text_fields(source),
                "precision": "int8-dynamic" if dtype == "int8" else dtype,
                "export": describe(source.model, opset=opset, flavour=flavour, dtype=dtype, parity=agreed),
                **(fields or {}),
            },
        )


def text_fields(source: TextModel) -> dict[str, Any]:
    """What a manifest says of a text classifier, whatever its model file is."""
    return {
        "name": source.name,
        "version": "1",
        "kind": "text_classifier",
        "model": {"file": MODEL_NAME, "inputs": list(INPUTS), "outputs": ["logits"]},
        "labels": list(source.labels),
        "ignored_labels": list(source.ignored),
        "activation": source.activation,
        "window": source.window.model_dump(),
        "license": source.license,
    }


def check_text_graph(
    source: TextModel,
    path: Path,
    *,
    dtype: Dtype = "float32",
    inputs: Sequence[str] = INPUTS,
    texts: Sequence[str] | None = None,
    max_flips: float | None = None,
) -> list[parity.Parity]:
    """Compares an ONNX file with the model in memory, at batch 1 and 5, padded, up to the whole window."""
    cutter = TokenCutter(source.tokenizer)
    tokens = source.window.tokens
    batches = parity.token_batches(source.vocabulary, tokens, inputs=inputs, pad_id=cutter.pad_id)
    if dtype != "float32":  # each text in a run of its own, as the check runs int8 models
        rows = _tokenised(texts, cutter, tokens) if texts else _random_rows(source.vocabulary, tokens)
        batches += [_single(ids, inputs) for ids in rows]
    candidate = open_backend(path, inputs=inputs, outputs=["logits"], external=graph.beside(path))
    with graph.evaluating(source.model):
        return parity.compare(
            _reference(source.model),
            candidate,
            batches,
            tolerance=_TOLERANCES[dtype],
            decide=decisions(source.activation),
            max_flips=MAX_FLIPS[dtype] if max_flips is None else max_flips,
            advice=_ADVICE[dtype],
        )


def decisions(activation: Activation) -> parity.Decide:
    """What is flagged at one half: the likeliest label of a softmax, every label whose logit is above 0."""
    if activation == "softmax":
        return lambda logits: np.asarray(logits).argmax(axis=-1)
    return lambda logits: np.asarray(logits) > (0 if activation == "sigmoid" else 0.5)


def pack_name(source: str) -> str:
    """A name for a pack from a path, a hub name or a class: its last part, in characters that names allow."""
    last = source.rstrip("/").rsplit("/", 1)[-1]
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last)
    return clean.lstrip("._-")[:100] or "model"


def _existing(source: str | Path) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ExportError(
                str(source), "the folder has no config.json, so it holds no model of transformers"
            )
        return str(path)
    if (
        isinstance(source, Path)
        or path.exists()
        or str(source).count("/") != 1
        or str(source).startswith(".")
    ):
        raise ExportError(
            str(source), "it is no folder; give one, or the name of a model on the hub: owner/name"
        )
    return str(source)


def _refuse_other_tasks(source: str, config: Any) -> None:
    """Transformers would put a new random head on a trunk of another task, without an error."""
    named = list(getattr(config, "architectures", None) or [])
    if not any(name.endswith("ForSequenceClassification") for name in named):
        found = ", ".join(named) or "no architecture"
        raise ExportError(
            source, f"its config.json names {found}, a text classifier is ...ForSequenceClassification"
        )


def _refuse_options(dtype: str, flavour: Flavour, optimise: bool) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    if dtype == "int8" and flavour == "decomposed":
        raise ValueError(
            "int8 graphs are for onnxruntime on the CPU, so their flavour is native; decomposed is for "
            "TensorRT, which wants float32 or float16"
        )
    if optimise and flavour == "decomposed":
        raise ValueError(
            "optimised graphs have operators that only onnxruntime knows; the flavour must be native"
        )


def _write_graph(
    source: TextModel,
    path: Path,
    *,
    dtype: Dtype,
    flavour: Flavour,
    opset: int,
    keep_io: bool,
    optimise: bool,
) -> None:
    module = source.model
    if dtype == "float16":
        module = narrow.Half(_Logits(module.eval()), keep_io=keep_io)
    elif dtype == "int8":
        module = narrow.narrow_tables(module)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wide = Path(scratch) / MODEL_NAME if dtype == "int8" or optimise else path
        try:
            write_token_graph(
                module, wide, source.vocabulary, source.window.tokens, flavour=flavour, opset=opset
            )
        except ExportError as exc:
            raise ExportError(type(source.model).__name__, exc.reason, operator=exc.operator) from exc
        if optimise:
            fused = wide.with_name("fused.onnx") if dtype == "int8" else path
            config = getattr(source.model, "config", None)
            fuse(
                wide,
                fused,
                heads=getattr(config, "num_attention_heads", 0),
                hidden=getattr(config, "hidden_size", 0),
            )
            wide = fused
        if dtype == "int8":
            quantise(wide, path)


def write_token_graph(
    module: nn.Module,
    path: Path,
    vocabulary: int,
    longest: int,
    *,
    flavour: Flavour,
    opset: int | None = None,
) -> None:
    """A module from input_ids and attention_mask, (batch, token) int64, to logits as ONNX."""
    generator = torch.Generator().manual_seed(parity.SEED)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (3, min(11, longest)), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0
    axes, device = {0: "batch", 1: "token"}, graph.device_of(module)
    graph.export_graph(
        module,
        path,
        inputs={"input_ids": ids.to(device), "attention_mask": mask.to(device)},
        outputs=["logits"],
        dynamic={name: axes for name in INPUTS},
        flavour=flavour,
        opset=opset,
    )


class _Logits(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A module that gives its logits alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        found = self.module(**inputs)
        return found if isinstance(found, torch.Tensor) else found["logits"]


def _reference(module: nn.Module) -> Backend:
    logits, device = _Logits(module), graph.device_of(module)

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = {name: torch.as_tensor(array).to(device) for name, array in inputs.items()}
        with torch.inference_mode():
            return {"logits": logits(**tensors).float().cpu().numpy()}

    return run


def _tokenised(texts: Sequence[str], cutter: TokenCutter, longest: int) -> list[list[int]]:
    room = longest - cutter.special_tokens
    return [[*cutter.prefix, *t.ids[:room].tolist(), *cutter.suffix] for t in cutter(texts)]


def _random_rows(vocabulary: int, longest: int) -> list[list[int]]:
    generator = np.random.default_rng(parity.SEED + 1)
    lengths = generator.integers(3, min(longest, 32) + 1, _SINGLES)
    return [generator.integers(0, vocabulary, int(n)).tolist() for n in lengths]


def _single(ids: Sequence[int], inputs: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    row = np.array([ids], np.int64)
    arrays = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    return {name: arrays[name] for name in inputs}


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Without truncation and padding, which are the check's own."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.save(str(path), pretty=False)
