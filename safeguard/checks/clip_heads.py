"""ClipHeads: one CLIP vision tower, any number of small heads on its image embedding.

Three kinds of head: a learned prompt pair (Q16), concepts with thresholds (the Stable Diffusion safety
checker) and a two-layer perceptron (the multi-headed safety classifier). All arithmetic after the tower is in
float64, whatever the tower's precision: an error of 1e-3 in a cosine moves Q16's logit by 0.1.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from safeguard.backends import Backend, tensor_device
from safeguard.checks.image_classifier import image_spec, rows_of_a_run, worst_views
from safeguard.checks.opening import open_model
from safeguard.errors import MissingExtra, PackError
from safeguard.files import replaced
from safeguard.images import MAX_FRAMES, Prepared, prepare
from safeguard.manifest import ImagePreprocess
from safeguard.packs import Pack, resolve
from safeguard.types import Finding, Modality, Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADS_NAME = "heads.npz"
_CLIP_SCALE = 100.0  # exp(logit_scale) of every released CLIP
_SPECIAL_ADJUSTMENT = 0.01  # diffusers' StableDiffusionSafetyChecker, for pictures near a special concept
_BATCH_NORM_EPS = 1e-5  # torch.nn.BatchNorm1d's default


class Head(Protocol):
    """Scores un-normalised image embeddings (picture, dimension)."""

    @property
    def category(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    def raw(self, embeddings: NDArray[np.float64], /) -> NDArray[np.float64]:
        """One raw score per picture: a logit or a margin; above 0 is where the source says unsafe."""
        ...

    def probability(self, raw: NDArray[np.float64], /) -> NDArray[np.float64]:
        """Raw scores as probabilities; 0 becomes 0.5."""
        ...


@dataclass(frozen=True, eq=False)
class PromptPair:
    """Two learned prompts, harmless and harmful: p = sigmoid(scale * <v, e1 - e0>), all of them unit vectors.

    prompts: (2, dimension), rows harmless, harmful; of any length. Source: Q16 (Schramowski et al. 2022).
    """

    category: str
    prompts: NDArray[Any] = field(repr=False)
    scale: float = _CLIP_SCALE

    def __post_init__(self) -> None:
        if self.prompts.ndim != 2 or len(self.prompts) != 2:
            raise ValueError(f"a prompt pair must be (2, dimension), got {self.prompts.shape}")

    @property
    def dimension(self) -> int:
        return int(self.prompts.shape[1])

    def raw(self, embeddings: NDArray[np.float64], /) -> NDArray[np.float64]:
        """The logit: scale * (cosine to harmful - cosine to harmless)."""
        harmless, harmful = _unit(self.prompts.astype(np.float64))
        logits: NDArray[np.float64] = self.scale * (_unit(embeddings) @ (harmful - harmless))
        return logits

    def probability(self, raw: NDArray[np.float64], /) -> NDArray[np.float64]:
        return _sigmoid(raw)


@dataclass(frozen=True, eq=False)
class Concepts:
    """Nearness to concepts, each with its own threshold, as in the Stable Diffusion safety checker.

    concepts: (concept, dimension), thresholds: (concept,); special, special_thresholds: the same for those
    that make all others more sensitive by 0.01. raw is the largest cosine - threshold + adjustment, above 0
    where the original blackens the picture (which rounds to 3 digits first). The probability is sigmoid(100 *
    raw): CLIP's own scale, monotone and 0.5 where the original switches, but not calibrated.
    """

    category: str
    concepts: NDArray[Any] = field(repr=False)
    thresholds: NDArray[Any] = field(repr=False)
    special: NDArray[Any] = field(repr=False)
    special_thresholds: NDArray[Any] = field(repr=False)

    def __post_init__(self) -> None:
        shapes = [self.concepts.shape, self.special.shape]
        if [(len(self.thresholds), self.dimension), (len(self.special_thresholds), self.dimension)] != shapes:
            raise ValueError(f"each concept needs one threshold and the same dimension, got {shapes}")

    @property
    def dimension(self) -> int:
        return int(self.concepts.shape[1])

    def raw(self, embeddings: NDArray[np.float64], /) -> NDArray[np.float64]:
        unit = _unit(embeddings)  # (picture, dimension)
        near_special = unit @ _unit(self.special.astype(np.float64)).T - self.special_thresholds
        adjustment = np.where((near_special > 0).any(axis=1), _SPECIAL_ADJUSTMENT, 0.0)
        margins = unit @ _unit(self.concepts.astype(np.float64)).T - self.thresholds  # (picture, concept)
        worst: NDArray[np.float64] = margins.max(axis=1) + adjustment
        return worst

    def probability(self, raw: NDArray[np.float64], /) -> NDArray[np.float64]:
        return _sigmoid(_CLIP_SCALE * raw)


@dataclass(frozen=True, eq=False)
class Perceptron:
    """Linear, ReLU, linear, sigmoid on the un-normalised embedding.

    weight: (hidden, dimension), bias: (hidden,), out_weight: (hidden,), out_bias: a number.
    Source: the multi-headed safety classifier (Qu et al. 2023), its batch norm folded into the second layer.
    """

    category: str
    weight: NDArray[Any] = field(repr=False)
    bias: NDArray[Any] = field(repr=False)
    out_weight: NDArray[Any] = field(repr=False)
    out_bias: float = 0.0

    def __post_init__(self) -> None:
        hidden = self.weight.shape[0]
        if self.weight.ndim != 2 or self.bias.shape != (hidden,) or self.out_weight.shape != (hidden,):
            shapes = (self.weight.shape, self.bias.shape, self.out_weight.shape)
            raise ValueError(
                f"weight, bias, out_weight must be (hidden, dimension), (hidden,), (hidden,), got {shapes}"
            )

    @classmethod
    def from_state(cls, category: str, state: Mapping[str, NDArray[Any]]) -> Perceptron:
        """From the arrays of Sequential(Linear, ReLU, Dropout, BatchNorm1d, Linear): keys 0.*, 3.*, 4.*."""
        wide = {name: np.asarray(value, np.float64) for name, value in state.items()}
        gain = wide["3.weight"] / np.sqrt(wide["3.running_var"] + _BATCH_NORM_EPS)
        shift = wide["3.bias"] - gain * wide["3.running_mean"]
        out = wide["4.weight"].reshape(-1)
        return cls(
            category, wide["0.weight"], wide["0.bias"], out * gain, float(wide["4.bias"].item() + out @ shift)
        )

    @property
    def dimension(self) -> int:
        return int(self.weight.shape[1])

    def raw(self, embeddings: NDArray[np.float64], /) -> NDArray[np.float64]:
        hidden = np.maximum(embeddings @ self.weight.T.astype(np.float64) + self.bias, 0)  # keeps NaN
        logits: NDArray[np.float64] = hidden @ self.out_weight.astype(np.float64) + self.out_bias
        return logits

    def probability(self, raw: NDArray[np.float64], /) -> NDArray[np.float64]:
        return _sigmoid(raw)


class ClipHeads:
    """Runs the tower once per picture and every head on its embedding.

    backend: gives image embeddings (picture, dimension) before normalisation. Several views of a picture (see
    `safeguard.images`) are scored and the worst counts. Tensors on the device of the backend go through
    preprocessing and tower there; embeddings come to the host.
    """

    modality: Modality = "image"

    def __init__(
        self,
        backend: Backend,
        heads: Sequence[Head],
        image: ImagePreprocess,
        *,
        name: str = "clip_heads",
        input: str = "pixel_values",
        output: str = "image_embeds",
        digest: str | None = None,
        operating_points: Mapping[str, Scores] | None = None,
        batch_size: int = 8,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        self.labels = tuple(head.category for head in heads)
        if not heads or len(set(self.labels)) != len(heads):
            raise ValueError(f"each head needs a category of its own, got {list(self.labels)}")
        self._dimension = heads[0].dimension
        if any(head.dimension != self._dimension for head in heads):
            raise ValueError(
                f"heads of one tower have one dimension, got {[head.dimension for head in heads]}"
            )
        self.name, self.digest = name, digest
        self.operating_points = {point: dict(scores) for point, scores in (operating_points or {}).items()}
        self._backend, self._heads, self._image = backend, tuple(heads), image
        self._input, self._output = input, output
        self._batch_size, self._max_frames = batch_size, max_frames

    @classmethod
    def load(
        cls,
        pack: str | Path | Pack,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_frames: int = MAX_FRAMES,
    ) -> ClipHeads:
        """The tower and heads in a model pack of kind clip_heads, whose heads lie in `heads.npz`."""
        found = (pack if isinstance(pack, Pack) else resolve(pack)).expect("clip_heads")
        manifest = found.manifest
        return cls(
            open_model(found, device, threads),
            read_heads(HEADS_NAME, found.read(HEADS_NAME)),
            image_spec(found),
            name=manifest.name,
            input=manifest.model.inputs[0],
            output=manifest.model.outputs[0],
            digest=found.digest,
            operating_points=manifest.operating_points,
            batch_size=rows_of_a_run(manifest, device),
            max_frames=max_frames,
        )

    def __call__(self, batch: Sequence[Any], /) -> list[Finding]:
        """One finding per picture, in order: a probability for each head's category."""
        prepared, raw = self._raw(batch)
        columns = [head.probability(raw[:, i]) for i, head in enumerate(self._heads)]
        return worst_views(np.stack(columns, axis=1), self.labels, prepared)

    def raw(self, batch: Sequence[Any], /) -> list[dict[str, float]]:
        """Raw scores per picture, the largest over its views: logits, or margins for `Concepts`."""
        prepared, raw = self._raw(batch)
        return [dict(finding.scores) for finding in worst_views(raw, self.labels, prepared)]

    def _raw(self, batch: Sequence[Any]) -> tuple[Prepared, NDArray[np.float64]]:
        prepared = prepare(
            batch, self._image, max_frames=self._max_frames, keep_on=tensor_device(self._backend)
        )
        raw = np.empty((len(prepared.array), len(self._heads)))  # (view, head)
        for start in range(0, len(raw), self._batch_size):
            rows = prepared.array[start : start + self._batch_size]
            found = self._backend({self._input: rows})[self._output]
            if found.shape != (len(rows), self._dimension):
                wanted = (len(rows), self._dimension)
                raise ValueError(f"the tower gave embeddings of shape {found.shape}, the heads need {wanted}")
            embeddings = np.where(np.isfinite(found), found, np.nan).astype(np.float64)
            raw[start : start + len(rows)] = np.stack([head.raw(embeddings) for head in self._heads], axis=1)
        return prepared, raw


_KINDS: dict[str, type[PromptPair] | type[Concepts] | type[Perceptron]] = {
    "prompts": PromptPair,
    "concepts": Concepts,
    "perceptron": Perceptron,
}
_FIELDS = {
    "prompts": ("prompts", "scale"),
    "concepts": ("concepts", "thresholds", "special", "special_thresholds"),
    "perceptron": ("weight", "bias", "out_weight", "out_bias"),
}
_NUMBERS = ("scale", "out_bias")


def write_heads(path: Path, heads: Sequence[PromptPair | Concepts | Perceptron]) -> None:
    """Writes heads as one `.npz` or `.safetensors`, with the keys category:kind:field."""
    arrays: dict[str, NDArray[Any]] = {}
    for head in heads:
        kind = next(kind for kind, made in _KINDS.items() if isinstance(head, made))
        for name in _FIELDS[kind]:
            arrays[f"{head.category}:{kind}:{name}"] = np.asarray(getattr(head, name), order="C")
    with replaced(path) as part:
        if path.suffix == ".safetensors":
            _safetensors().save_file(arrays, part)
        else:
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)


def read_heads(path: str | Path, content: bytes | None = None) -> list[Head]:
    """The heads that `write_heads` wrote, by category. PackError for any other file; never unpickles.

    content: what the file holds, where it was read already.
    """
    path = Path(path)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key, array in sorted(read_arrays(path, content).items()):
        category, _, rest = key.partition(":")
        kind, _, name = rest.partition(":")
        if kind not in _KINDS or name not in _FIELDS[kind]:
            raise PackError(f"{path.name}: {key!r} must be category:kind:field, kinds: {', '.join(_KINDS)}")
        is_number = array.ndim == 0 or (name in _NUMBERS and array.size == 1)  # (1,) in older files
        found.setdefault((category, kind), {})[name] = array.item() if is_number else array
    try:
        return [_KINDS[kind](category, **fields) for (category, kind), fields in found.items()]
    except (TypeError, ValueError) as exc:
        raise PackError(f"{path.name} holds no complete head: {exc}") from exc


def read_arrays(path: Path, content: bytes | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of a `.npz`, `.npy` (under the key "array") or `.safetensors` file; PackError for any pickle."""
    try:
        if content is None:
            content = path.read_bytes()
        if path.suffix == ".safetensors":
            return dict(_safetensors().load(content))
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"array": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError) as exc:
        raise PackError(f"{path.name} holds no plain arrays: {exc}") from exc


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as exc:
        raise MissingExtra("safetensors", "torch") from exc
    return safetensors.numpy


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1; a row of zeros has no direction and becomes NaN."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, np.nan)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * x))
    return result
