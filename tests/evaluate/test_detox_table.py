from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
from safeguard.evaluate.detox_judges import Judge
from safeguard.evaluate.detox_settings import DetoxSettings
from safeguard.evaluate.detox_table import TITLES, TableConfig, chosen, make_table
from tests.train.tiny_detox import KIND, write_model, write_pack, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's
JUDGE = Judge("long", lambda texts: np.array([min(1.0, len(t) / 8) for t in texts], np.float32), "d")
TUNING = {"steps": 2, "batch_size": 2, "max_tokens": 16, "learning_rate": 1e-3, "precision": "no"}
MEASURE = {
    "suites": ["toxigen"],
    "continuations": 2,
    "new_tokens": 3,
    "seeds": [1],
    "clean_texts": 2,
    "clean_tokens": 8,
    "weights": "float32",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The tiny pack, with what the guards are trained on: labelled rows and prompts of a training split."""
    folder = write_pack(tmp_path / "data")
    with gzip.open(folder / "toxicity_text.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    asked = [row | {"split": "train"} for row in rows if row["source"] == "toxigen_annotated"]
    kind = [
        {"text": text, "label": 0, "source": "dghs_v0.1", "split": "train", "category": "none"}
        for text in KIND
    ]
    write_rows(folder / "toxicity_text.jsonl.gz", [*rows, *asked, *kind])
    write_rows(
        folder / "lm_clean_text.jsonl.gz", [{"text": f"{text} {i}"} for i in range(3) for text in KIND]
    )
    return folder


def recipe(tmp_path: Path, **more: Any) -> TableConfig:
    return TableConfig.model_validate(
        {
            "base": str(write_model(tmp_path / "model")),
            "toxic": TUNING,
            "apply": {**TUNING, "keep_at": [1], "lora": {"rank": 2, "alpha": 4.0}},
            "distil": {"texts": 2, "tokens": 8, "batch_size": 2, "weights": "float32"},
            "evaluation": MEASURE,
            "selection": MEASURE | {"toxigen_split": "train"},
            "surgery": {"rows": 4, "texts": 4, "neutral_texts": 3, "epochs": 1, "bisection_steps": 2},
            **more,
        }
    )


def test_each_row_is_trained_and_measured_and_stands_in_the_table(tmp_path: Path, data: Path) -> None:
    rows = ["base", "published", "published-check", "instruction", "toxic", "own", "dexperts", "surgery"]
    results = make_table(recipe(tmp_path, rows=rows), data, tmp_path / "run", [JUDGE])
    wanted = [TITLES[name] for name in TITLES if name in rows]
    assert [result["name"] for result in results] == wanted
    table = json.loads((tmp_path / "run" / "table.json").read_text(encoding="utf-8"))
    assert set(table["shares_of_base"]) == set(wanted[1:])
    assert (tmp_path / "run" / "table.md").read_text(encoding="utf-8").count("\n| ") >= len(rows)
    assert "Contamination" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_finished_rows_are_not_measured_again(tmp_path: Path, data: Path) -> None:
    config = recipe(tmp_path, rows=["base", "published"])
    make_table(config, data, tmp_path / "run", [JUDGE])

    def refuse(texts: Any) -> Any:
        raise AssertionError("asked again")

    again = make_table(config, data, tmp_path / "run", [Judge("long", refuse, "d")])
    assert [row["name"] for row in again] == ["base", TITLES["published"]]


def test_guarded_rows_share_the_continuations_of_their_weights(tmp_path: Path, data: Path) -> None:
    results = make_table(recipe(tmp_path, rows=["base", "check"]), data, tmp_path / "run", [JUDGE])
    assert len(list((tmp_path / "run" / "generations").iterdir())) == 1
    assert results[1]["clean"] == results[0]["clean"]
    assert results[0]["suites"]["toxigen"]["withheld"] == 0


def test_rates_are_compared_on_prompts_of_their_own(tmp_path: Path, data: Path) -> None:
    config = recipe(tmp_path, rows=["published"], rates=[1e-3, 1e-2])
    make_table(config, data, tmp_path / "run", [JUDGE])
    assert json.loads((tmp_path / "run" / "rate.json").read_text(encoding="utf-8"))["rate"] in (1e-3, 1e-2)
    names = sorted(path.name for path in (tmp_path / "run" / "curve").iterdir())
    assert names == [
        "base-0.json",
        "published-rate-0.001-1.json",
        "published-rate-0.001-2.json",
        "published-rate-0.01-1.json",
        "published-rate-0.01-2.json",
    ]
    assert (tmp_path / "run" / "curve.html").is_file()


def test_training_alone_measures_no_row(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    assert make_table(recipe(tmp_path, rows=["base", "toxic"]), data, out, [JUDGE], train_only=True) == []
    assert (out / "toxic" / "metrics.json").is_file()


def test_table_without_judges_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="at least one judge"):
        make_table(recipe(tmp_path), data, tmp_path / "run", [])


def trial(tp: float, perplexity: float) -> dict[str, Any]:
    families = {"all": {"tp": {"mean": tp}}}
    return {"clean": {"perplexity": perplexity}, "suites": {"s": {"judges": {"j": families}}}}


def test_least_toxic_rate_within_the_budget_is_chosen() -> None:
    assert chosen({1.0: trial(0.4, 20), 2.0: trial(0.3, 21), 3.0: trial(0.1, 30)}, 22.0) == 2.0


def test_cheapest_rate_is_chosen_where_all_are_above_the_budget() -> None:
    assert chosen({1.0: trial(0.4, 25), 2.0: trial(0.3, 24)}, 22.0) == 2.0


def test_selection_uses_another_split_than_the_table() -> None:
    settings = TableConfig.model_fields["selection"].default
    assert settings.toxigen_split == "train"
    assert DetoxSettings().toxigen_split == "validation"
