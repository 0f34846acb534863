"""What a TensorRT engine takes and gives, its buckets, and how arrays are padded up to one and cut back.

Everything here is plain arithmetic on arrays: it needs neither TensorRT nor a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safeguard.errors import BackendError
from safeguard.packs import canonical_digest, file_digest, open_file

LENGTHS = (16, 32, 64, 128, 256, 512)
"""Lengths in tokens for which an engine is built by default."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes by default: at most half of a run is padding."""
SPEC_SUFFIX = ".json"
"""An engine `x.engine` has its description beside it, in `x.engine.json`."""
_SPEC_LIMIT = 1_000_000  # bytes

Axis = Literal["batch", "length"] | Annotated[int, Field(ge=0)]
Flavour = Literal["tensorrt", "tensorrt_rtx"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Buckets(_Part):
    """The sizes that an engine is optimised for; an input is padded up to the next one.

    lengths: tokens, empty for models without a length (images). batches: rows of one run; larger inputs take
    several runs.
    """

    lengths: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = LENGTHS
    batches: Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(min_length=1)] = BATCHES

    @field_validator("lengths", "batches")
    @classmethod
    def _ascend(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if any(small >= large for small, large in pairwise(sizes)):
            raise ValueError(f"buckets must ascend, got {', '.join(map(str, sizes))}")
        return sizes

    def length(self, tokens: int) -> int:
        """The smallest length that holds so many tokens; BackendError when none does."""
        return _ceiling(self.lengths, tokens, "length")

    def runs(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, batch) of each run over so many rows: full batches first, the rest padded up."""
        largest = self.batches[-1]
        for start in range(0, rows, largest):
            end = min(start + largest, rows)
            yield start, end, _ceiling(self.batches, end - start, "batch")

    def profiles(self) -> tuple[int | None, ...]:
        """The length of each optimisation profile, in order; one profile without a length for images."""
        return self.lengths or (None,)


class TensorSpec(_Part):
    """One input or output: name, numpy type (or bfloat16) and axes; axis 0 is always the batch."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
    axes: Annotated[tuple[Axis, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _batch_comes_first(self) -> Self:
        if self.axes[0] != "batch" or "batch" in self.axes[1:]:
            raise ValueError(f"axis 0 of {self.name!r}, and no other, must be the batch, got {self.axes}")
        return self

    def shape(self, batch: int, length: int | None) -> tuple[int, ...]:
        """Its shape at that batch and length."""
        sizes = {"batch": batch, "length": length or 0}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)


class EngineSpec(_Part):
    """All that must be known of an engine before it is loaded.

    architecture: "sm90" and the like, or "portable" for TensorRT-RTX engines for Ampere and later. model:
    digest of the ONNX file and its weight files. engine: SHA-256 of the engine itself. precision: number type
    of its matrix products.
    """

    format: Literal[1] = 1
    flavour: Flavour
    version: str
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9+]{1,64}$")]
    model: Sha256
    precision: str
    buckets: Buckets
    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    engine: Sha256
    size_bytes: Annotated[int, Field(ge=1)]
    built: str = ""

    @classmethod
    def read(cls, path: Path) -> EngineSpec:
        """The description in a file. Raises BackendError when it is missing or says nothing valid."""
        try:
            with path.open("rb") as file:
                raw = file.read(_SPEC_LIMIT + 1)
            if len(raw) > _SPEC_LIMIT:
                raise BackendError(
                    f"{path.name} is larger than {_SPEC_LIMIT} bytes, so it describes no engine"
                )
            return cls.model_validate_json(raw)
        except OSError as exc:
            raise BackendError(
                f"the engine's description {path.name} cannot be read: {exc.strerror}"
            ) from exc
        except ValidationError as exc:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()[:3])
            raise BackendError(f"{path.name} describes no engine: {wrong}") from exc

    def to_json(self) -> str:
        """As text for the file beside the engine."""
        return self.model_dump_json(indent=2) + "\n"


class EngineKey(_Part):
    """What an engine depends on; engines of equal keys are interchangeable, so the cache is keyed by it."""

    flavour: Flavour
    version: str
    architecture: str
    model: str
    precision: str
    buckets: Buckets
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, spec: EngineSpec) -> EngineKey:
        """The key of a built engine."""
        return cls(**{name: getattr(spec, name) for name in cls.model_fields})

    @property
    def digest(self) -> str:
        """64 hex digits, another for every other key."""
        return canonical_digest(self.model_dump(mode="json"))


def model_digest(path: Path, external: Iterable[str] = (), *, content: bytes | None = None) -> str:
    """Digest of an ONNX file and of those of the `external` files, in its folder, that it names.

    This is the part of a pack's digest that an engine depends on: a new threshold needs no new engine.
    content: what the file holds, where it was read already. Raises PackError for a file that is not there.
    """
    if content is None:
        with open_file(path) as file:
            content = file.read()
    named = sorted(name for name in set(external) if name != path.name and name.encode() in content)
    files = {name: file_digest(path.parent / name) for name in named if (path.parent / name).is_file()}
    return canonical_digest({"model": hashlib.sha256(content).hexdigest(), "external": files})


def sizes(specs: Sequence[TensorSpec], inputs: Mapping[str, Any]) -> tuple[int, int | None]:
    """(rows, length) of a set of inputs; the length is None where no input has one.

    Raises BackendError for inputs that are missing, have another rank, kind or fixed size than described, or
    disagree among themselves.
    """
    rows: dict[str, int] = {}
    lengths: dict[str, int] = {}
    for spec in specs:
        if spec.name not in inputs:
            missing = ", ".join(s.name for s in specs if s.name not in inputs)
            raise BackendError(
                f"the engine needs inputs {', '.join(s.name for s in specs)}; missing: {missing}"
            )
        shape = tuple(inputs[spec.name].shape)
        fits = len(shape) == len(spec.axes) and all(
            isinstance(axis, str) or axis == size for axis, size in zip(spec.axes, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, spec.axes))
            raise BackendError(f"input {spec.name!r} must have shape ({wanted}), got {shape}")
        _kind_fits(spec, str(inputs[spec.name].dtype))
        rows[spec.name] = shape[0]
        if "length" in spec.axes:
            lengths[spec.name] = shape[spec.axes.index("length")]
    for what, found in (("batch", rows), ("length", lengths)):
        if len(set(found.values())) > 1:
            raise BackendError(f"inputs must have the same {what}, got {found}")
    return next(iter(rows.values())), next(iter(lengths.values()), None)


def fill(buffer: Any, rows: Any, spec: TensorSpec, *, padding: float = 0) -> None:
    """Writes rows into the front of a larger buffer, in place.

    Shorter rows are padded at their end; the rows that are left over repeat the first one: a row of nothing
    but padding may give NaN, which some kernels are slow on. Arrays and tensors both; rows must not be empty.
    """
    count = len(rows)
    if "length" in spec.axes:
        axis = spec.axes.index("length")
        before = (slice(None),) * (axis - 1)
        length = rows.shape[axis]
        buffer[(slice(0, count), *before, slice(0, length))] = rows
        buffer[(slice(0, count), *before, slice(length, None))] = padding
    else:
        buffer[:count] = rows
    if count < len(buffer):
        buffer[count:] = buffer[:1]


def cut(values: Any, rows: int, length: int | None, spec: TensorSpec) -> Any:
    """The part of a run's output that belongs to the rows and tokens that really were there."""
    values = values[:rows]
    if length is None:
        return values
    return values[tuple(slice(0, length) if axis == "length" else slice(None) for axis in spec.axes)]


def numpy_type(spec: TensorSpec) -> np.dtype[Any]:
    """The type in which a tensor leaves the backend: float32 for every float, as from the others."""
    return np.dtype("float32" if "float" in spec.dtype else spec.dtype)


def _ceiling(sizes: Sequence[int], wanted: int, what: str) -> int:
    found = next((size for size in sizes if size >= wanted), None)
    if found is None:
        largest = sizes[-1] if sizes else 0
        raise BackendError(f"the engine takes a {what} of at most {largest}, got {wanted}")
    return found


_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_INTEGERS = frozenset({"bool", "uint8", "int8", "int16", "int32", "int64"})


def _kind_fits(spec: TensorSpec, dtype: str) -> None:
    """Raises BackendError where writing would change values without a word, as floats to integers would."""
    found = dtype.removeprefix("torch.")
    if "float" in spec.dtype:
        fits = found in _FLOATS
    else:
        wide = spec.dtype in ("int64", "int32")
        fits = found in _INTEGERS if wide else found == spec.dtype
    if not fits:
        raise BackendError(f"input {spec.name!r} must hold {spec.dtype}, got {found}")
