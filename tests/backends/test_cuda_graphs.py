"""Buckets, buffers, splitting and cutting run on the CPU without capture; the capture itself needs a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from safeguard.backends.engine_spec import Buckets
from safeguard.errors import BackendError

torch: Any = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
graphs: Any = pytest.importorskip("safeguard.backends.cuda_graphs")

BUCKETS = Buckets(lengths=(4, 8), batches=(1, 4))


class Sums(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """logits (text, 2): the sum of the ids under the mask, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        self.shapes.append(tuple(input_ids.shape))
        kept = (input_ids * attention_mask).sum(dim=1)
        return {"logits": torch.stack([kept, attention_mask.sum(dim=1)], dim=1) * self.scale}


def backend(module: Any = None, **options: Any) -> Any:
    settings = {"device": "cpu", "dtype": "float32", "capture": False, "buckets": BUCKETS, **options}
    return graphs.GraphBackend(module or Sums(), inputs=graphs.text_inputs(), outputs=["logits"], **settings)


def tokens(rows: int, length: int) -> dict[str, Any]:
    ids = np.arange(1, rows * length + 1, dtype=np.int64).reshape(rows, length)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_inputs_are_padded_to_a_bucket_and_outputs_cut_back() -> None:
    module = Sums()

    found = backend(module)(tokens(2, 3))["logits"]

    assert found.tolist() == [[6, 3], [15, 3]]  # 1 + 2 + 3 and 4 + 5 + 6, three tokens each
    assert found.dtype == np.float32
    assert set(module.shapes) == {(4, 4)}  # two rows take the bucket of 4, three tokens that of 4


def test_a_batch_larger_than_the_largest_bucket_takes_several_runs() -> None:
    module = Sums()

    found = backend(module)(tokens(5, 8))["logits"]

    assert found[:, 0].tolist() == [36, 100, 164, 228, 292]  # sums of 1 to 8, of 9 to 16, ...
    assert set(module.shapes) == {(4, 8), (1, 8)}


def test_what_a_bucket_held_before_leaves_no_trace() -> None:
    run = backend()
    run(tokens(4, 4))

    assert run(tokens(1, 2))["logits"].tolist() == [[3, 2]]
    assert run(tokens(3, 3))["logits"].tolist() == [[6, 3], [15, 3], [24, 3]]


def test_results_are_not_changed_by_the_next_call() -> None:
    run = backend()
    first = run(tokens(1, 2))["logits"]

    run({name: value * 0 + 1 for name, value in tokens(1, 4).items()})

    assert first.tolist() == [[3, 2]]


def test_an_empty_batch_gives_no_rows() -> None:
    assert backend()(tokens(0, 3))["logits"].shape == (0, 2)


def test_tensors_are_taken_as_well_as_arrays() -> None:
    inputs = {name: torch.from_numpy(value) for name, value in tokens(1, 3).items()}

    assert backend()(inputs)["logits"].tolist() == [[6, 3]]


def test_threads_get_their_own_results() -> None:
    run = backend()

    def ask(number: int) -> list[list[float]]:
        ids = np.full((1, 3), number, np.int64)
        return run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].tolist()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(64)))

    assert found == [[[3 * n, 3]] for n in range(64)]


def test_pictures_need_no_length() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))

    class Named(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, pixel_values: Any) -> Any:
            return self.module(pixel_values)

    run = graphs.GraphBackend(
        Named(),
        inputs=graphs.image_inputs(2),
        outputs=["logits"],
        buckets=Buckets(lengths=(), batches=(1, 2)),
        device="cpu",
        dtype="float32",
        capture=False,
    )
    pixels = np.random.default_rng(0).random((3, 3, 2, 2), np.float32)

    found = run({"pixel_values": pixels})["logits"]

    with torch.inference_mode():
        assert found == pytest.approx(module(torch.from_numpy(pixels)).numpy(), abs=1e-6)


def test_warmup_runs_every_bucket_the_largest_first() -> None:
    module = Sums()

    backend(module).warmup()

    assert module.shapes == [(4, 8), (4, 4), (1, 8), (1, 4)]


def test_a_compiled_module_gives_the_same() -> None:
    assert backend(compile_with="eager")(tokens(2, 3))["logits"].tolist() == [[6, 3], [15, 3]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.ones((1, 2), np.int64)}, "missing: attention_mask"),
        (tokens(1, 9), "length of at most 8, got 9"),
        ({"input_ids": np.ones((1, 2)), "attention_mask": np.ones((1, 2), np.int64)}, "must hold int64"),
        (tokens(1, 2) | {"attention_mask": np.ones((2, 2), np.int64)}, "the same batch"),
    ],
)
def test_wrong_inputs_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        backend()(inputs)


def test_graphs_are_refused_on_the_cpu() -> None:
    with pytest.raises(BackendError, match="CUDA graphs need a device cuda, the device asked for is cpu"):
        backend(capture=True)


def test_lengths_must_be_given_for_inputs_with_a_length() -> None:
    with pytest.raises(ValueError, match="need buckets with lengths"):
        backend(buckets=Buckets(lengths=(), batches=(1,)))


def test_an_output_that_is_not_there_is_named() -> None:
    run = graphs.GraphBackend(
        Sums(),
        inputs=graphs.text_inputs(),
        outputs=["scores"],
        buckets=BUCKETS,
        device="cpu",
        dtype="float32",
        capture=False,
    )

    with pytest.raises(BackendError, match="the module gave no scores; it gave logits"):
        run(tokens(1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_captured_bucket_gives_what_the_module_gives() -> None:
    run = backend(device="cuda", capture=True)
    run.warmup()

    assert run.graphs == 4
    assert run(tokens(2, 3))["logits"].tolist() == [[6, 3], [15, 3]]
    on_device = {name: torch.from_numpy(value).cuda() for name, value in tokens(5, 8).items()}
    assert run(on_device)["logits"][:, 0].tolist() == [36, 100, 164, 228, 292]
