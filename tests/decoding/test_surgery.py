from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safeguard.decoding.surgery import WeightEdit, gates, strongest
from safeguard.errors import PackError
from tests.decoding.tables import tiny_gpt2, tiny_llama

FIRST, SECOND = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"


def planted(dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    """A model with one row in each layer that points away from the direction, the second one more so."""
    model = tiny_llama(0)
    direction = torch.zeros(16)
    direction[3] = 2.0
    with torch.no_grad():
        for weight in gates(model).values():
            weight[:, 3] = weight[:, 3].abs()  # all others point along
        gates(model)[FIRST][5] = torch.eye(16)[3] * -1 + torch.eye(16)[4]  # cosine -0.71
        gates(model)[SECOND][7] = torch.eye(16)[3] * -3  # cosine -1
    return model.to(dtype), direction


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_rows_that_point_away_most_are_chosen_over_all_layers() -> None:
    edit = WeightEdit.select(*planted(), 2)
    assert {name: rows.tolist() for name, rows in edit.rows.items()} == {FIRST: [5], SECOND: [7]}
    assert WeightEdit.select(*planted(), 1).rows.keys() == {SECOND}
    assert edit.count == 2


def test_rows_move_by_alpha_times_the_direction_and_nothing_else_does() -> None:
    model, direction = planted()
    before = weights(model)
    WeightEdit.select(model, direction, 1, alpha=1.5).apply(model)
    after = weights(model)
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert changed == [f"{SECOND}.weight"]
    assert after[f"{SECOND}.weight"][7].tolist() == [0.0] * 3 + [0.0] + [0.0] * 12  # -3 + 1.5 x 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reverting_gives_the_very_bits_back(dtype: torch.dtype) -> None:
    model, direction = planted(dtype)
    before = weights(model)
    edit = WeightEdit.select(model, direction, 40, alpha=0.37)
    edit.apply(model)
    assert not same(before, weights(model))
    edit.revert(model)
    assert same(before, weights(model))


def test_an_edit_from_a_file_reverts_another_process_work(tmp_path: Path) -> None:
    model, direction = planted(torch.bfloat16)
    before = weights(model)
    edit = WeightEdit.select(model, direction, 9, alpha=0.5)
    edit.save(tmp_path / "edit.safetensors")
    edit.apply(model)
    read = WeightEdit.load(tmp_path / "edit.safetensors")
    assert read.alpha == 0.5
    read.revert(model)
    assert same(before, weights(model))


def test_edited_block_is_left_without_the_edit_also_after_an_error() -> None:
    model, direction = planted()
    before = weights(model)
    with pytest.raises(KeyError), WeightEdit.select(model, direction, 3, alpha=1.0).applied(model):
        raise KeyError
    assert same(before, weights(model))


def test_other_weights_are_refused_and_left_alone() -> None:
    model, direction = planted()
    edit = WeightEdit.select(model, direction, 2, alpha=1.0)
    other = tiny_llama(1)
    before = weights(other)
    with pytest.raises(ValueError, match=f"not the weights that this edit was made for: {FIRST}"):
        edit.apply(other)
    with pytest.raises(ValueError, match="not weights that this edit was applied to"):
        edit.revert(model)
    assert same(before, weights(other))


def test_a_second_application_is_refused() -> None:
    model, direction = planted()
    edit = WeightEdit.select(model, direction, 2, alpha=1.0)
    edit.apply(model)
    with pytest.raises(ValueError, match="not the weights that this edit was made for"):
        edit.apply(model)


def test_models_without_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no gated MLP"):
        WeightEdit.select(tiny_gpt2(0), torch.ones(16), 1)


@pytest.mark.parametrize("count", [0, 65])
def test_counts_beyond_the_gates_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be 1 to the 64 rows of the gates, got {count}"):
        WeightEdit.select(tiny_llama(0), torch.ones(16), count)


def test_directions_of_another_size_or_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"direction must have shape \(16,\), got \(3,\)"):
        WeightEdit.select(tiny_llama(0), torch.ones(3), 1)
    with pytest.raises(ValueError, match="made of finite numbers"):
        WeightEdit.select(tiny_llama(0), torch.full((16,), torch.nan), 1)


def test_a_file_that_is_no_edit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(PackError, match=r"'x\.safetensors' holds no weight edit"):
        WeightEdit.load(tmp_path / "x.safetensors")


def test_bisection_finds_the_largest_strength_within_the_budget() -> None:
    # cost 10 + alpha^2 <= 12.25 up to alpha 1.5; of 4 in 8 halvings: within 4 / 256
    edit = WeightEdit.select(*planted(), 1)
    found = strongest(edit, lambda e: 10 + e.alpha**2, 12.25, most=4.0)
    assert 1.5 - 4 / 256 <= found <= 1.5


def test_all_of_the_strength_is_used_where_the_budget_allows_it() -> None:
    assert strongest(WeightEdit.select(*planted(), 1), lambda e: 1.0, 2.0, most=4.0) == 4.0


def test_costs_that_are_no_numbers_are_above_the_budget() -> None:
    edit = WeightEdit.select(*planted(), 1)
    assert strongest(edit, lambda e: float("nan") if e.alpha else 1.0, 2.0, most=4.0) == 0.0


def test_a_model_above_the_budget_before_the_edit_is_refused() -> None:
    with pytest.raises(ValueError, match="above the budget of 2 before any edit"):
        strongest(WeightEdit.select(*planted(), 1), lambda e: 3.0, 2.0, most=1.0)
