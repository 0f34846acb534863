from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeguard.backends import default_threads, open_backend, parse_device, usable_cores
from safeguard.errors import BackendError
from tests.load.memory import settled_rss

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")


@pytest.fixture
def doubler(tmp_path: Path) -> Path:
    """y = 2 x for x of shape (batch, 2)."""
    return _save(tmp_path / "double.onnx", external=None)


def _save(path: Path, external: str | None) -> Path:
    helper, kinds = onnx.helper, onnx.TensorProto
    two = onnx.numpy_helper.from_array(np.array([2.0, 2.0], np.float32), "two")
    info = [helper.make_tensor_value_info(n, kinds.FLOAT, ["b", 2]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["y"])], "g", [info[0]], [info[1]], [two]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    if external is not None:
        onnx.save_model(
            model,
            path,
            save_as_external_data=True,
            location=external,
            size_threshold=0,
            convert_attribute=False,
        )
    else:
        onnx.save(model, path)
    return path


def _open(path: Path, **options: Any) -> Any:
    return open_backend(path, inputs=("x",), outputs=("y",), **options)


def test_arrays_go_in_and_come_out_by_name(doubler: Path) -> None:
    y = _open(doubler)({"x": np.array([[1, 2], [3, 4]], np.float32)})["y"]

    np.testing.assert_array_equal(y, [[2, 4], [6, 8]])


def test_an_empty_batch_gives_an_empty_batch(doubler: Path) -> None:
    assert _open(doubler)({"x": np.zeros((0, 2), np.float32)})["y"].shape == (0, 2)


def test_threads_do_not_disturb_each_other(doubler: Path) -> None:
    backend = _open(doubler, threads=1)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: backend({"x": np.full((i + 1, 2), i, np.float32)})["y"], range(40)))

    assert [(len(y), float(y.max())) for y in found] == [(i + 1, 2.0 * i) for i in range(40)]


def test_cuda_where_there_is_none_is_an_error_that_says_what_is_there(doubler: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built with CUDA")
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider; it offers .*CPUExecutionProvider"):
        _open(doubler, device="cuda:1")


def test_missing_inputs_are_named(doubler: Path) -> None:
    with pytest.raises(BackendError, match=r"double.onnx needs inputs x; missing: x"):
        _open(doubler)({"z": np.zeros((1, 2), np.float32)})


def test_a_run_that_fails_is_a_backend_error(doubler: Path) -> None:
    with pytest.raises(BackendError, match=r"double.onnx failed to run"):
        _open(doubler)({"x": np.zeros((1, 3), np.float32)})


def test_other_names_than_the_packs_are_refused(doubler: Path) -> None:
    with pytest.raises(BackendError, match="has inputs x; its pack says ids"):
        open_backend(doubler, inputs=("ids",), outputs=("y",))
    with pytest.raises(BackendError, match="has outputs y; its pack says logits"):
        open_backend(doubler, inputs=("x",), outputs=("logits",))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07 nothing")

    with pytest.raises(BackendError, match=r"broken.onnx cannot be opened"):
        _open(tmp_path / "broken.onnx")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no backend reads '.tflite' \(m.tflite\); known: .onnx, .pt2"):
        _open(tmp_path / "m.tflite")


def test_listed_weights_beside_the_model_are_read(tmp_path: Path) -> None:
    path = _save(tmp_path / "model.onnx", external="weights.data")

    y = _open(path, external=["weights.data"])({"x": np.ones((1, 2), np.float32)})["y"]

    np.testing.assert_array_equal(y, [[2, 2]])


def test_unlisted_weights_beside_the_model_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "model.onnx", external="weights.data")

    with pytest.raises(BackendError, match=r"keeps weights in 'weights.data', which its pack does not list"):
        _open(path)


def test_weights_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = _save(tmp_path / "inside" / "model.onnx", external="weights.data")
    model = onnx.load(path, load_external_data=False)
    (tmp_path / "inside" / "weights.data").rename(tmp_path / "weights.data")
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = "../weights.data"
    path.write_bytes(model.SerializeToString())

    with pytest.raises(BackendError, match=r"keeps weights in '../weights.data'"):
        _open(path, external=["weights.data"])


def test_two_builds_of_onnxruntime_are_refused_with_the_fix() -> None:
    from safeguard.backends.onnx import refuse_twin_installs

    refuse_twin_installs(["onnxruntime-gpu", "numpy"])
    with pytest.raises(BackendError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        refuse_twin_installs(["onnxruntime", "onnxruntime-gpu"])


@pytest.mark.parametrize(
    ("text", "parsed"), [("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:3", ("cuda", 3))]
)
def test_devices_are_parsed(text: str, parsed: tuple[str, int]) -> None:
    assert parse_device(text) == parsed


@pytest.mark.parametrize("text", ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1"])
def test_unknown_devices_are_refused(text: str) -> None:
    with pytest.raises(BackendError, match="device must be cpu, cuda or cuda:<number>, got"):
        parse_device(text)


def test_threads_must_be_positive(doubler: Path) -> None:
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        _open(doubler, threads=0)


def test_by_default_a_run_takes_at_most_four_threads() -> None:
    assert 1 <= default_threads() <= 4


def test_tensors_of_another_library_are_taken_as_they_are(doubler: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")

    y = _open(doubler)({"x": torch.tensor([[1.0, 2.0]], requires_grad=True)})["y"]

    np.testing.assert_array_equal(y, [[2, 4]])


def test_a_tensor_on_another_device_is_refused_and_not_moved(doubler: Path) -> None:
    with pytest.raises(BackendError, match=r"x is on cuda:1 and the model on cpu:0; move it there yourself"):
        _open(doubler)({"x": _Elsewhere()})


def test_a_bound_run_gives_what_a_plain_one_gives(doubler: Path) -> None:
    from safeguard.backends.onnx_binding import run_bound

    x = np.array([[1, 2], [3, 4]], np.float32)
    (y,) = run_bound(_open(doubler)._session, {"x": x.T}, ["y"], "cpu")  # not contiguous either

    np.testing.assert_array_equal(y, [[2, 6], [4, 8]])


def test_an_address_on_the_device_is_bound_without_a_copy(doubler: Path) -> None:
    from safeguard.backends import onnx_binding

    x = np.array([[1, 2]], np.float32)
    session = _open(doubler)._session
    binding = session.io_binding()
    onnx_binding._bind_address(binding, "x", _Address(x), "cpu", 0)
    x[:] = 5  # seen by the run, since nothing was copied
    binding.bind_output("y", "cpu")
    session.run_with_iobinding(binding)

    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], [[10, 10]])


@pytest.mark.parametrize(
    ("told", "message"),
    [({"strides": (8, 4)}, "must be contiguous"), ({"mask": object()}, "must have no mask")],
)
def test_what_cannot_be_bound_by_its_address_is_refused(told: dict[str, Any], message: str) -> None:
    from safeguard.backends import onnx_binding

    with pytest.raises(BackendError, match=message):
        onnx_binding._bind_address(None, "x", _Address(np.ones((1, 2), np.float32), told), "cuda", 0)


def test_places_are_read_without_touching_the_data() -> None:
    from safeguard.backends.onnx_binding import place_of

    assert place_of(np.zeros(1)) == ("cpu", 0)
    assert place_of(_Elsewhere()) == ("cuda", 1)
    assert place_of(_Address(np.zeros(1))) == ("cuda", 0)
    assert place_of([1, 2]) == ("cpu", 0)


def test_threads_may_bind_at_the_same_time(doubler: Path) -> None:
    from safeguard.backends.onnx_binding import run_bound

    session = _open(doubler, threads=1)._session

    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda i: run_bound(session, {"x": np.full((1, 2), i, np.float32)}, ["y"], "cpu"), range(40)
            )
        )

    assert [float(y[0].max()) for y in found] == [2.0 * i for i in range(40)]


def test_warming_up_runs_the_model(doubler: Path) -> None:
    backend = _open(doubler)

    backend.warmup()
    backend.warmup([{"x": np.ones((4, 2), np.float32)}])

    with pytest.raises(BackendError, match="failed to run"):
        backend.warmup([{"x": np.ones((4, 3), np.float32)}])


def test_cuda_gets_an_arena_that_does_not_double_and_its_limit() -> None:
    from safeguard.backends.onnx import _provider

    name, options = _provider("cuda", 3, 1_000_000)

    assert name == "CUDAExecutionProvider"
    assert options["device_id"] == "3"
    assert options["gpu_mem_limit"] == "1000000"
    assert options["arena_extend_strategy"] == "kSameAsRequested"


@pytest.mark.gpu
def test_a_tensor_on_the_gpu_is_used_in_place(doubler: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    import onnxruntime

    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("no CUDA device, or onnxruntime was built without CUDA")
    x = torch.ones((3, 2), device="cuda") * 2

    np.testing.assert_array_equal(_open(doubler, device="cuda")({"x": x})["y"], np.full((3, 2), 4.0))


class _Elsewhere:
    """A tensor on another device, of which nothing but its place can be had."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1


class _Address:
    """An array of the host that poses as memory of a device."""

    def __init__(self, array: Any, told: dict[str, Any] | None = None) -> None:
        self._array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            **(told or {}),
        }


def _save_large(path: Path) -> Path:
    """y = the sum of 2 million times (x + 1) for x of shape (batch, 1): 8 MB in the midst of a run."""
    helper, kinds = onnx.helper, onnx.TensorProto
    info = [helper.make_tensor_value_info(n, kinds.FLOAT, ["b", 1]) for n in ("x", "y")]
    constants = [
        onnx.numpy_helper.from_array(np.array([1, 2_000_000], np.int64), "wide"),
        onnx.numpy_helper.from_array(np.array([1.0], np.float32), "one"),
        onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"),
    ]
    nodes = [
        helper.make_node("Expand", ["x", "wide"], ["many"]),
        helper.make_node("Add", ["many", "one"], ["more"]),
        helper.make_node("ReduceSum", ["more", "axis"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [info[0]], [info[1]], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.skipif(usable_cores() > 8, reason="so many cores may hold so much")
def test_callers_at_once_cost_no_memory_beyond_what_the_cores_can_use(tmp_path: Path) -> None:
    backend = _open(_save_large(tmp_path / "large.onnx"), threads=1)
    backend.warmup()
    together = threading.Barrier(40)

    def call() -> None:
        together.wait()
        backend({"x": np.zeros((1, 1), np.float32)})

    threads = [threading.Thread(target=call) for _ in range(40)]
    before = settled_rss()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # all at once would be 40 times 8 MB and more, which onnxruntime keeps; cores + 1 are let in, 9 at most
    assert settled_rss() - before < 200_000
