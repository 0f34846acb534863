"""A CLIP vision tower and every head on it as one graph: pixels in, embeddings and one logit per head out."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.backends import open_backend
from safeguard.checks.clip_heads import (
    HEADS_NAME,
    Concepts,
    Head,
    Perceptron,
    PromptPair,
    read_heads,
    write_heads,
)
from safeguard.errors import ExportError, MissingExtra
from safeguard.exporters import graph, parity
from safeguard.exporters.graph import Flavour
from safeguard.exporters.optimise import downstream, quantise
from safeguard.exporters.record import describe
from safeguard.exporters.text_classifier import DTYPES, MODEL_NAME, Dtype, pack_name
from safeguard.exporters.writing import new_folder
from safeguard.manifest import ImagePreprocess, Manifest
from safeguard.packs import is_offline, seal

try:
    import torch
    from torch import Tensor, nn
except ImportError as exc:
    raise MissingExtra("torch", "export") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.backends import Backend

EMBEDDINGS, LOGITS, PIXELS = "image_embeds", "logits", "pixel_values"
_CONCEPT_GAIN = 100.0  # Concepts.probability is sigmoid(100 * margin), so that is its logit
_SPECIAL_ADJUSTMENT = 0.01  # as in safeguard.checks.clip_heads
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
MAX_FLIPS: Mapping[Dtype, float] = {"float32": 0.0, "float16": 0.02, "int8": 0.05}
"""Largest share of head decisions that may differ from the float32 tower; on noise margins are small."""
_TOLERANCES: Mapping[Dtype, Mapping[str, float]] = {
    "float32": {EMBEDDINGS: parity.FLOAT32, LOGITS: 1e-3},  # logits are 100 times a cosine
    "float16": {EMBEDDINGS: parity.FLOAT16, LOGITS: 0.2},
    "int8": {EMBEDDINGS: np.inf, LOGITS: np.inf},  # judged by its decisions
}
_PICTURES: Mapping[Dtype, int] = {"float32": 5, "float16": 17, "int8": 17}
_ADVICE = "keep float32 or float16, or allow more flips"
AnyHead = PromptPair | Concepts | Perceptron


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower in memory: `pixel_values` in, a mapping with un-normalised `image_embeds` out."""

    model: nn.Module
    image: ImagePreprocess
    dimension: int
    name: str
    license: str = "unknown"


def read_tower(source: str | Path) -> Tower:
    """The vision half of a CLIP folder (or of a model on the hub), with its preprocessing.

    Raises ExportError for what is no CLIP model.
    """
    try:
        from transformers import AutoConfig, CLIPVisionModelWithProjection
    except ImportError as exc:
        raise MissingExtra("transformers", "export") from exc
    where = Path(source).expanduser()
    if not where.is_dir() and (isinstance(source, Path) or where.exists() or str(source).count("/") != 1):
        raise ExportError(
            str(source), "it is no folder; give one, or the name of a model on the hub: owner/name"
        )
    if where.is_dir() and not (where / "config.json").is_file():
        raise ExportError(str(source), "the folder has no config.json, so it holds no model of transformers")
    place = str(where) if where.is_dir() else str(source)
    options = {"local_files_only": is_offline(), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **options)
        if config.model_type not in ("clip", "clip_vision_model"):
            raise ExportError(
                str(source), f"its model_type is {config.model_type!r}; known: clip, clip_vision_model"
            )
        model, loaded = CLIPVisionModelWithProjection.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as exc:  # the last: weights of another shape
        raise ExportError(str(source), f"no CLIP tower could be loaded from it: {exc}") from exc
    if loaded["missing_keys"]:
        raise ExportError(str(source), f"its weights lack {', '.join(sorted(loaded['missing_keys'])[:3])}")
    return tower(model, _preprocessing(where, int(model.config.image_size)), name=str(source))


def tower(model: Any, image: ImagePreprocess | None = None, *, name: str | None = None) -> Tower:
    """A `CLIPVisionModelWithProjection` in memory; CLIP's own preprocessing unless another is given."""
    size = int(model.config.image_size)
    spec = image or ImagePreprocess(size=size, resize=size, mean=_MEAN, std=_STD)
    return Tower(model, spec, int(model.config.projection_dim), pack_name(name or type(model).__name__))


def export_clip(
    source: Tower,
    heads: Sequence[Head],
    out: Path,
    *,
    dtype: Dtype = "float32",
    flavour: Flavour = "native",
    opset: int | None = None,
    max_flips: float | None = None,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Writes a clip_heads pack whose graph has the tower and all heads and agrees with both, or nothing.

    The graph gives `image_embeds` (picture, dimension), un-normalised, and `logits` (picture, head), whose
    sigmoid is each head's probability. Heads are float32 whatever the tower's dtype, their norms and dot
    products elementwise, so that neither quantisation nor TF32 reaches them. The heads themselves lie in the
    pack as well, for the check's own float64 arithmetic on the embeddings.

    Raises as `safeguard.exporters.text_classifier.export_text_classifier`.
    """
    opset = graph.choose_opset(flavour, opset)
    known = _refuse_heads(source, heads)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    if dtype == "int8" and flavour == "decomposed":
        raise ValueError("int8 graphs are for onnxruntime on the CPU, so their flavour is native")
    with new_folder(out, overwrite=overwrite) as folder:
        say(f"exporting {type(source.model).__name__} with {len(known)} heads, opset {opset}, {flavour}")
        path = folder / MODEL_NAME
        _write_graph(source, known, path, dtype=dtype, flavour=flavour, opset=opset)
        say("comparing with the model")
        agreed = _check_graph(source, known, path, dtype=dtype, max_flips=max_flips)
        write_heads(folder / HEADS_NAME, known)
        say("sealing the pack")
        return seal(
            folder,
            {
                "name": source.name,
                "version": "1",
                "kind": "clip_heads",
                "model": {"file": MODEL_NAME, "inputs": [PIXELS], "outputs": [EMBEDDINGS, LOGITS]},
                "labels": [head.category for head in known],
                "image": source.image.model_dump(),
                "license": source.license,
                "precision": "int8-dynamic" if dtype == "int8" else dtype,
                "export": describe(source.model, opset=opset, flavour=flavour, dtype=dtype, parity=agreed),
                **(fields or {}),
            },
        )


def read_named_heads(files: Sequence[Path], names: Sequence[str] = ()) -> list[Head]:
    """Heads from files of `safeguard.checks.clip_heads.write_heads`, all or those of these categories.

    Raises FileNotFoundError for a file that is not there, ExportError for a category that no file has.
    """
    heads: list[Head] = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(2, "no such file of heads", str(file))
        heads += read_heads(file)
    known = [head.category for head in heads]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ExportError("clip", f"there is no head {', '.join(unknown)}; the files hold {', '.join(known)}")
    return [head for head in heads if not names or head.category in names]


class TowerWithHeads(nn.Module):  # type: ignore[misc]  # torch is not followed
    """pixel_values (picture, 3, size, size) -> image_embeds (picture, dimension), logits (picture, head).

    half: the tower computes in float16; the heads and both outputs stay float32.
    """

    def __init__(self, model: nn.Module, heads: Sequence[AnyHead], *, half: bool = False) -> None:
        super().__init__()
        self.tower = copy.deepcopy(model).half() if half else model
        self.heads = nn.ModuleList([_module(head) for head in heads])
        self._half = half

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixel_values.half() if self._half else pixel_values
        embeds: Tensor = self.tower(pixel_values=pixels)["image_embeds"].float()
        return embeds, torch.stack([head(embeds) for head in self.heads], dim=1)


class _PromptPair(nn.Module):  # type: ignore[misc]  # torch is not followed
    def __init__(self, head: PromptPair) -> None:
        super().__init__()
        harmless, harmful = _unit_rows(head.prompts)
        self.register_buffer("direction", _tensor(head.scale * (harmful - harmless)))

    def forward(self, embeds: Tensor) -> Tensor:
        return (_unit(embeds) * self.direction).sum(dim=1)


class _Concepts(nn.Module):  # type: ignore[misc]  # torch is not followed
    def __init__(self, head: Concepts) -> None:
        super().__init__()
        for name in ("concepts", "special"):
            self.register_buffer(name, _tensor(_unit_rows(getattr(head, name))))
        for name in ("thresholds", "special_thresholds"):
            self.register_buffer(name, _tensor(getattr(head, name)))

    def forward(self, embeds: Tensor) -> Tensor:
        unit = _unit(embeds)[:, None]  # (picture, 1, dimension)
        worst = ((unit * self.concepts).sum(dim=2) - self.thresholds).amax(dim=1)
        if len(self.special):
            near = ((unit * self.special).sum(dim=2) - self.special_thresholds).amax(dim=1)
            worst = worst + torch.where(near > 0, _SPECIAL_ADJUSTMENT, 0.0)
        return _CONCEPT_GAIN * worst


class _Perceptron(nn.Module):  # type: ignore[misc]  # torch is not followed
    def __init__(self, head: Perceptron) -> None:
        super().__init__()
        for name in ("weight", "bias", "out_weight"):
            self.register_buffer(name, _tensor(getattr(head, name)))
        self._out_bias = float(head.out_bias)

    def forward(self, embeds: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.linear(embeds, self.weight, self.bias))
        return (hidden * self.out_weight).sum(dim=1) + self._out_bias


def _module(head: AnyHead) -> nn.Module:
    match head:
        case PromptPair():
            return _PromptPair(head)
        case Concepts():
            return _Concepts(head)
        case Perceptron():
            return _Perceptron(head)


def _unit(rows: Tensor) -> Tensor:
    return rows / (rows * rows).sum(dim=1, keepdim=True).sqrt()  # 0 / 0 is NaN: no direction, as in the check


def _unit_rows(rows: NDArray[Any]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    unit: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _refuse_heads(source: Tower, heads: Sequence[Head]) -> list[AnyHead]:
    known = [head for head in heads if isinstance(head, PromptPair | Concepts | Perceptron)]
    other = [type(head).__name__ for head in heads if head not in known]
    if other:
        raise ExportError(other[0], "heads are PromptPair, Concepts or Perceptron")
    if not known:
        raise ValueError("a tower is exported with its heads, got none; give --heads FILE")
    if len({head.category for head in known}) != len(known):
        raise ValueError(f"each head needs a category of its own, got {[head.category for head in known]}")
    for head in known:
        if head.dimension != source.dimension:
            raise ExportError(
                source.name,
                f"its embeddings have {source.dimension} numbers, "
                f"head {head.category!r} wants {head.dimension}",
            )
    return known


def _write_graph(
    source: Tower, heads: Sequence[AnyHead], path: Path, *, dtype: Dtype, flavour: Flavour, opset: int
) -> None:
    module = TowerWithHeads(source.model, heads, half=dtype == "float16").to(graph.device_of(source.model))
    size = source.image.size
    pixels = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(parity.SEED))
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wide = Path(scratch) / MODEL_NAME if dtype == "int8" else path
        try:
            graph.export_graph(
                module,
                wide,
                inputs={PIXELS: pixels.to(graph.device_of(source.model))},
                outputs=[EMBEDDINGS, LOGITS],
                dynamic={PIXELS: {0: "batch"}},
                flavour=flavour,
                opset=opset,
            )
        except ExportError as exc:
            raise ExportError(type(source.model).__name__, exc.reason, operator=exc.operator) from exc
        if dtype == "int8":
            quantise(wide, path, keep=downstream(wide, EMBEDDINGS))


def _check_graph(
    source: Tower, heads: Sequence[AnyHead], path: Path, *, dtype: Dtype, max_flips: float | None
) -> list[parity.Parity]:
    size = source.image.size
    candidate = open_backend(path, inputs=[PIXELS], outputs=[EMBEDDINGS, LOGITS], external=graph.beside(path))
    with graph.evaluating(source.model):
        return parity.compare(
            _reference(source.model, heads),
            candidate,
            parity.pixel_batches((3, size, size), rows=_PICTURES[dtype]),
            tolerance=_TOLERANCES[dtype],
            decide={LOGITS: lambda logits: logits > 0},
            max_flips=MAX_FLIPS[dtype] if max_flips is None else max_flips,
            advice="" if dtype == "float32" else _ADVICE,
        )


def _reference(model: nn.Module, heads: Sequence[AnyHead]) -> Backend:
    """The tower in torch and the heads as the check has them, in float64."""
    device = graph.device_of(model)

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            found = model(pixel_values=torch.as_tensor(inputs[PIXELS]).to(device))["image_embeds"]
        embeds = found.float().cpu().numpy()
        wide = embeds.astype(np.float64)
        columns = [h.raw(wide) * (_CONCEPT_GAIN if isinstance(h, Concepts) else 1.0) for h in heads]
        return {EMBEDDINGS: embeds, LOGITS: np.stack(columns, axis=1)}

    return run


def _preprocessing(folder: Path, size: int) -> ImagePreprocess:
    """What `preprocessor_config.json` says, CLIP's own where there is none."""
    path = folder / "preprocessor_config.json"
    said: dict[str, Any] = {}
    if path.is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise ExportError(str(folder), f"its {path.name} cannot be read: {exc}") from exc
    shorter = _edge(said.get("size"), size)
    resample = {2: "bilinear", 3: "bicubic"}.get(said.get("resample", 3))  # PIL's numbers
    if resample is None or shorter < size:
        raise ExportError(
            str(folder), f"{path.name}: only bicubic or bilinear, and a size of at least {size}"
        )
    return ImagePreprocess(
        size=size,
        resize=shorter,
        resample=resample,
        mean=tuple(said.get("image_mean", _MEAN)),
        std=tuple(said.get("image_std", _STD)),
    )


def _edge(size: Any, default: int) -> int:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height", default))
    return int(size) if size is not None else default
