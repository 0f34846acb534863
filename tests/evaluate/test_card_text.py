from __future__ import annotations

from typing import Any

import pytest

from safeguard.evaluate.card_text import Goal, card, goals
from safeguard.manifest import Manifest


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {
        "sources": [
            {
                "source": "dghs_v0.1 (validation)",
                "label": "toxicity",
                "unsafe": 3,
                "harmless": 2,
                "threshold": 0.5,
                "auroc": 0.95,
                "recall": 0.7,
                "false_positives": 0.1,
                "calibration_error": None,
            }
        ],
        "pairs": {"coprov2_train": 0.97},
        "hard_test": {"toxicity": {"false_positives": 0.04, "recall": 0.9, "test jargon": 0.0}},
        "calibration_error": {"toxicity": 0.02},
        "evasion": {"toxicity": {"spacing": {"still_flagged": 0.96, "false_positive_rise": -0.01}}},
        "bias": {"canadian": {"items": 40.0, "false_positives": 0.1, "recall": 1.0, "auroc": float("nan")}},
    }


@pytest.fixture
def manifest() -> Manifest:
    return Manifest.model_validate(
        {
            "name": "tiny-guard",
            "version": "1.2",
            "kind": "text_classifier",
            "model": {"file": "m.onnx", "inputs": [], "outputs": ["logits"]},
            "labels": ["toxicity"],
            "operating_points": {"standard": {"toxicity": 0.625}},
            "window": {"tokens": 16, "overlap": 4},
            "files": {"m.onnx": "0" * 64},
            "license": "Apache-2.0",
            "data": [{"name": "kind_words", "license": "CC0-1.0", "rows": 7}],
        }
    )


def test_goals_are_met_at_their_very_value() -> None:
    assert Goal("x", 0.9, 0.9).reached
    assert Goal("x", 0.05, 0.05, at_least=False).reached


def test_what_was_not_measured_is_not_reached() -> None:
    assert not Goal("x", 0.0, None).reached
    assert Goal("x", 0.5, None).line() == "| x | ≥ 0.5 | not measured | no |"


def test_goals_read_the_right_figures(metrics: dict[str, Any]) -> None:
    found = {goal.what: (goal.found, goal.reached) for goal in goals(metrics)}
    assert found["toxicity: AUROC, DGHS validation"] == (0.95, True)
    assert found["pairs ranked right, coprov2_train validation"] == (0.97, False)
    assert found["own hard safe test, toxicity: false positives"] == (0.04, True)
    assert found["requests: recall, JailbreakBench"] == (None, False)


def test_card_fills_every_table(manifest: Manifest, metrics: dict[str, Any]) -> None:
    text = card(manifest, metrics)
    assert text.startswith("# tiny-guard 1.2\n")
    assert "{{" not in text
    assert "| standard | 0.625 |" in text
    assert "| spacing | 0.960 (-0.010) |" in text
    assert "| kind_words | 7 | CC0-1.0 |  |" in text


def test_card_leaves_unknown_figures_empty(manifest: Manifest, metrics: dict[str, Any]) -> None:
    text = card(manifest, metrics)
    assert "| toxicity | dghs_v0.1 (validation) | 3 | 2 | 0.950 | 0.700 | 0.100 |  |" in text
    assert "| canadian | 40 | 0.100 | 1.000 |  |" in text
