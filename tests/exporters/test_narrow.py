from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra export)")

import torch

from safeguard.exporters.narrow import Half, RowScaledEmbedding, narrow_tables, row_scales


class Words(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """A table of six words and one of two positions, added."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = torch.nn.Embedding(6, 4), torch.nn.Embedding(2, 4)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.words(ids) + self.positions(ids % 2)}


def test_large_tables_become_int8_and_small_ones_stay() -> None:
    words = Words()
    made = narrow_tables(words, rows=6)
    assert isinstance(made.words, RowScaledEmbedding)
    assert made.words.weight.dtype == torch.int8
    assert isinstance(made.positions, torch.nn.Embedding)


def test_narrowing_leaves_the_original_as_it_was() -> None:
    words = Words()
    narrow_tables(words, rows=1)
    assert isinstance(words.words, torch.nn.Embedding)


def test_narrowed_rows_are_within_half_a_step() -> None:
    words = Words()
    ids = torch.arange(6)
    apart = (narrow_tables(words, rows=6)(ids)["sum"] - words(ids)["sum"]).abs()
    # 127 steps to the largest entry of a row: no entry is off by more than 1/254 of it
    assert bool((apart <= words.words.weight.abs().amax(1, keepdim=True) / 254 + 1e-6).all())


def test_half_casts_floats_on_the_way_in_and_out_and_leaves_ids_alone() -> None:
    ids = torch.tensor([1, 2])
    assert Half(Words())(ids=ids)["sum"].dtype == torch.float32
    assert Half(Words(), keep_io=False)(ids=ids)["sum"].dtype == torch.float16


def test_half_is_a_copy() -> None:
    words = Words()
    Half(words)
    assert words.words.weight.dtype == torch.float32


def test_half_of_a_module_with_float_input_takes_float32() -> None:
    class Twice(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.float16
            return x * 2

    assert Half(Twice())(x=torch.ones(2)).tolist() == [2.0, 2.0]


def test_the_largest_entry_of_a_row_is_127_steps() -> None:
    scales = row_scales(torch.tensor([[1.0, -2.54], [0.0, 0.0]]))

    assert scales[0].item() == pytest.approx(0.02)  # 2.54 / 127
    assert 0 < scales[1].item() < 1e-12  # a row of zeros can still be divided by it
