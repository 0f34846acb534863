"""`safeguard evaluate`: how good a check is, on labelled data that it was never trained on."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Measure checks on labelled data.")


@app.callback()
def _group() -> None:
    """Measure checks on labelled data."""


@app.command("classifier")
def classifier(
    check: Annotated[str, typer.Argument(help="A model pack (name or folder), or kind:argument.")],
    data: Annotated[
        list[Path], typer.Argument(help="JSONL files: text, label (0 or 1), and maybe source, groups.")
    ],
    label: Annotated[str, typer.Option(help="The label of the check that the files are about.")],
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="By default that of the operating point standard.")
    ] = None,
    evasion: Annotated[
        bool, typer.Option("--evasion", help="Add the table under disguises (much slower).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
) -> None:
    """Per source: AUROC, recall, false positives, calibration error; bias over groups; evasion."""
    from safeguard.checks.loading import load_check
    from safeguard.evaluate import classifier as evaluation

    loaded: Any = load_check(str(Path(check).resolve()) if Path(check).is_dir() else check, device=device)
    if loaded.modality != "text":
        raise ValueError(f"{check!r} judges pictures; only text checks are measured here")
    known = tuple(getattr(loaded, "labels", ()))
    if label not in known:
        raise ValueError(f"check {loaded.name!r} has no label {label!r}; known: {', '.join(known)}")
    items = [item for path in data for item in evaluation.read_items(path)]
    result = evaluation.evaluate(loaded, items, label, threshold=threshold)
    report: dict[str, Any] = result.to_dict()
    if evasion:
        report["evasion"] = _evasion(loaded, items, label, result.threshold)
    if json:
        typer.echo(json_module.dumps(report))
        return
    typer.echo(result.to_markdown())
    if evasion:
        typer.echo("\n| disguise | still flagged | rise of false positives |\n| --- | --- | --- |")
        for name, row in report["evasion"].items():
            typer.echo(f"| {name} | {row['still_flagged']:.3f} | {row['false_positive_rise']:+.3f} |")


def _evasion(check: Any, items: Any, label: str, threshold: float) -> dict[str, dict[str, float]]:
    from functools import partial

    from safeguard.evaluate.classifier import evasion
    from safeguard.train.augment import DISGUISES, disguise

    table: dict[str, dict[str, float]] = evasion(
        check,
        [item.text for item in items if item.unsafe],
        [item.text for item in items if not item.unsafe],
        label,
        threshold,
        {name: partial(disguise, name=name, variety="test") for name in DISGUISES},
    )
    return table
