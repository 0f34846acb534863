"""The lanes of an engine on a stand-in for the GPU: real tensors in host memory, an engine that adds them up.

What only a GPU shows (kernels, streams, real capture) is in the gpu test of test_tensorrt.py.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safeguard.backends import open_backend
from safeguard.backends.engine_cache import EngineCache
from safeguard.backends.engine_spec import Buckets, EngineKey, EngineSpec, TensorSpec, model_digest
from safeguard.backends.tensorrt import TensorRTBackend
from safeguard.backends.tensorrt_flavours import TensorRT
from safeguard.errors import BackendError

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
Tensor: Any = torch.Tensor
lanes = pytest.importorskip("safeguard.backends.tensorrt_lanes")

SPEC = EngineSpec(
    flavour="tensorrt_rtx",
    version="1.7.1",
    architecture="portable",
    model="a" * 64,
    precision="float32",
    buckets=Buckets(lengths=(4, 8), batches=(1, 2)),
    inputs=(TensorSpec(name="ids", dtype="int64", axes=("batch", "length")),),
    outputs=(TensorSpec(name="total", dtype="bfloat16", axes=("batch", 1)),),
    engine="b" * 64,
    size_bytes=1,
)


class Gpu:
    """Stands in for torch as far as the lanes use it, with one device in host memory."""

    def __init__(self) -> None:
        self.capturing: list[Callable[[], bool]] | None = None
        self.replays = 0
        gpu = self

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[Callable[[], bool]] = []

            def replay(self) -> None:
                gpu.replays += 1
                assert all(step() for step in self.work)

        @contextmanager
        def graph(made: CUDAGraph, **_: Any) -> Iterator[None]:
            gpu.capturing = made.work
            yield
            gpu.capturing = None

        stream = SimpleNamespace(cuda_stream=1, synchronize=lambda: None, wait_stream=lambda _: None)
        self.cuda = SimpleNamespace(
            CUDAGraph=CUDAGraph,
            Event=lambda: SimpleNamespace(record=lambda _: None, synchronize=lambda: None),
            Stream=lambda _: stream,
            current_stream=lambda _: stream,
            device=lambda _: nullcontext(),
            device_count=lambda: 1,
            get_device_capability=lambda _: (8, 9),
            graph=graph,
            stream=lambda _: nullcontext(),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> Any:
        return torch.device("cpu")

    def zeros(self, shape: Any, *, dtype: Any, **_: Any) -> Any:
        return torch.zeros(shape, dtype=dtype)


class Context:
    """An execution context: `total` is the sum of `ids`, read and written where it was told that they lie."""

    def __init__(self, gpu: Gpu, *, works: bool, capturable: bool) -> None:
        self._gpu, self._works, self._capturable = gpu, works, capturable
        self.shape: tuple[int, int] = (0, 0)
        self.profile = -1
        self._places: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile < 2

    def set_device_memory(self, place: int, size: int) -> None:
        assert place
        assert size == 64

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> bool:
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, place: int) -> None:
        self._places[name] = place

    def is_stream_capturable(self, stream: int) -> bool:
        return self._capturable

    def execute_async_v3(self, stream: int) -> bool:
        if self._gpu.capturing is not None:
            self._gpu.capturing.append(self._add)
            return True
        return self._add()

    def _add(self) -> bool:
        rows, length = self.shape
        ids = np.ctypeslib.as_array((ctypes.c_int64 * (rows * length)).from_address(self._places["ids"]))
        totals = (ctypes.c_uint16 * rows).from_address(self._places["total"])
        for row, total in enumerate(ids.reshape(rows, length).sum(axis=1)):
            totals[row] = (
                int(np.float32(total).view(np.uint32)) >> 16
            )  # bfloat16 is the upper half of float32
        return self._works


class Library:
    """Stands in for the module tensorrt_rtx: whatever is deserialised is an engine with two profiles."""

    __version__ = "1.7.1"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="given")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="at once")

    class ILogger:
        """What our logger derives from."""

    def __init__(self, gpu: Gpu, *, works: bool = True, capturable: bool = True, profiles: int = 2) -> None:
        self._gpu, self._profiles = gpu, profiles
        self._options = {"works": works, "capturable": capturable}
        self.contexts: list[Context] = []
        self.given: list[Any] = []

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda _: self._engine())

    def _engine(self) -> Any:
        config = SimpleNamespace()
        config.set_execution_context_allocation_strategy = lambda value: setattr(config, "memory", value)
        return SimpleNamespace(
            num_io_tensors=2,
            num_optimization_profiles=self._profiles,
            device_memory_size_v2=64,
            get_tensor_name=("ids", "total").__getitem__,
            create_runtime_config=lambda: config,
            create_execution_context=self._context,
        )

    def _context(self, given: Any) -> Context:
        self.given.append(given)
        self.contexts.append(Context(self._gpu, **self._options))
        return self.contexts[-1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(lanes, "torch", made)
    return made


def backend(library: Library, spec: EngineSpec = SPEC) -> TensorRTBackend:
    engine = lanes.CudaEngine(TensorRT(spec.flavour, library), spec, b"", 0)
    return TensorRTBackend(spec, engine.lane, inputs=("ids",), outputs=("total",), as_rows=lanes.as_rows)


def test_rows_come_back_with_their_own_sums(gpu: Gpu) -> None:
    run = backend(Library(gpu))

    out = run({"ids": np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])})["total"]

    np.testing.assert_array_equal(out, np.array([[6], [15], [24]], np.float32), strict=True)


def test_each_bucket_has_its_profile_and_its_shape(gpu: Gpu) -> None:
    library = Library(gpu)
    run = backend(library)
    run({"ids": np.ones((2, 3), np.int64)})
    run({"ids": np.ones((1, 5), np.int64)})

    assert [(c.profile, c.shape) for c in library.contexts] == [(0, (2, 4)), (1, (1, 8))]


def test_after_warming_up_runs_replay_a_graph_on_fresh_input(gpu: Gpu) -> None:
    run = backend(Library(gpu))
    run.warmup()

    found = [run({"ids": np.full((1, 2), i)})["total"].item() for i in (1, 2, 3)]

    assert found == [2, 4, 6]
    assert (run.graphs, gpu.replays) == (4, 3)


def test_warming_up_twice_captures_once(gpu: Gpu) -> None:
    run = backend(Library(gpu))
    run.warmup()
    first = [lane._graph for lane in run._lanes.values()]  # type: ignore[attr-defined]  # a Lane
    run.warmup()

    assert [lane._graph for lane in run._lanes.values()] == first  # type: ignore[attr-defined]  # a Lane


def test_what_cannot_be_captured_runs_without_a_graph(gpu: Gpu) -> None:
    run = backend(Library(gpu, capturable=False))
    run.warmup()

    assert run({"ids": np.ones((1, 2), np.int64)})["total"].item() == 2
    assert (run.graphs, gpu.replays) == (0, 0)


def test_what_came_back_is_not_overwritten_by_the_next_call(gpu: Gpu) -> None:
    run = backend(Library(gpu))
    first = run({"ids": np.array([[1, 2]])})["total"]
    run({"ids": np.array([[5, 6]])})

    assert first.item() == 3


def test_tensors_on_the_device_are_used_where_they_are(gpu: Gpu) -> None:
    streams: list[Any] = []

    class OnDevice(Tensor):  # type: ignore[misc]  # torch is not followed
        is_cuda = True

        def record_stream(self, stream: Any) -> None:
            streams.append(stream)

        def numpy(self) -> Any:
            pytest.fail("it was copied to the host")

    ids = torch.tensor([[1, 2, 3]]).as_subclass(OnDevice)

    assert backend(Library(gpu))({"ids": ids})["total"].item() == 6
    assert len(streams) == 1


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_tensors_in_host_memory_arrays_and_lists_are_rows(gpu: Gpu, kind: Any) -> None:
    assert backend(Library(gpu))({"ids": kind([[1, 2]])})["total"].item() == 3


def test_bfloat16_rows_are_read_as_float32() -> None:
    assert lanes.as_rows(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == np.float32


def test_a_run_that_fails_is_an_error(gpu: Gpu) -> None:
    with pytest.raises(BackendError, match="the engine failed to run; TensorRT's own messages"):
        backend(Library(gpu, works=False))({"ids": np.ones((1, 1), np.int64)})


def test_a_gpu_of_another_architecture_is_refused(gpu: Gpu) -> None:
    spec = SPEC.model_copy(update={"architecture": "sm90"})

    with pytest.raises(
        BackendError, match="the engine is for sm90, the GPU is sm89; build it for this machine"
    ):
        backend(Library(gpu), spec)


def test_a_gpu_that_is_not_there_is_refused(gpu: Gpu) -> None:
    with pytest.raises(BackendError, match="asked for number 1, torch sees 1"):
        lanes.CudaEngine(TensorRT("tensorrt_rtx", Library(gpu)), SPEC, b"", 1)


def test_an_engine_with_other_profiles_than_described_is_refused(gpu: Gpu) -> None:
    with pytest.raises(
        BackendError, match=r"the engine has 1 profiles, tensors ids, total; .* says 2 profiles"
    ):
        backend(Library(gpu, profiles=1))


def test_contexts_of_tensorrt_rtx_compile_their_kernels_before_a_capture(gpu: Gpu) -> None:
    library = Library(gpu)
    backend(library)({"ids": np.ones((1, 1), np.int64)})

    (config,) = library.given
    assert config.memory == "given"
    assert config.dynamic_shapes_kernel_specialization_strategy == "at once"


def test_contexts_of_tensorrt_take_the_strategy_itself(gpu: Gpu) -> None:
    library = Library(gpu)
    spec = SPEC.model_copy(update={"flavour": "tensorrt", "architecture": "sm89"})
    backend(library, spec)({"ids": np.ones((1, 1), np.int64)})

    assert library.given == ["given"]


def test_the_cached_engine_of_a_model_is_opened(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Library(gpu))
    model = tmp_path / "model.onnx"
    model.write_bytes(b"a model")
    key = EngineKey.of(SPEC).model_copy(update={"model": model_digest(model)})
    EngineCache().get_or_build(key, lambda: b"engine")

    run = open_backend(model, inputs=["ids"], outputs=["total"], device="tensorrt_rtx")
    assert run({"ids": np.array([[2, 3]])})["total"].item() == 5

    model.write_bytes(b"another model")
    with pytest.raises(BackendError, match=r"no engine of tensorrt_rtx 1.7.1 for model.onnx on sm89"):
        open_backend(model, inputs=["ids"], outputs=["total"], device="tensorrt_rtx")
