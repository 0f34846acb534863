from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import torch
from safetensors.torch import save_file

from safeguard import detoxified
from safeguard.errors import PackError
from safeguard.packs import Pack, resolve, seal
from tests.adapters.tiny_lm import tiny_llama, tiny_tokenizer

GATE = "base_model.model.model.layers.0.mlp.gate_proj"
FIELDS = {
    "name": "tiny-detox",
    "version": "1.0.0",
    "kind": "adapter",
    "model": {"file": detoxified.WEIGHTS, "inputs": ["input_ids"], "outputs": ["logits"]},
    "license": "Apache-2.0",
}


def written(folder: Path, tensors: dict[str, Any] | None = None, **settings: Any) -> Pack:
    folder.mkdir()
    weight = gate(tiny_llama(tiny_tokenizer()))
    if tensors is None:
        tensors = {
            f"{GATE}.lora_A.weight": torch.ones(1, weight.shape[1]),
            f"{GATE}.lora_B.weight": torch.full((weight.shape[0], 1), 0.5),
        }
    save_file(tensors, folder / detoxified.WEIGHTS)
    told = {"peft_type": "LORA", "r": 1, "lora_alpha": 4, **settings}
    (folder / detoxified.SETTINGS).write_text(json.dumps(told), encoding="utf-8")
    (folder / detoxified.BASE).write_text('{"name": "other", "sha256": "00"}', encoding="utf-8")
    seal(folder, FIELDS)
    return resolve(folder)


def gate(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.model.layers[0].mlp.gate_proj.weight
    return weight


def test_merging_adds_the_product_times_alpha_over_rank(tmp_path: Path) -> None:
    model = tiny_llama(tiny_tokenizer())
    before = gate(model).detach().clone()
    detoxified.merge(model, written(tmp_path / "p"))
    assert torch.allclose(gate(model) - before, torch.tensor(2.0))  # 0.5 x 1 x 4 / 1


def test_nothing_else_is_changed(tmp_path: Path) -> None:
    model, other = tiny_llama(tiny_tokenizer()), tiny_llama(tiny_tokenizer())
    other.load_state_dict(model.state_dict())
    detoxified.merge(model, written(tmp_path / "p"))
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, other.state_dict()[n])]
    assert changed == ["model.layers.0.mlp.gate_proj.weight"]


def test_matrices_of_another_shape_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = tiny_llama(tiny_tokenizer())
    before = gate(model).detach().clone()
    bad = {f"{GATE}.lora_A.weight": torch.ones(1, 3), f"{GATE}.lora_B.weight": torch.ones(3, 1)}
    with pytest.raises(PackError, match="do not fit the model"):
        detoxified.merge(model, written(tmp_path / "p", bad))
    assert torch.equal(gate(model), before)


def test_module_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    other = GATE.replace("layers.0", "layers.99")
    bad = {f"{other}.lora_A.weight": torch.ones(1, 2), f"{other}.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(PackError, match="does not have"):
        detoxified.merge(tiny_llama(tiny_tokenizer()), written(tmp_path / "p", bad))


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="two matrices for every module"):
        detoxified.merge(
            tiny_llama(tiny_tokenizer()),
            written(tmp_path / "p", {f"{GATE}.lora_A.weight": torch.ones(1, 2)}),
        )


def test_tensors_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is no low-rank matrix"):
        detoxified.merge(
            tiny_llama(tiny_tokenizer()), written(tmp_path / "p", {"lm_head.weight": torch.ones(2, 2)})
        )


def test_matrices_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    weight = gate(tiny_llama(tiny_tokenizer()))
    bad = {
        f"{GATE}.lora_A.weight": torch.full((1, weight.shape[1]), float("nan")),
        f"{GATE}.lora_B.weight": torch.ones(weight.shape[0], 1),
    }
    with pytest.raises(PackError, match="no finite numbers"):
        detoxified.merge(tiny_llama(tiny_tokenizer()), written(tmp_path / "p", bad))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"peft_type": "LOHA"}, {"rank_pattern": {"a": 2}}])
def test_adapters_of_other_kinds_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(PackError, match="cannot be merged"):
        detoxified.merge(tiny_llama(tiny_tokenizer()), written(tmp_path / "p", **settings))


def test_strength_must_be_a_number(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="must be numbers"):
        detoxified.merge(tiny_llama(tiny_tokenizer()), written(tmp_path / "p", lora_alpha="4"))


def test_adapter_of_another_model_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is for 'other', not for 'smollm2-135m-instruct'"):
        detoxified.load(pack=written(tmp_path / "p").folder)


def test_pack_of_another_kind_is_refused() -> None:
    with pytest.raises(PackError, match="not a adapter"):
        detoxified.load(pack="text-guard-s")
