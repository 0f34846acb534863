"""ONNX files as TensorRT engines, for `tensorrt` and `tensorrt_rtx`: parsed, optimised per bucket, cached.

Networks are strongly typed: fp16 and bf16 come from the types in the ONNX file, fp8 from its quantisation
nodes (`safeguard.exporters.fp8`). The graph must be of the decomposed kind
(`export_graph(..., flavour="decomposed")`).
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safeguard.backends.engine_cache import EngineCache, Entry, is_ours
from safeguard.backends.engine_spec import Axis, Buckets, EngineKey, TensorSpec, model_digest
from safeguard.backends.tensorrt_flavours import (
    TensorRT,
    architecture_of,
    join_architectures,
    load_flavour,
)
from safeguard.errors import BackendError, ExportError, MissingExtra
from safeguard.files import write_whole

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a phase, how many of its steps are done, and how many there are; from several threads."""

_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_TRAILER = re.compile(r" \[\w+\.cpp::.*")  # that no GPU was found meanwhile, which is no reason
_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION")


def build_engine(
    model: Path,
    *,
    flavour: str = "tensorrt",
    buckets: Buckets | None = None,
    architectures: Sequence[str] = (),
    device: int = 0,
    cache: EngineCache | None = None,
    rebuild: bool = False,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
) -> Entry:
    """The engine of an ONNX file, from the cache, or built into it, which takes from seconds to minutes.

    buckets: sizes to optimise for; a model without a length takes the batches alone. architectures: GPUs to
    build for, such as "sm89", for tensorrt_rtx alone, which builds for every GPU from Ampere on by default;
    tensorrt builds for the GPU of number `device`, which must be there. workspace_bytes: most scratch memory
    of one layer, all of the GPU's by default.
    Raises ExportError naming node, operator and reason for a file that TensorRT cannot parse or build;
    BackendError without the GPU or a known architecture; MissingExtra without TensorRT.
    """
    trt = load_flavour(flavour)
    architecture, on_device = _target(trt, architectures, device)
    external = weight_files(model)
    if trt.is_rtx:
        _refuse_attention(model)
    cache = cache or EngineCache()
    parsed = _parse(trt, model)
    inputs, outputs = describe(parsed.network)
    key = EngineKey(
        flavour=trt.name,
        version=trt.version,
        architecture=architecture,
        model=model_digest(model, external),
        precision=precision_of(parsed.network),
        buckets=_for_model(buckets or Buckets(), inputs, model),
        inputs=inputs,
        outputs=outputs,
    )

    def build() -> bytes:
        timing = cache.folder / f"timing-{trt.version}-{architecture}.bin" if trt.has_timing_cache else None
        config = _configure(parsed, key, architectures, workspace_bytes)
        with on_device:
            return _build(parsed, config, timing, progress)

    return cache.get_or_build(key, build, rebuild=rebuild)


def describe(network: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a parsed network. Raises ExportError for axes that are no batch and no length."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return tuple(map(_tensor, inputs)), tuple(map(_tensor, outputs))


def precision_of(network: Any) -> str:
    """Number type of most matrix products; of their quantised inputs (float8, int8) where they have those."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        if layer.type.name == "DEQUANTIZE" and layer.get_input(0).dtype.name in ("FP8", "INT8"):
            return "float8" if layer.get_input(0).dtype.name == "FP8" else "int8"
    types = Counter(layer.get_output(0).dtype.name for layer in layers if layer.type.name in _PRODUCTS)
    return _TYPES.get(types.most_common(1)[0][0], "float32") if types else "float32"


def _tensor(tensor: Any) -> TensorSpec:
    shape = tuple(tensor.shape)
    kind = "input" if tensor.is_network_input else "output"
    if tensor.dtype.name not in _TYPES:
        raise ExportError(f"{kind} {tensor.name!r}", f"its type is {tensor.dtype.name}, which no array has")
    if not shape or shape[0] != -1:
        raise ExportError(f"{kind} {tensor.name!r}", f"axis 0 must be a dynamic batch, its shape is {shape}")
    if shape.count(-1) > 2:
        raise ExportError(
            f"{kind} {tensor.name!r}", f"only batch and length may be dynamic, its shape is {shape}"
        )
    rest: list[Axis] = ["length" if size == -1 else size for size in shape[1:]]
    return TensorSpec(name=tensor.name, dtype=_TYPES[tensor.dtype.name], axes=("batch", *rest))


def _for_model(buckets: Buckets, inputs: Sequence[TensorSpec], model: Path) -> Buckets:
    has_length = any("length" in spec.axes for spec in inputs)
    if has_length and not buckets.lengths:
        raise ExportError(model.name, "its inputs have a length, so at least one length bucket is needed")
    return buckets if has_length else Buckets(lengths=(), batches=buckets.batches)


def _target(
    trt: TensorRT, architectures: Sequence[str], device: int
) -> tuple[str, AbstractContextManager[Any]]:
    """(architecture of the engine, what makes its GPU the current one)."""
    if trt.is_rtx:
        return join_architectures(architectures), nullcontext()
    try:
        import torch
    except ImportError as exc:
        raise MissingExtra("torch", "torch") from exc
    count = torch.cuda.device_count()
    if device >= count:
        raise BackendError(
            f"tensorrt builds on the GPU that the engine is for: asked for number {device}, "
            f"torch sees {count}; tensorrt_rtx needs none"
        )
    return architecture_of(torch.cuda.get_device_capability(device)), torch.cuda.device(device)


def weight_files(model: Path) -> tuple[str, ...]:
    """Names of the files beside an ONNX file that hold weights of it; ExportError for any other place."""
    found = {e.value for t in _graph(model).initializer for e in t.external_data if e.key == "location"}
    for name in found:
        if PurePosixPath(name).name != name or name == "..":
            raise ExportError(model.name, f"it keeps weights in {name!r}, which is not in its own folder")
    return tuple(sorted(found))


def _graph(model: Path) -> Any:
    try:
        import onnx
    except ImportError as exc:
        raise MissingExtra("onnx", "export") from exc
    try:
        return onnx.load(str(model), load_external_data=False).graph
    except OSError:
        raise
    except Exception as exc:  # protobuf's DecodeError, and what onnx makes of it
        raise ExportError(model.name, f"it is no ONNX file: {exc}") from exc


def _refuse_attention(model: Path) -> None:
    """TensorRT-RTX parses attention as one operator and then says, after the build, that it has no kernel."""
    for node in _graph(model).node:
        if node.op_type == "Attention":
            raise ExportError(
                model.name,
                f"node {node.name!r}: tensorrt_rtx builds no attention as one operator; "
                "export it again with --flavour decomposed",
                operator="Attention",
            )


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A network with all that must live as long: the parser owns its weights, the logger hears them all."""

    trt: TensorRT
    model: Path
    builder: Any
    network: Any
    parser: Any
    logger: Any


def _parse(trt: TensorRT, model: Path) -> _Parsed:
    logger = trt.logger()
    builder = trt.module.Builder(logger)
    network = builder.create_network(trt.network_flags())
    parser = trt.module.OnnxParser(network, logger)
    if parser.parse_from_file(str(model)):
        return _Parsed(trt, model, builder, network, parser, logger)
    if not parser.num_errors:
        raise ExportError(model.name, "; ".join(logger.errors[:2]) or "TensorRT cannot parse it")
    error = parser.get_error(0)
    where = f"node {error.node_name()!r}: " if error.node_name() else ""
    raise ExportError(model.name, where + _reason(error), operator=error.node_operator() or None)


def _reason(error: Any) -> str:
    """The parser's words for an error, with those that every unknown operator gets put plainly."""
    text = _TRAILER.sub("", " ".join(str(error.desc()).split()))
    unknown = f"TensorRT knows no such operator ({error.code().name})"
    return unknown if "Plugin not found" in text else f"{text} ({error.code().name})"


def _configure(
    parsed: _Parsed, key: EngineKey, architectures: Sequence[str], workspace_bytes: int | None
) -> Any:
    module = parsed.trt.module
    config = parsed.builder.create_builder_config()
    parsed.trt.prepare_builder(config, sorted(set(architectures)))
    if workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, workspace_bytes)
    # names and tensors of every layer can be read out of the engine
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    for shapes in profile_shapes(key.inputs, key.buckets):
        profile = parsed.builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(parsed.model.name, f"it takes no optimisation profile of shapes {shapes}")
    return config


Shape = tuple[int, ...]


def profile_shapes(
    inputs: Sequence[TensorSpec], buckets: Buckets
) -> Iterator[dict[str, tuple[Shape, Shape, Shape]]]:
    """Smallest, usual and largest shape of each input, one optimisation profile after the other.

    The length of a profile is fixed, since inputs are padded up to it, so that kernels are made for just
    that; only the batch may vary.
    """
    batches = buckets.batches
    usual = batches[len(batches) // 2]
    for length in buckets.profiles():
        yield {
            spec.name: (
                spec.shape(batches[0], length),
                spec.shape(usual, length),
                spec.shape(batches[-1], length),
            )
            for spec in inputs
        }


def _build(parsed: _Parsed, config: Any, timing: Path | None, progress: Progress | None) -> bytes:
    """The engine; timing: file of measured kernel times, read and written, where the flavour has those."""
    name, trt = parsed.model.name, parsed.trt
    if timing is not None:
        known = timing.read_bytes() if timing.is_file() and is_ours(timing) else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    monitor = _monitor(trt.module, progress)
    config.progress_monitor = monitor
    log.info("building an engine: model=%s flavour=%s", name, trt.name)
    start = time.monotonic()
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if engine is None:
        raise ExportError(name, f"{trt.name} cannot build it: {'; '.join(parsed.logger.errors[-2:])}")
    if timing is not None:
        write_whole(timing, bytes(memoryview(config.get_timing_cache().serialize())))
    log.info("built an engine: model=%s seconds=%.1f", name, time.monotonic() - start)
    return bytes(memoryview(engine))


def _monitor(module: Any, progress: Progress | None) -> Any:
    """What TensorRT tells of its progress; an exception of `progress`, or Ctrl-C in it, ends the build."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # a class of the untyped library
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self.tell(phase_name, self.steps.get(phase_name, 0))

        def tell(self, phase: str, done: int) -> None:
            if progress is None or self.stopped is not None:
                return
            try:
                progress(phase, done, self.steps.get(phase, 0))
            except BaseException as exc:  # it may not cross TensorRT's own frames: raised after the build
                self.stopped = exc

    return Monitor()
