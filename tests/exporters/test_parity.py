from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from safeguard.errors import ExportError, ParityError, SafeguardError
from safeguard.exporters.parity import FLOAT32, compare, pixel_batches, token_batches
from safeguard.testing import FakeBackend

BATCHES = [{"x": np.zeros((rows, 2), np.float32)} for rows in (1, 5)]


def giving(value: Any, name: str = "logits") -> FakeBackend:
    """Gives one value for each entry, whatever comes in; a function gets the input."""
    return FakeBackend(
        lambda inputs: {name: value(inputs["x"]) if callable(value) else np.full_like(inputs["x"], value)}
    )


def test_difference_scale_rows_and_shapes_are_those_of_all_batches() -> None:
    (found,) = compare(giving(-2.0), giving(-2.25), BATCHES, tolerance=1.0)

    assert (found.tensor, found.max_abs, found.scale, found.rows) == ("logits", 0.25, 2.0, 6)
    assert found.shapes == ((1, 2), (5, 2))


def test_difference_over_the_tolerance_names_tensor_shape_and_difference() -> None:
    # 0.25 of a largest value of 2: the limit is 0.1 * 2
    with pytest.raises(
        ParityError, match=r"^logits \(1, 2\) differs by 0\.25, more than 0\.2; try this$"
    ) as e:
        compare(giving(2.0), giving(2.25), BATCHES, tolerance=0.1, advice="try this")
    assert (e.value.tensor, e.value.shape, e.value.difference, e.value.limit) == ("logits", (1, 2), 0.25, 0.2)


def test_tolerance_is_absolute_for_small_values() -> None:
    compare(giving(0.0), giving(0.09), BATCHES, tolerance=0.1)
    with pytest.raises(ParityError, match=r"differs by 0\.11"):
        compare(giving(0.0), giving(0.11), BATCHES, tolerance=0.1)


def test_difference_that_only_a_larger_batch_shows_is_found() -> None:
    first_row_everywhere = giving(lambda x: np.broadcast_to(np.arange(len(x))[0], x.shape).astype(np.float32))
    each_its_own = giving(lambda x: np.repeat(np.arange(len(x)), 2).reshape(x.shape).astype(np.float32))
    with pytest.raises(ParityError, match=r"\(5, 2\) differs by 4"):
        compare(each_its_own, first_row_everywhere, BATCHES, tolerance=FLOAT32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_value_that_is_not_finite_is_no_agreement_whatever_the_tolerance(value: float) -> None:
    with pytest.raises(ParityError, match="differs by inf"):
        compare(giving(1.0), giving(value), BATCHES, tolerance=np.inf)


def test_nan_on_both_sides_agrees() -> None:
    (found,) = compare(giving(np.nan), giving(np.nan), BATCHES, tolerance=0.0)
    assert found.max_abs == 0.0


def test_another_shape_is_refused() -> None:
    with pytest.raises(ParityError, match=r"logits \(1, 2\) became \(1, 1\)"):
        compare(giving(1.0), giving(lambda x: x[:, :1]), BATCHES, tolerance=1.0)


def test_missing_output_is_named() -> None:
    with pytest.raises(ParityError, match=r"logits \(1, 2\) is missing"):
        compare(giving(1.0), giving(1.0, "scores"), BATCHES, tolerance=1.0)


def test_flips_are_decisions_that_come_out_differently() -> None:
    (found,) = compare(giving(0.1), giving(-0.1), BATCHES, tolerance=1.0, decide=lambda logits: logits > 0)
    assert (found.flips, found.decisions, found.flip_share) == (12, 12, 1.0)


def test_share_of_flips_over_its_limit_is_refused_with_advice() -> None:
    with pytest.raises(ParityError, match=r"flips 12 of 12 decisions.* more than 0\.02; keep float32"):
        compare(
            giving(0.1),
            giving(-0.1),
            BATCHES,
            tolerance=1.0,
            decide={"logits": lambda logits: logits > 0},
            max_flips=0.02,
            advice="keep float32",
        )


def test_tolerance_by_tensor() -> None:
    both = FakeBackend(lambda i: {"a": i["x"], "b": i["x"]})
    off = FakeBackend(lambda i: {"a": i["x"], "b": i["x"] + 0.5})
    found = compare(both, off, BATCHES, tolerance={"a": 0.0, "b": 1.0})
    assert [(one.tensor, one.max_abs) for one in found] == [("a", 0.0), ("b", 0.5)]


def test_nothing_to_compare_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        compare(giving(1.0), giving(1.0), [], tolerance=1.0)


def test_parity_error_is_an_export_error_of_ours() -> None:
    assert issubclass(ParityError, ExportError)
    assert issubclass(ExportError, SafeguardError)


def test_token_batches_have_one_row_then_five_padded_ones_and_reach_the_whole_window() -> None:
    found = token_batches(50, 512, pad_id=7)
    assert [b["input_ids"].shape for b in found] == [(1, 3), (5, 16), (5, 61), (1, 512)]
    padded = found[1]["attention_mask"] == 0
    assert padded.any()
    assert (found[1]["input_ids"][padded] == 7).all()
    assert (found[1]["input_ids"][~padded] != 7).all()
    assert found[1]["attention_mask"][0].all()


def test_batches_are_the_same_each_time() -> None:
    one, other = token_batches(50, 20), token_batches(50, 20)
    assert all((a[k] == b[k]).all() for a, b in zip(one, other, strict=True) for k in a)
    assert (pixel_batches((3, 4, 4))[1]["pixel_values"] == pixel_batches((3, 4, 4))[1]["pixel_values"]).all()


def test_record_of_a_parity_goes_into_a_manifest() -> None:
    (found,) = compare(giving(1.0), giving(1.5), BATCHES, tolerance=1.0)
    record = found.record()
    assert (record.tensor, record.max_abs, record.rows) == ("logits", 0.5, 6)
