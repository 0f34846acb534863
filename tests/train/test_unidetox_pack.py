from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")
from safeguard import detoxified, smollm2
from safeguard.errors import PackError
from safeguard.packs import resolve
from safeguard.train.unidetox.config import UniDetoxConfig
from safeguard.train.unidetox.models import load_lm
from safeguard.train.unidetox.pack import pack_adapter
from safeguard.train.unidetox.stages import apply_texts
from tests.train.tiny_detox import write_model, write_pack

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's
TUNING = {
    "steps": 1,
    "batch_size": 2,
    "max_tokens": 16,
    "learning_rate": 0.1,
    "lora": {"rank": 2, "alpha": 4.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model that says it is of the embedded one."""
    folder = tmp_path_factory.mktemp("run")
    base = write_model(folder / "base")
    config = UniDetoxConfig.model_validate({"base": str(base), "apply": {**TUNING, "precision": "no"}})
    apply_texts(config, write_pack(folder / "data"), folder, "published")
    path = folder / "detox-published" / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(metrics | {"model_digest": smollm2.SHA256}), encoding="utf-8")
    return folder


def test_packed_adapter_gives_the_weights_that_the_run_saved(run: Path, tmp_path: Path) -> None:
    pack_adapter(run / "detox-published", tmp_path / "pack")
    merged, _ = load_lm(str(run / "base"))
    detoxified.merge(merged, resolve(tmp_path / "pack"))
    trained, _ = load_lm(str(run / "detox-published"))
    base, _ = load_lm(str(run / "base"))
    name = "model.layers.0.mlp.gate_proj.weight"
    moved = trained.state_dict()[name] - base.state_dict()[name]
    found = merged.state_dict()[name] - base.state_dict()[name]
    assert float(moved.abs().max()) > 0
    assert float((found - moved).abs().max()) < 0.02 * float(moved.abs().max())  # matrices in bfloat16


def test_pack_lists_its_files_and_says_what_it_is_for(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    table.write_text("| model | TP |\n", encoding="utf-8")
    manifest = pack_adapter(run / "detox-published", tmp_path / "pack", table=table)
    assert manifest.kind == "adapter"
    assert sorted(manifest.files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "metrics.json",
    ]
    card = (tmp_path / "pack" / "README.md").read_text(encoding="utf-8")
    assert "It is less toxic, not safe" in card
    assert "| model | TP |" in card


def test_run_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "detox-published"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / detoxified.WEIGHTS).write_bytes(b"")
    (folder / "metrics.json").write_text(
        '{"stage": "apply", "model": "goose", "model_digest": "00"}', encoding="utf-8"
    )
    with pytest.raises(PackError, match="is of goose, not of smollm2"):
        pack_adapter(folder, tmp_path / "pack")


def test_run_without_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"stage": "apply"}', encoding="utf-8")
    with pytest.raises(PackError, match="train the stage apply with lora"):
        pack_adapter(tmp_path, tmp_path / "pack")


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="no finished run"):
        pack_adapter(tmp_path, tmp_path / "pack")
