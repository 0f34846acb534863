from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from safeguard.calibrate import (
    calibrate,
    calibrate_scores,
    calibrated_fields,
    fit_scaling,
    read_labelled,
    scale,
    scores_of,
    write_calibration,
)
from safeguard.checks.readout import Readout
from safeguard.manifest import Manifest
from safeguard.packs import read_pack, seal
from safeguard.types import Finding, Modality, Scores


class LengthCheck:
    """A real check on made-up grounds: the score is the length of the text over ten."""

    name = "length"
    modality: Modality = "text"

    def __call__(self, batch: Sequence[str], /) -> list[Finding | Scores]:
        return [Finding({"long": len(text) / 10}) for text in batch]


def test_scaling_recovers_the_slope_and_offset_that_made_the_truth() -> None:
    z = np.linspace(-6, 6, 400)
    truth = 1 / (1 + np.exp(-(2.0 * z - 1.0)))
    slope, offset = fit_scaling(z, truth, ridge=0.0)
    assert slope == pytest.approx(2.0, abs=1e-6)
    assert offset == pytest.approx(-1.0, abs=1e-6)


def test_scaling_of_separable_data_stays_finite() -> None:
    slope, offset = fit_scaling([-1.0, 1.0], [0, 1])
    assert math.isfinite(slope)
    assert offset == pytest.approx(0.0, abs=1e-6)


def test_scaling_never_turns_the_order_round() -> None:
    slope, _ = fit_scaling([-3.0, 3.0, -2.0, 2.0], [1, 0, 1, 0])
    assert slope == 0.01


def test_scaling_refuses_uneven_input() -> None:
    with pytest.raises(ValueError, match="as many truths"):
        fit_scaling([1.0], [1, 0])


def test_scale_with_slope_one_and_no_offset_changes_nothing() -> None:
    assert scale([0.1, 0.5, 0.9], 1.0, 0.0) == pytest.approx([0.1, 0.5, 0.9])


def test_scale_doubles_the_odds() -> None:
    # p = .5 has odds 1; an offset of ln 3 gives odds 3, which is .75
    assert scale([0.5], 1.0, math.log(3)) == pytest.approx([0.75])


def test_calibration_without_refit_keeps_scores_and_chooses_thresholds() -> None:
    # harmless .1 to .4: one of four may be flagged, the threshold lies between .3 and .4, both unsafe over it
    found = calibrate_scores(
        "x", [0.1, 0.2, 0.3, 0.4, 0.8, 0.9], [0, 0, 0, 0, 1, 1], rates={"standard": 0.25}, refit=False
    )
    assert 0.3 < found.thresholds["standard"] < 0.4
    assert found.recall["standard"] == 1.0
    assert (found.slope, found.offset, found.auroc) == (1.0, 0.0, 1.0)


def test_calibration_lowers_the_error_of_an_overconfident_score() -> None:
    # of 100 items scored .99 only 60 are unsafe, of 100 scored .01 only 60 are harmless: right are .6 and .4
    scores = [0.99] * 100 + [0.01] * 100
    truth = [1] * 60 + [0] * 40 + [1] * 40 + [0] * 60
    found = calibrate_scores("x", scores, truth)
    assert found.error_before == pytest.approx(0.39, abs=1e-9)
    assert found.error < 0.01


def test_floors_lift_thresholds_and_the_recall_told_with_them() -> None:
    found = calibrate_scores(
        "x", [0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1], rates={"strict": 0.5}, refit=False, floors={"strict": 0.7}
    )
    assert (found.thresholds["strict"], found.recall["strict"]) == (0.7, 0.5)


def test_calibration_refuses_one_class() -> None:
    with pytest.raises(ValueError, match="needs unsafe and harmless items, got 2 and 0"):
        calibrate_scores("x", [0.1, 0.2], [1, 1])


def test_any_check_can_be_calibrated() -> None:
    found = calibrate(LengthCheck(), ["a", "ab", "abcdefgh"], [0, 0, 1], "long", refit=False)
    assert found.auroc == 1.0
    assert (found.unsafe, found.harmless) == (1, 2)


def test_unknown_label_is_named() -> None:
    with pytest.raises(ValueError, match="gives no label 'short'; it gives long"):
        scores_of(LengthCheck(), ["a"], "short")


def _manifest(folder: Path) -> Manifest:
    (folder / "m.onnx").write_bytes(b"\x08\x01")
    return seal(
        folder,
        {
            "name": "tiny",
            "version": "1",
            "kind": "text_classifier",
            "model": {"file": "m.onnx", "inputs": ["input_ids"], "outputs": ["logits"]},
            "labels": ["x"],
            "temperatures": {"x": 2.0},
            "biases": {"x": 0.5},
            "window": {"tokens": 16, "overlap": 4},
            "license": "Apache-2.0",
        },
    )


def test_calibration_of_a_calibrated_pack_composes(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    found = calibrate_scores("x", [0.2, 0.3, 0.6, 0.7, 0.4, 0.9], [0, 0, 1, 1, 1, 0])
    fields = calibrated_fields(manifest, [found])
    logits = np.array([[-1.3], [0.0], [2.2]])
    before = Readout(["x"], temperatures={"x": 2.0}, biases={"x": 0.5})(logits, 3)
    after = Readout(["x"], temperatures=fields["temperatures"], biases=fields["biases"])(logits, 3)
    assert after == pytest.approx(scale(before, found.slope, found.offset))


def test_written_calibration_is_read_back_and_the_pack_still_verifies(tmp_path: Path) -> None:
    _manifest(tmp_path)
    found = calibrate_scores("x", [0.2, 0.3, 0.6, 0.7], [0, 0, 1, 1], rates={"strict": 0.5})
    write_calibration(tmp_path, [found])
    pack = read_pack(tmp_path).verify()
    assert pack.manifest.operating_points["strict"]["x"] == pytest.approx(
        found.thresholds["strict"], abs=1e-6
    )
    assert pack.manifest.files.keys() == {"m.onnx"}


def test_labelled_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": "a kind word", "label": 0}\n\n{"text": "a rude word", "label": true}\n', encoding="utf-8"
    )
    assert read_labelled(path) == (["a kind word", "a rude word"], [0, 1])


@pytest.mark.parametrize("row", [{"text": "x"}, {"text": 3, "label": 1}, {"text": "x", "label": 2}, ["x", 1]])
def test_a_row_without_a_label_is_refused_with_its_line(tmp_path: Path, row: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of rows\.jsonl must have text and label 0 or 1"):
        read_labelled(path)


def test_rates_speak_of_the_counted_items_only() -> None:
    scores = [0.9, 0.8, 0.6, 0.5, 0.1, 0.1, 0.1, 0.1]  # two unsafe; of the harmless only 0.6 and 0.5 count
    truth = [1, 1, 0, 0, 0, 0, 0, 0]
    counted = [True, True, True, True, False, False, False, False]
    rates = {"half": 0.5}
    every = calibrate_scores("x", scores, truth, rates=rates, refit=False)
    some = calibrate_scores("x", scores, truth, rates=rates, refit=False, counted=counted)
    assert every.thresholds["half"] <= 0.5 < some.thresholds["half"] <= 0.6


def test_nothing_counted_is_said() -> None:
    with pytest.raises(ValueError, match="among those that are counted"):
        calibrate_scores("x", [0.9, 0.1], [1, 0], refit=False, counted=[True, False])
