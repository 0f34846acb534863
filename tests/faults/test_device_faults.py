"""A device that is lost or out of memory in the middle of a run: closed, and the guard works afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeguard import BackendError, CheckFailed, Guard
from safeguard.backends import open_backend
from safeguard.checks.readout import Readout
from safeguard.checks.text_classifier import TextClassifier, read_tokenizer
from safeguard.manifest import Window
from safeguard.testing import FakeBackend
from tests.faults.faults import is_usable
from tests.policies import echo
from tests.tiny_packs import rude_pack


class OutOfMemoryError(RuntimeError):
    """Named as torch.cuda.OutOfMemoryError is."""


class Device:
    """A backend whose device fails for the runs that the test names, counted from 1."""

    def __init__(self, *fails: int, error: BaseException) -> None:
        self._fails, self._error = fails, error
        self.runs = 0
        self.backend = FakeBackend(self._run)

    def _run(self, inputs: Any) -> Any:
        self.runs += 1
        if self.runs in self._fails:
            raise self._error
        rude = (inputs["input_ids"] == 4).any(axis=1, keepdims=True)  # the word `rude`
        return {"logits": np.where(rude, 4.0, -4.0).astype(np.float32)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_tokenizer(rude_pack(tmp_path_factory.mktemp("packs") / "pack") / "tokenizer.json")


def guarded(device: Device, tokenizer: Any, *, workers: int = 1) -> Guard:
    check = TextClassifier(
        device.backend,
        tokenizer,
        Readout(["toxic"]),
        Window(tokens=16, overlap=4),
        isolated=workers > 1,
        workers=workers,
    )
    return Guard(inputs=[check])


@pytest.mark.parametrize(
    "error",
    [
        BackendError("device lost"),
        OutOfMemoryError("CUDA out of memory"),
        MemoryError("std::bad_alloc"),
        OSError("device lost"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_device_that_fails_withholds_and_works_again(error: Exception, tokenizer: Any) -> None:
    guard = guarded(Device(1, error=error), tokenizer)
    with pytest.raises(CheckFailed, match=f"failed with {type(error).__name__}"):
        guard(echo)("good day")
    assert is_usable(guard)
    assert guard.check_input("rude")[0].flagged == ("toxic",)


def test_device_that_fails_once_under_a_batch_is_asked_again_item_by_item(tokenizer: Any) -> None:
    guard = guarded(Device(1, error=MemoryError()), tokenizer)
    reports = guard.check_input(["good day", "rude"])
    assert [(r.failed, r.flagged) for r in reports] == [(False, ()), (False, ("toxic",))]


@pytest.mark.parametrize("workers", [1, 4])
def test_one_failed_window_of_many_withholds_the_text(workers: int, tokenizer: Any) -> None:
    guard = guarded(Device(2, error=MemoryError()), tokenizer, workers=workers)
    if workers == 1:
        guard.check_input("good")  # its windows share one run, which is the second
    report = guard.check_input("good day " * 50)[0]
    assert (report.failed, report.verdicts[0].error) == (True, "failed with MemoryError")
    assert is_usable(guard)


@pytest.mark.parametrize("workers", [1, 4])
def test_interruption_in_a_run_passes_through(workers: int, tokenizer: Any) -> None:
    guard = guarded(Device(1, error=KeyboardInterrupt()), tokenizer, workers=workers)
    with pytest.raises(KeyboardInterrupt):
        guard.check_input("good day " * 50)
    assert is_usable(guard)


@pytest.mark.parametrize(
    "values",
    [np.full((1, 1), np.nan), np.full((1, 1), np.inf), np.zeros((2, 1)), np.zeros((1, 2)), np.zeros(1)],
    ids=["NaN", "inf", "two rows", "two columns", "flat"],
)
def test_device_that_gives_nonsense_withholds(values: Any, tokenizer: Any) -> None:
    answers = iter([values])
    right = {"logits": np.full((1, 1), -4.0)}
    backend = FakeBackend(lambda inputs: {"logits": v} if (v := next(answers, None)) is not None else right)
    check = TextClassifier(backend, tokenizer, Readout(["toxic"]), Window(tokens=16, overlap=4))
    guard = Guard(inputs=[check])
    assert guard.check_input("good day")[0].failed
    assert is_usable(guard)


def test_run_that_asks_onnxruntime_for_too_much_memory_is_an_error_and_the_next_one_works(
    tmp_path: Path,
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["y"])],
        "large",
        [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "large.onnx"))
    backend = open_backend(tmp_path / "large.onnx", inputs=["shape"], outputs=["y"])

    with pytest.raises(BackendError, match=r"large.onnx failed to run"):
        backend({"shape": np.array([1 << 50], np.int64)})
    assert backend({"shape": np.array([2], np.int64)})["y"].tolist() == [0.0, 0.0]
