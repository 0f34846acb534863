from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safeguard.decoding.value_model import ValueModel
from safeguard.errors import PackError


def test_values_are_between_minus_one_and_zero(value_model: Any) -> None:
    values = value_model(torch.tensor([[1, 2, 3]])).logits
    assert values.shape == (1, 3, 41)
    assert ((values <= 0) & (values >= -1)).all()


def test_what_is_saved_is_loaded_with_the_same_values(value_model: Any, tmp_path: Path) -> None:
    value_model.save(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(ValueModel.load(tmp_path)(ids).logits, value_model(ids).logits)


def test_a_folder_without_a_value_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackError, match=r"'empty' holds no value model \(FileNotFoundError\)"):
        ValueModel.load(tmp_path / "empty")


def test_another_format_is_refused(value_model: Any, tmp_path: Path) -> None:
    value_model.save(tmp_path)
    (tmp_path / "value.json").write_text('{"format": 9}')
    with pytest.raises(PackError, match=r"value\.json has format 9, expected 1"):
        ValueModel.load(tmp_path)
