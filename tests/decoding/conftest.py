from __future__ import annotations

from typing import Any

import pytest
import torch

from safeguard.decoding.value_model import ValueModel
from tests.decoding.tables import tiny_llama


@pytest.fixture
def value_model() -> Any:
    """A value model with random weights on a tiny Llama's trunk."""
    trunk = tiny_llama(5).model
    torch.manual_seed(5)
    return ValueModel(trunk, 41, width=8).eval()
