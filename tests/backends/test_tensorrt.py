from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, get_ident
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safeguard.backends import open_backend
from safeguard.backends.engine_cache import EngineCache, Entry
from safeguard.backends.engine_spec import Buckets, EngineKey, EngineSpec, TensorSpec, cut, fill
from safeguard.backends.tensorrt import TensorRTBackend, open_engine
from safeguard.backends.tensorrt_flavours import load_flavour
from safeguard.errors import BackendError, MissingExtra

INPUTS = tuple(TensorSpec(name=n, dtype="int64", axes=("batch", "length")) for n in ("ids", "mask"))
OUTPUTS = (
    TensorSpec(name="total", dtype="float32", axes=("batch", 1)),
    TensorSpec(name="double", dtype="float16", axes=("batch", "length")),
)
SPEC = EngineSpec(
    flavour="tensorrt_rtx",
    version="1.7.1.116",
    architecture="portable",
    model="a" * 64,
    precision="float32",
    buckets=Buckets(lengths=(4, 8), batches=(1, 2, 4)),
    inputs=INPUTS,
    outputs=OUTPUTS,
    engine="b" * 64,
    size_bytes=1,
)


class NumpyLane:
    """Does what a lane on a GPU does, on arrays: total is the sum of ids under the mask, double is 2 ids."""

    def __init__(self, profile: int, batch: int, length: int | None) -> None:
        self.lock = Lock()
        self.bucket = (profile, batch, length)
        self.has_graph = False
        self.runs: list[int] = []
        self._buffers = {spec.name: np.full(spec.shape(batch, length), -1) for spec in INPUTS}

    def warm(self) -> None:
        self.has_graph = True

    def run(
        self, inputs: Mapping[str, Any], rows: int, length: int | None, padding: Mapping[str, float]
    ) -> dict[str, Any]:
        self.runs.append(get_ident())
        for spec in INPUTS:
            fill(self._buffers[spec.name], inputs[spec.name], spec, padding=padding.get(spec.name, 0))
        ids, mask = self._buffers["ids"], self._buffers["mask"]
        found = {"total": (ids * mask).sum(axis=1, keepdims=True), "double": 2 * ids}
        return {s.name: cut(found[s.name], rows, length, s).astype(np.float32) for s in OUTPUTS}


class Lanes:
    """Makes lanes and remembers them."""

    def __init__(self) -> None:
        self.made: list[NumpyLane] = []

    def __call__(self, profile: int, batch: int, length: int | None) -> NumpyLane:
        self.made.append(NumpyLane(profile, batch, length))
        return self.made[-1]

    @property
    def buckets(self) -> list[tuple[int, int, int | None]]:
        return [lane.bucket for lane in self.made]


def backend(lanes: Lanes, **options: Any) -> TensorRTBackend:
    return TensorRTBackend(SPEC, lanes, inputs=("ids", "mask"), outputs=("total", "double"), **options)


def rows(*ids: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    array = np.array(ids, np.int64)
    return {"ids": array, "mask": np.ones_like(array)}


def test_outputs_are_those_of_the_rows_and_tokens_given() -> None:
    out = backend(Lanes())(rows([1, 2, 3], [4, 5, 6], [7, 8, 9]))

    assert out["total"].tolist() == [[6], [15], [24]]
    assert out["double"].tolist() == [[2, 4, 6], [8, 10, 12], [14, 16, 18]]


def test_the_smallest_bucket_that_holds_the_input_runs() -> None:
    lanes = Lanes()
    run = backend(lanes)

    run(rows([1, 2, 3], [4, 5, 6], [7, 8, 9]))  # 3 x 3 goes into 4 x 4
    run(rows([1, 2, 3, 4, 5]))  # 1 x 5 into 1 x 8

    assert lanes.buckets == [(0, 4, 4), (1, 1, 8)]


def test_a_larger_batch_takes_several_runs() -> None:
    lanes = Lanes()

    out = backend(lanes)(rows(*([i, i] for i in range(9))))  # 4 + 4 + 1

    assert out["total"].ravel().tolist() == [2 * i for i in range(9)]
    assert lanes.buckets == [(0, 4, 4), (0, 1, 4)]


def test_an_empty_batch_gives_an_empty_batch_and_runs_nothing() -> None:
    lanes = Lanes()
    empty = np.zeros((0, 3), np.int64)

    out = backend(lanes)({"ids": empty, "mask": empty})

    assert {name: (array.shape, str(array.dtype)) for name, array in out.items()} == {
        "total": ((0, 1), "float32"),
        "double": ((0, 3), "float32"),
    }
    assert lanes.made == []


def test_padding_has_the_value_of_its_input() -> None:
    lanes = Lanes()
    backend(lanes, padding={"ids": 7})(rows([1, 2, 3]))

    assert lanes.made[0]._buffers["ids"].tolist() == [[1, 2, 3, 7]]
    assert lanes.made[0]._buffers["mask"].tolist() == [[1, 1, 1, 0]]


def test_only_the_outputs_asked_for_come_back() -> None:
    run = TensorRTBackend(SPEC, Lanes(), inputs=("ids", "mask"), outputs=("total",))

    assert list(run(rows([1]))) == ["total"]


def test_a_text_longer_than_every_bucket_is_refused() -> None:
    with pytest.raises(BackendError, match="takes a length of at most 8, got 9"):
        backend(Lanes())(rows([1] * 9))


def test_missing_inputs_are_named() -> None:
    with pytest.raises(BackendError, match="needs inputs ids, mask; missing: mask"):
        backend(Lanes())({"ids": np.ones((1, 1), np.int64)})


def test_other_names_than_the_packs_are_refused() -> None:
    with pytest.raises(BackendError, match="the engine has inputs ids, mask; its pack says ids"):
        TensorRTBackend(SPEC, Lanes(), inputs=("ids",), outputs=("total",))
    with pytest.raises(BackendError, match="the engine has outputs total, double; its pack says logits"):
        TensorRTBackend(SPEC, Lanes(), inputs=("ids", "mask"), outputs=("logits",))


def test_warming_up_makes_every_lane_and_its_graph() -> None:
    lanes = Lanes()
    run = backend(lanes)

    run.warmup()

    assert lanes.buckets == [(p, b, n) for p, n in ((0, 4), (1, 8)) for b in (1, 2, 4)]
    assert run.graphs == 6


def test_warming_up_some_buckets_leaves_the_others_for_later() -> None:
    lanes = Lanes()
    backend(lanes).warmup(lengths=[8], batches=[1, 4])

    assert lanes.buckets == [(1, 1, 8), (1, 4, 8)]


def test_threads_do_not_disturb_each_other() -> None:
    lanes = Lanes()
    run = backend(lanes)

    def total(i: int) -> list[float]:
        out: list[float] = run(rows(*([i] * (1 + i % 7) for _ in range(1 + i % 4))))["total"].ravel().tolist()
        return out

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(total, range(200)))

    assert found == [[i * (1 + i % 7)] * (1 + i % 4) for i in range(200)]
    assert len(lanes.made) == len(set(lanes.buckets))  # no lane was made twice


def test_errors_of_cuda_are_backend_errors() -> None:
    class Broken(NumpyLane):
        def run(self, *_: Any, **__: Any) -> dict[str, Any]:
            raise RuntimeError("CUDA error: out of memory")

    run = TensorRTBackend(SPEC, Broken, inputs=("ids", "mask"), outputs=("total",))
    with pytest.raises(BackendError, match="failed to run: CUDA error: out of memory"):
        run(rows([1]))


# --- opening --------------------------------------------------------------------------------------


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return EngineCache(tmp_path / "engines").get_or_build(EngineKey.of(SPEC), lambda: b"no engine")


def _open(path: Path, device: str) -> Any:
    return open_backend(path, inputs=("ids", "mask"), outputs=("total",), device=device)


@pytest.mark.parametrize("device", ["cpu", "tensorrt:", "tensorrt:x", "tensorrt_lean", "cuda:-1"])
def test_engines_run_on_gpus_only(entry: Entry, device: str) -> None:
    with pytest.raises(BackendError, match=f"runs on cuda, tensorrt, tensorrt_rtx, .* got device '{device}'"):
        _open(entry.path, device)


def test_the_other_flavour_is_not_taken_instead(entry: Entry) -> None:
    with pytest.raises(
        BackendError, match="is an engine of tensorrt_rtx: ask for device cuda or tensorrt_rtx"
    ):
        _open(entry.path, "tensorrt")


def test_an_altered_engine_is_refused_before_anything_loads_it(entry: Entry) -> None:
    entry.path.write_bytes(b"altered")

    with pytest.raises(BackendError, match=r"model.engine was altered"):
        _open(entry.path, "cuda")


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without TensorRT, whatever is installed."""
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name in ("tensorrt", "tensorrt_rtx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)


@pytest.mark.usefixtures("missing")
def test_what_is_not_installed_is_named_with_its_command(entry: Entry) -> None:
    with pytest.raises(
        MissingExtra, match=r"'tensorrt_rtx' is not installed; run: pip install '.*\[tensorrt-rtx\]'"
    ):
        _open(entry.path, "cuda")
    with pytest.raises(MissingExtra, match="'tensorrt' is not installed; run: pip install tensorrt-cu13"):
        _open(Path("model.onnx"), "tensorrt")


def test_a_broken_installation_is_told_apart_from_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.11: no such file')", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    with pytest.raises(BackendError, match="tensorrt is installed but cannot be imported: libnvinfer"):
        load_flavour("tensorrt")


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))

    with pytest.raises(BackendError, match=r"tensorrt must be 10.3 or later, found 8.6.1"):
        load_flavour("tensorrt")


def test_no_third_flavour_is_known() -> None:
    with pytest.raises(BackendError, match="flavour must be tensorrt or tensorrt_rtx, got 'tensorrt_lean'"):
        load_flavour("tensorrt_lean")


# --- with the real library, up to the device -------------------------------------------------------


@pytest.fixture
def no_gpu() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_an_engine_says_so(entry: Entry) -> None:
    with pytest.raises(BackendError, match="needs an NVIDIA GPU: asked for number 0, torch sees 0"):
        open_engine(
            entry.path,
            inputs=("ids", "mask"),
            outputs=("total",),
            device="tensorrt_rtx",
        )


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_of_another_version_is_refused(tmp_path: Path) -> None:
    key = EngineKey.of(SPEC.model_copy(update={"version": "1.0.0"}))
    old = EngineCache(tmp_path).get_or_build(key, lambda: b"engine")

    with pytest.raises(
        BackendError, match=r"was built by tensorrt_rtx 1.0.0, installed is .*; build it first"
    ):
        _open(old.path, "cuda")


@pytest.mark.usefixtures("no_gpu")
def test_what_cannot_be_deserialised_is_an_error_and_no_none() -> None:
    with pytest.raises(
        BackendError, match=r"tensorrt_rtx .* cannot load the engine on this machine: Error Code"
    ):
        load_flavour("tensorrt_rtx").deserialize(b"no engine at all")


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_both_kinds_of_input_give_what_the_model_gives(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    from safeguard.exporters.tensorrt import build_engine
    from tests.exporters.tiny_onnx import bag_of_words

    name = next((n for n in ("tensorrt", "tensorrt_rtx") if _installed(n)), None)
    if name is None:
        pytest.skip("neither tensorrt nor tensorrt_rtx is installed")
    model, expected = bag_of_words(tmp_path / "model.onnx")
    buckets = Buckets(lengths=(4, 8), batches=(1, 4))
    entry = build_engine(model, flavour=name, buckets=buckets, cache=EngineCache(tmp_path / "engines"))
    run = open_engine(entry.path, inputs=("input_ids", "attention_mask"), outputs=("logits",), device="cuda")
    ids = np.random.default_rng(0).integers(0, 50, (9, 7))  # runs of 4, 4 and 1, padded to 8
    given = {"input_ids": ids, "attention_mask": (ids % 3 > 0).astype(np.int64)}
    on_device = {key: torch.as_tensor(value, device="cuda") for key, value in given.items()}

    before = run(given)["logits"]
    run.warmup()
    with ThreadPoolExecutor(4) as pool:
        after = list(pool.map(lambda i: run(on_device if i % 2 else given)["logits"], range(16)))

    wanted = expected(given["input_ids"], given["attention_mask"])
    np.testing.assert_allclose(before, wanted, atol=1e-2)
    for found in after:
        np.testing.assert_allclose(found, wanted, atol=1e-2)
    assert run.graphs == 4 or name == "tensorrt_rtx"  # RTX says itself what it can capture


def _installed(name: str) -> bool:
    try:
        load_flavour(name)
    except (BackendError, MissingExtra):
        return False
    return True
