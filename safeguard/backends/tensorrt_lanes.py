"""Where a TensorRT engine really runs: one lane per bucket, with its context, its buffers and its CUDA graph.

torch owns memory, streams and graphs: who guards a model on a GPU has it, its tensors come in without a copy
through the host, and its pinned memory and graph capture are what cuda-python would need a page of code for.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np

from safeguard.backends.engine_spec import EngineSpec, TensorSpec, cut, fill, numpy_type
from safeguard.backends.tensorrt_flavours import TensorRT, architecture_of, fits_architecture
from safeguard.errors import BackendError, MissingExtra

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", "torch") from exc

_ON_CUDA = 2  # kDLCUDA of dlpack.h
_WARM_RUNS = 3  # before a capture: lazily loaded kernels, and RTX's compiled ones, must be there


class CudaEngine:
    """An engine on one GPU, with one stream and one piece of scratch memory for all its lanes.

    All work goes through the one stream, in the order in which it was enqueued, so lanes can share scratch
    memory; `enqueue` is held while enqueueing, and while a graph is captured, since everything that reaches
    the stream meanwhile would become part of the graph.
    """

    def __init__(self, flavour: TensorRT, spec: EngineSpec, engine: bytes, index: int) -> None:
        self.flavour, self.spec = flavour, spec
        self.device = cuda_device(index)
        present = present_architecture(self.device)
        if not fits_architecture(spec.architecture, present):
            raise BackendError(f"the engine is for {spec.architecture}, the GPU is {present}; {REBUILD}")
        self.enqueue = Lock()
        with torch.cuda.device(self.device):
            self._runtime, self.engine = flavour.deserialize(engine)
            _agree(self.engine, spec)
            self.stream = torch.cuda.Stream(self.device)
            size = max(int(self.engine.device_memory_size_v2), 1)
            self.scratch = torch.empty(size, dtype=torch.uint8, device=self.device)

    def lane(self, profile: int, batch: int, length: int | None) -> Lane:
        """A new lane for one bucket."""
        return Lane(self, profile, batch, length)


class Lane:
    """One bucket: fixed shapes, own buffers on host and device, one execution context, one CUDA graph.

    TensorRT wants one context per captured graph. `lock` is held by whoever uses the buffers.
    """

    def __init__(self, owner: CudaEngine, profile: int, batch: int, length: int | None) -> None:
        self.lock = Lock()
        self._owner, self._graph = owner, None
        with owner.enqueue, torch.cuda.device(owner.device), torch.cuda.stream(owner.stream):
            self._done = torch.cuda.Event()
            self._device: dict[str, Any] = {}
            self._host: dict[str, Any] = {}
            for spec in (*owner.spec.inputs, *owner.spec.outputs):
                shape, dtype = spec.shape(batch, length), getattr(torch, spec.dtype)
                self._device[spec.name] = torch.zeros(shape, dtype=dtype, device=owner.device)
                self._host[spec.name] = torch.zeros(shape, dtype=dtype, pin_memory=True)
            self._context = owner.flavour.create_context(owner.engine)
            if self._context is None:
                raise BackendError("the engine gives no execution context; is the GPU's memory full?")
            stream = owner.stream.cuda_stream
            if not self._context.set_optimization_profile_async(profile, stream):
                raise BackendError(f"the engine has no optimisation profile {profile}; {REBUILD}")
            self._context.set_device_memory(owner.scratch.data_ptr(), owner.scratch.numel())
            for spec in owner.spec.inputs:
                if not self._context.set_input_shape(spec.name, spec.shape(batch, length)):
                    raise BackendError(
                        f"the engine refuses shape {spec.shape(batch, length)} of {spec.name!r}"
                    )
            for name, tensor in self._device.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            owner.stream.synchronize()
        # the host buffers as arrays, since writing rows into them is many times slower through torch
        self._arrays = {n: t.numpy() for n, t in self._host.items() if t.dtype is not torch.bfloat16}

    @property
    def has_graph(self) -> bool:
        """Whether runs replay a captured CUDA graph."""
        return self._graph is not None

    def warm(self) -> None:
        """Runs the bucket and captures its graph, where it can be captured. Call it before serving."""
        owner = self._owner
        with self.lock, owner.enqueue, torch.cuda.device(owner.device):
            with torch.cuda.stream(owner.stream):
                for _ in range(_WARM_RUNS):
                    self._execute()
                owner.stream.synchronize()
                if self._graph is not None or not owner.flavour.is_capturable(
                    self._context, owner.stream.cuda_stream
                ):
                    return
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on allocating, on streams of their own
            with torch.cuda.graph(graph, stream=owner.stream, capture_error_mode="thread_local"):
                self._execute()
            owner.stream.synchronize()
            self._graph = graph

    def run(
        self, inputs: Mapping[str, Any], rows: int, length: int | None, padding: Mapping[str, float]
    ) -> dict[str, Any]:
        """Outputs of so many real rows, as arrays of their own. The lane's lock must be held."""
        owner = self._owner
        with torch.cuda.device(owner.device):
            for spec in owner.spec.inputs:
                if not is_on_device(inputs[spec.name]):
                    host = self._arrays.get(spec.name, self._host[spec.name])
                    fill(host, _like(inputs[spec.name], host), spec, padding=padding.get(spec.name, 0))
            # what fills a tensor in GPU memory may still be running, on the caller's stream
            producers = [torch.cuda.current_stream(t.device) for t in inputs.values() if is_on_device(t)]
            with owner.enqueue, torch.cuda.stream(owner.stream):
                for producer in producers:
                    owner.stream.wait_stream(producer)
                for spec in owner.spec.inputs:
                    self._bring(inputs[spec.name], spec, padding.get(spec.name, 0))
                if self._graph is not None:
                    self._graph.replay()
                else:
                    self._execute()
                for spec in owner.spec.outputs:
                    self._host[spec.name].copy_(self._device[spec.name], non_blocking=True)
                self._done.record(owner.stream)
            self._done.synchronize()  # outside the lock: others enqueue meanwhile
        return {s.name: self._taken(s, rows, length) for s in owner.spec.outputs}

    def _bring(self, value: Any, spec: TensorSpec, padding: float) -> None:
        buffer = self._device[spec.name]
        if is_on_device(value):
            fill(buffer, value, spec, padding=padding)
            value.record_stream(self._owner.stream)
        else:
            buffer.copy_(self._host[spec.name], non_blocking=True)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._owner.stream.cuda_stream):
            raise BackendError("the engine failed to run; TensorRT's own messages are in the debug log")

    def _taken(self, spec: TensorSpec, rows: int, length: int | None) -> Any:
        values = cut(self._host[spec.name], rows, length, spec)
        if numpy_type(spec).kind == "f":
            values = values.float()
        return values.clone().numpy()  # the buffer is the next call's


REBUILD = "build it for this machine: safeguard export tensorrt MODEL"


def cuda_device(index: int) -> Any:
    """The GPU of that number; BackendError when it is not there."""
    count = torch.cuda.device_count()
    if index >= count:
        raise BackendError(f"an engine needs an NVIDIA GPU: asked for number {index}, torch sees {count}")
    return torch.device("cuda", index)


def present_architecture(device: Any) -> str:
    """Architecture of a GPU that is there, such as sm90."""
    return architecture_of(torch.cuda.get_device_capability(device))


def is_on_device(value: Any) -> bool:
    """Whether it is a tensor in GPU memory."""
    return isinstance(value, torch.Tensor) and value.is_cuda


def as_rows(value: Any) -> Any:
    """Arrays as they are; everything in GPU memory, whoever's, as a torch tensor on the same memory."""
    if not isinstance(value, torch.Tensor):
        if hasattr(value, "__cuda_array_interface__"):
            return torch.as_tensor(value, device="cuda")
        if hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == _ON_CUDA:
            return torch.from_dlpack(value)
        return np.asarray(value)
    value = value.detach()  # an autograd graph would hold on to the lane's buffers
    if value.is_cuda:
        return value
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy()


def _like(rows: Any, host: Any) -> Any:
    return torch.as_tensor(rows) if isinstance(host, torch.Tensor) else rows


def _agree(engine: Any, spec: EngineSpec) -> None:
    """Raises BackendError for an engine with other tensors or profiles than described."""
    found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    wanted = {s.name for s in (*spec.inputs, *spec.outputs)}
    profiles = len(spec.buckets.profiles())
    there = engine.num_optimization_profiles
    if found != wanted or there != profiles:
        raise BackendError(
            f"the engine has {there} profiles, tensors {', '.join(sorted(found))}; "
            f"its description says {profiles} profiles, tensors {', '.join(sorted(wanted))}"
        )
