"""`safeguard calibrate`: thresholds of a text check for wanted false-positive rates, from labelled texts."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from safeguard.calibrate import Calibration


def calibrate(
    check: Annotated[str, typer.Argument(help="A model pack (name or folder), or kind:argument.")],
    data: Annotated[Path, typer.Argument(help="JSONL file with the keys text and label (0 or 1).")],
    label: Annotated[str, typer.Option(help="The label of the check that the file is about.")],
    rate: Annotated[
        list[str] | None, typer.Option(help="POINT=RATE; lenient, standard and strict by default.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the check's probabilities; choose thresholds only.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Store the result in the pack, which must be a folder.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
) -> None:
    """Measure one label on labelled texts and find its thresholds; recall stands next to each rate."""
    from safeguard import calibrate as calibration
    from safeguard.checks.loading import load_check

    rates = _rates(rate) if rate else calibration.FALSE_POSITIVE_RATES
    if write and not Path(check).is_dir():
        raise ValueError(f"--write needs the folder of a pack, got {check!r}")
    texts, truth = calibration.read_labelled(data)
    loaded: Any = load_check(str(Path(check).resolve()) if Path(check).is_dir() else check, device=device)
    if loaded.modality != "text":
        raise ValueError(f"{check!r} judges pictures; only text checks are calibrated here")
    found = calibration.calibrate(loaded, texts, truth, label, rates=rates, refit=not keep)
    if write:
        calibration.write_calibration(Path(check), [found])
    typer.echo(json_module.dumps(asdict(found)) if json else "\n".join(_lines(found, rates)))


def _rates(given: Sequence[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for text in given:
        point, _, number = text.partition("=")
        try:
            rates[point] = float(number)
        except ValueError:
            rates[point] = -1.0
        if not point or not 0 < rates[point] < 1:
            raise ValueError(f"--rate must be POINT=RATE with a rate between 0 and 1, got {text!r}")
    return rates


def _lines(found: Calibration, rates: Mapping[str, float]) -> list[str]:
    counts = f"{found.unsafe} unsafe and {found.harmless} harmless texts"
    errors = f"calibration error {found.error_before:.3f} before, {found.error:.3f} after"
    lines = [f"{found.label}: {counts}, AUROC {found.auroc:.3f}, {errors}"]
    for point, threshold in found.thresholds.items():
        recall = f"recall {found.recall[point]:.3f} at false-positive rate {rates[point]:g}"
        lines.append(f"  {point}: threshold {threshold:.4f}, {recall}")
    return lines
