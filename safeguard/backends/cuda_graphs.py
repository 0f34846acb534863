"""CUDA graphs for a torch module: one captured forward per bucket, replayed with one call to the driver.

A BERT launches some 150 small kernels; at batch 1 launching them costs several times what they compute.
Here each (batch, length) bucket has fixed buffers and one graph; inputs are padded up, outputs cut back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.backends import Arrays, Precision
from safeguard.backends.engine_spec import Buckets, TensorSpec, cut, fill, sizes
from safeguard.backends.tensorrt_lanes import as_rows, is_on_device
from safeguard.backends.torch import torch_device
from safeguard.errors import BackendError, MissingExtra

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", "torch") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_WARM_RUNS = 3  # before a capture: lazily loaded kernels and cuBLAS's workspace must be there
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def text_inputs(*names: str) -> tuple[TensorSpec, ...]:
    """Specs of token inputs (row, token) int64; input_ids and attention_mask where none is named."""
    axes = ("batch", "length")
    return tuple(
        TensorSpec(name=name, dtype="int64", axes=axes) for name in names or ("input_ids", "attention_mask")
    )


def image_inputs(size: int, name: str = "pixel_values") -> tuple[TensorSpec, ...]:
    """The spec of pixels (picture, 3, size, size) float32."""
    return (TensorSpec(name=name, dtype="float32", axes=("batch", 3, size, size)),)


class GraphBackend:
    """Runs a module through CUDA graphs.

    The module takes its inputs by name and gives one tensor, a tuple in the order of `outputs`, or a mapping;
    axis 0 of each output is the batch. Arrays go through pinned memory, tensors on the GPU are taken there.
    dtype: of the module's numbers; outputs come back as float32. compile_with: a backend of `torch.compile`,
    such as "inductor", under the graphs: fused kernels, at 10 to 60 s a bucket. capture: without it the
    same buffers and buckets are used and nothing is captured, which works on every device.

    A bucket is captured when it first comes, or by `warmup`, which servers should call. Safe across threads:
    a bucket serves one of them at a time, and one stream all of them. The module must not look at values on
    the host (`.item()`), nor depend on anything but its inputs.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        buckets: Buckets,
        device: str = "cuda",
        dtype: Precision = "float16",
        compile_with: str | None = None,
        capture: bool = True,
        padding: Mapping[str, float] | None = None,
    ) -> None:
        self._device = torch_device(device)
        self.tensor_device = str(self._device) if self._device.type == "cuda" else None
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if capture and self._device.type != "cuda":
            raise BackendError(f"CUDA graphs need a device cuda, the device asked for is {device}")
        if not buckets.lengths and any("length" in spec.axes for spec in inputs):
            raise ValueError("inputs with a length need buckets with lengths")
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._buckets, self._padding = buckets, dict(padding or {})
        self._process = os.getpid()
        moved = module.to(self._device, _DTYPES[dtype]).eval()
        self._module: Any = moved
        if compile_with is not None:
            self._module = torch.compile(moved, backend=compile_with, dynamic=False)
        self._dtype, self.captures, self.compiles = _DTYPES[dtype], capture, compile_with is not None
        self._lanes: dict[tuple[int, int | None], _Lane] = {}
        self._making = Lock()
        self.enqueue = Lock()  # held while work reaches the stream: during a capture all of it is recorded
        is_cuda = self._device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(self._device) if is_cuda else None
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def __call__(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        """Runs the module, in several runs where the batch is larger than its largest bucket.

        Raises BackendError for inputs that are missing or of the wrong shape or type, for lengths that no
        bucket holds, in a forked process, and when the run itself fails.
        """
        if os.getpid() != self._process:
            raise BackendError("the module was loaded before this process was forked; load it here")
        given = {s.name: as_rows(inputs[s.name]) for s in self._inputs if s.name in inputs}
        rows, length = sizes(self._inputs, given)
        padded = None if length is None else self._buckets.length(length)
        parts = []
        for start, end, batch in self._buckets.runs(rows) if rows else [(0, 0, self._buckets.batches[0])]:
            with _cuda_errors():
                lane = self._lane(batch, padded)
                with lane.lock:
                    part = {name: value[start:end] for name, value in given.items()}
                    parts.append(lane.run(part, end - start, self._padding))
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def warmup(
        self,
        examples: Sequence[Arrays] = (),
        *,
        lengths: Collection[int] = (),
        batches: Collection[int] = (),
    ) -> None:
        """Captures the buckets of these lengths and batches, all of them by default, or those of examples."""
        for example in examples:
            self(example)
        if examples:
            return
        for batch in reversed(self._buckets.batches):  # the largest first: the others fit into its memory
            for length in reversed(self._buckets.profiles()):
                if (not lengths or length in lengths) and (not batches or batch in batches):
                    with _cuda_errors():
                        self._lane(batch, length)
        log.info("warmed up: buckets=%d captured=%s", len(self._lanes), self.captures)

    @property
    def graphs(self) -> int:
        """How many buckets run as a CUDA graph by now."""
        return len(self._lanes) if self.captures else 0

    def replayer(self, batch: int, length: int | None) -> Callable[[], None]:
        """What enqueues one bucket's forward on `stream`, on whatever its buffers hold: for measuring."""
        rows = next(size for size in self._buckets.batches if size >= batch)
        return self._lane(rows, None if length is None else self._buckets.length(length)).replay

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work inside goes to the backend's own stream."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.stream is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self.stream))
            yield

    def forward(self, buffers: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of the module by name, float32, on the device."""
        tensors = {n: t.to(self._dtype) if t.is_floating_point() else t for n, t in buffers.items()}
        found = self._module(**tensors)
        if isinstance(found, Mapping):
            missing = [name for name in self._outputs if name not in found]
            if missing:
                raise BackendError(f"the module gave no {', '.join(missing)}; it gave {', '.join(found)}")
            return {name: found[name].float() for name in self._outputs}
        values = found if isinstance(found, tuple) else (found,)
        if len(values) != len(self._outputs):
            raise BackendError(f"the module gave {len(values)} outputs, expected {', '.join(self._outputs)}")
        return {name: value.float() for name, value in zip(self._outputs, values, strict=True)}

    def _lane(self, batch: int, length: int | None) -> _Lane:
        found = self._lanes.get((batch, length))
        if found is None:
            with self._making:
                found = self._lanes.get((batch, length))
                if found is None:
                    found = _Lane(self, self._inputs, batch, length, self._device)
                    self._lanes[batch, length] = found
        return found


class _Lane:
    """One bucket: its buffers on host and device and its graph. `lock` is held by whoever uses them."""

    def __init__(
        self,
        owner: GraphBackend,
        inputs: Sequence[TensorSpec],
        batch: int,
        length: int | None,
        device: torch.device,
    ) -> None:
        self.lock = Lock()
        self._owner, self._inputs = owner, tuple(inputs)
        self._graph: Any = None
        self._is_cuda = device.type == "cuda"
        with owner.enqueue, owner.on_stream():
            self._device = {s.name: _ones(s, batch, length, device) for s in self._inputs}
            self._host: dict[str, Any] = {}
            for _ in range(_WARM_RUNS if self._is_cuda else 1):
                results = self._forward()
            self._results: dict[str, Any] = results
            if owner.captures:
                owner.stream.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                # thread_local: other threads may go on allocating, on streams of their own
                with torch.cuda.graph(
                    self._graph, pool=owner.pool, stream=owner.stream, capture_error_mode="thread_local"
                ):
                    self._results = owner.forward(self._device)
                owner.stream.synchronize()
            self._done = torch.cuda.Event() if self._is_cuda else None
            self._out = {
                name: torch.empty(value.shape, dtype=value.dtype, pin_memory=self._is_cuda)
                for name, value in self._results.items()
            }
        for name, value in self._results.items():
            if len(value) != batch:
                raise BackendError(f"output {name!r} has {len(value)} rows for a batch of {batch}")

    def run(
        self, inputs: Mapping[str, Any], rows: int, padding: Mapping[str, float]
    ) -> dict[str, NDArray[Any]]:
        """Outputs of so many real rows, as arrays of their own. The lane's lock must be held."""
        owner = self._owner
        if rows == 0:
            return {name: value[:0].numpy().copy() for name, value in self._out.items()}
        on_host = [s for s in self._inputs if not is_on_device(inputs[s.name])]
        for spec in on_host:
            fill(self._pinned(spec), inputs[spec.name], spec, padding=padding.get(spec.name, 0))
        producers = [torch.cuda.current_stream(t.device) for t in inputs.values() if is_on_device(t)]
        with owner.enqueue, owner.on_stream():
            for producer in producers:  # what fills a tensor may still be running, on the caller's stream
                owner.stream.wait_stream(producer)
            for spec in self._inputs:
                buffer, value = self._device[spec.name], inputs[spec.name]
                if is_on_device(value):
                    fill(buffer, value, spec, padding=padding.get(spec.name, 0))
                    value.record_stream(owner.stream)
                else:
                    buffer.copy_(self._host[spec.name][0], non_blocking=True)
            self.replay()
            for name, value in self._results.items():
                self._out[name].copy_(value, non_blocking=True)
            if self._done is not None:
                self._done.record(owner.stream)
        if self._done is not None:
            self._done.synchronize()  # outside the lock: others enqueue meanwhile
        return {name: cut(value, rows, None, _ROWS).numpy().copy() for name, value in self._out.items()}

    def replay(self) -> None:
        """Enqueues the forward, without copies."""
        if self._graph is not None:
            self._graph.replay()
        else:
            with self._owner.on_stream():
                self._results = self._owner.forward(self._device)

    def _pinned(self, spec: TensorSpec) -> NDArray[Any]:
        """The host buffer as an array, since writing rows into it is many times slower through torch."""
        if spec.name not in self._host:
            like = self._device[spec.name]
            tensor = torch.zeros(like.shape, dtype=like.dtype, pin_memory=self._is_cuda)
            self._host[spec.name] = (tensor, tensor.numpy())
        array: NDArray[Any] = self._host[spec.name][1]
        return array

    def _forward(self) -> dict[str, Any]:
        """A run that may compile; beyond 8 shapes dynamo would run plain code without a word."""
        if not self._owner.compiles:
            return self._owner.forward(self._device)
        with torch._dynamo.config.patch(recompile_limit=512, fail_on_recompile_limit_hit=True):
            return self._owner.forward(self._device)


_ROWS = TensorSpec(name="rows", dtype="float32", axes=("batch",))


def _ones(spec: TensorSpec, batch: int, length: int | None, device: torch.device) -> torch.Tensor:
    """A first input: ones, and one padded place, so that kernels for masks are loaded before a capture."""
    made = torch.ones(spec.shape(batch, length), dtype=getattr(torch, spec.dtype), device=device)
    if "length" in spec.axes and (length or 0) > 1:
        made.select(spec.axes.index("length"), -1)[0] = 0
    return made


@contextmanager
def _cuda_errors() -> Iterator[None]:
    """Turns what torch raises for CUDA's errors, a full memory among them, into a BackendError."""
    try:
        yield
    except RuntimeError as exc:
        raise BackendError(f"the graph failed to run: {exc}") from exc
