"""TensorRT backend, for `tensorrt` and `tensorrt_rtx`: engines that were built before, never in a request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from safeguard.backends import Arrays
from safeguard.backends.engine_cache import EngineCache, read_engine
from safeguard.backends.engine_spec import EngineSpec, model_digest, numpy_type, sizes
from safeguard.backends.tensorrt_flavours import (
    FLAVOURS,
    TensorRT,
    fits_architecture,
    load_flavour,
)
from safeguard.errors import BackendError

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".engine", ".plan"})


class BucketLane(Protocol):
    """Runs inputs of one bucket; `lock` is held by its user."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    @property
    def has_graph(self) -> bool: ...

    def warm(self) -> None: ...

    def run(
        self, inputs: Mapping[str, Any], rows: int, length: int | None, padding: Mapping[str, float]
    ) -> dict[str, Any]: ...


class TensorRTBackend:
    """Runs an engine: inputs are padded up to a bucket, outputs cut back to what was given.

    make_lane: (profile, batch, length) -> the lane of that bucket; made when first used, or by `warmup`.
    as_rows: what turns an input into rows that a lane takes. padding: input -> value behind the end of a
    shorter row, 0 where none is given. tensor_device: where tensors are taken as they are. Safe across
    threads: a lane serves one of them at a time.
    """

    def __init__(
        self,
        spec: EngineSpec,
        make_lane: Callable[[int, int, int | None], BucketLane],
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        as_rows: Callable[[Any], Any] = np.asarray,
        padding: Mapping[str, float] | None = None,
        tensor_device: str | None = None,
    ) -> None:
        _named("inputs", inputs, [s.name for s in spec.inputs], exactly=True)
        _named("outputs", outputs, [s.name for s in spec.outputs])
        self.spec = spec
        self.tensor_device = tensor_device
        self._make_lane, self._as_rows = make_lane, as_rows
        self._outputs, self._padding = tuple(outputs), dict(padding or {})
        self._lanes: dict[tuple[int | None, int], BucketLane] = {}
        self._making = Lock()

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        """Runs the engine, in several runs where the batch is larger than its largest bucket.

        Tensors in GPU memory are taken without a copy through the host. Floats come back as float32.
        Raises BackendError for inputs that are missing or of the wrong shape or type, for lengths that no
        bucket holds, and when the run itself fails.
        """
        given = {s.name: self._as_rows(inputs[s.name]) for s in self.spec.inputs if s.name in inputs}
        rows, length = sizes(self.spec.inputs, given)
        padded = None if length is None else self.spec.buckets.length(length)
        parts: list[dict[str, NDArray[Any]]] = []
        for start, end, batch in self.spec.buckets.runs(rows):
            part = {name: value[start:end] for name, value in given.items()}
            with _cuda_errors():
                lane = self._lane(padded, batch)
                with lane.lock:
                    parts.append(lane.run(part, end - start, length, self._padding))
        return {name: self._joined(name, parts, length) for name in self._outputs}

    def warmup(self, *, lengths: Collection[int] = (), batches: Collection[int] = ()) -> None:
        """Makes lanes and captures their CUDA graphs; for these lengths and batches only, where given."""
        for length in self.spec.buckets.profiles():
            for batch in self.spec.buckets.batches:
                if (not lengths or length in lengths) and (not batches or batch in batches):
                    with _cuda_errors():
                        self._lane(length, batch).warm()
        log.info("warmed up: lanes=%d graphs=%d", len(self._lanes), self.graphs)

    @property
    def graphs(self) -> int:
        """How many buckets run as a CUDA graph by now."""
        return sum(lane.has_graph for lane in list(self._lanes.values()))

    def _lane(self, length: int | None, batch: int) -> BucketLane:
        found = self._lanes.get((length, batch))
        if found is not None:
            return found
        with self._making:
            if (length, batch) not in self._lanes:
                profile = self.spec.buckets.profiles().index(length)
                self._lanes[length, batch] = self._make_lane(profile, batch, length)
            return self._lanes[length, batch]

    def _joined(self, name: str, parts: Sequence[Arrays], length: int | None) -> NDArray[Any]:
        if len(parts) == 1:
            return parts[0][name]
        if parts:
            return np.concatenate([part[name] for part in parts])
        spec = next(s for s in self.spec.outputs if s.name == name)
        return np.zeros(spec.shape(0, length), numpy_type(spec))


def open_engine(
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    device: str,
    external: Collection[str] = (),
    content: bytes | None = None,
    padding: Mapping[str, float] | None = None,
    cache: EngineCache | None = None,
) -> TensorRTBackend:
    """An engine file with its description beside it, or the cached engine of an ONNX file.

    device: "tensorrt", "tensorrt:1", "tensorrt_rtx"; for an engine file "cuda" and "cuda:1" too, and the
    flavour must be the engine's. content: what the file holds, where it was read already. cache: where
    engines of ONNX files are looked for, the user's by default.
    Raises BackendError where no engine was built (nothing is built here; the message names the command),
    where it is altered, or for another version, architecture or device; MissingExtra without TensorRT.
    """
    kind, index = _device(device)
    if path.suffix in SUFFIXES:
        spec, engine = read_engine(path, content=content)
        if kind not in ("cuda", spec.flavour):
            raise BackendError(
                f"{path.name} is an engine of {spec.flavour}: ask for device cuda or {spec.flavour}, "
                f"got {device!r}"
            )
        flavour = load_flavour(spec.flavour)
    elif path.suffix != ".onnx" or kind == "cuda":
        raise BackendError(f"engines are built of .onnx files, not of {path.name}")
    else:
        flavour = load_flavour(kind)
        model = model_digest(path, external, content=content)
        spec, engine = _cached(path, model, flavour, index, cache or EngineCache())
    if spec.version != flavour.version:
        raise BackendError(
            f"{path.name} was built by {spec.flavour} {spec.version}, installed is {flavour.version}; "
            f"{_command(path, flavour.name)}"
        )
    return _opened(spec, engine, flavour, index, inputs=inputs, outputs=outputs, padding=padding)


@contextmanager
def _cuda_errors() -> Iterator[None]:
    """Turns what torch raises for CUDA's errors, a full memory among them, into a BackendError."""
    try:
        yield
    except RuntimeError as exc:
        raise BackendError(f"the engine failed to run: {exc}") from exc


def _opened(spec: EngineSpec, engine: bytes, flavour: TensorRT, index: int, **names: Any) -> TensorRTBackend:
    from safeguard.backends import tensorrt_lanes as lanes  # which imports torch

    with _cuda_errors():
        loaded = lanes.CudaEngine(flavour, spec, engine, index)
    return TensorRTBackend(spec, loaded.lane, as_rows=lanes.as_rows, tensor_device=f"cuda:{index}", **names)


def _cached(
    path: Path, model: str, flavour: TensorRT, index: int, cache: EngineCache
) -> tuple[EngineSpec, bytes]:
    from safeguard.backends import tensorrt_lanes as lanes

    present = lanes.present_architecture(lanes.cuda_device(index))
    entry = cache.find(
        lambda spec: (
            (spec.flavour, spec.version, spec.model) == (flavour.name, flavour.version, model)
            and fits_architecture(spec.architecture, present)
        )
    )
    if entry is None:
        raise BackendError(
            f"no engine of {flavour.name} {flavour.version} for {path.name} on {present} is in "
            f"{cache.folder}; {_command(path, flavour.name)}"
        )
    return entry.spec, entry.engine


def _command(path: Path, flavour: str) -> str:
    option = "" if flavour == "tensorrt" else f" --flavour {flavour}"
    return f"build it first: safeguard export tensorrt {path}{option}"


def _device(device: str) -> tuple[str, int]:
    kind, colon, number = device.partition(":")
    known = ("cuda", *FLAVOURS)
    if kind not in known or (colon and not (number.isascii() and number.isdecimal())):
        raise BackendError(
            f"an engine runs on {', '.join(known)}, with :<number> for another GPU; got device {device!r}"
        )
    return kind, int(number) if colon else 0


def _named(what: str, wanted: Sequence[str], found: Sequence[str], *, exactly: bool = False) -> None:
    if set(wanted) - set(found) or (exactly and set(found) != set(wanted)):
        raise BackendError(f"the engine has {what} {', '.join(found)}; its pack says {', '.join(wanted)}")
