"""`safeguard evaluate`: how good a check is, on labelled data that it was never trained on."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from safeguard.cli import evaluate_detox, evaluate_ipr, evaluate_refine


class Surface(StrEnum):
    """What a text is: a prompt to a language model, a prompt to an image generator, or an answer."""

    llm = "llm"
    t2i = "t2i"
    text = "text"


_READINGS = 100_000
"""Of disguised texts that are not scored again: many disguises come to the same normalised reading."""

app = typer.Typer(no_args_is_help=True, help="Measure checks on labelled data.")


@app.callback()
def _group() -> None:
    """Measure checks on labelled data."""


evaluate_detox.add_to(app)
evaluate_ipr.register(app)
evaluate_refine.register(app)


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


@app.command("evasion")
def evasion(
    data: Annotated[list[Path], typer.Argument(help="JSONL files: text, label (0 or 1).")],
    check: Annotated[
        str | None, typer.Option(help="A model pack (name or folder), or kind:argument; or use --policy.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="A preset or policy file; or use --check.")] = None,
    label: Annotated[
        str | None, typer.Option(help="With --check: the label that the files are about, if it has several.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="By default that of the operating point standard.")
    ] = None,
    surface: Annotated[Surface, typer.Option(help="With --policy: what the texts are.")] = Surface.llm,
    only: Annotated[list[str] | None, typer.Option(help="A transformation; may be repeated. All.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many texts of each label.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same table.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
) -> None:
    """Verdicts under disguises and codes: what stays flagged, and what harmless text is flagged."""
    from safeguard.evaluate.classifier import read_items
    from safeguard.evaluate.evasion import measure_evasion
    from safeguard.evaluate.transformations import TRANSFORMATIONS

    if (check is None) == (policy is None):
        raise ValueError("give either --check or --policy")
    items = [item for path in data for item in read_items(path)]
    if limit is not None:
        unsafe = [item for item in items if item.unsafe][:limit]
        items = unsafe + [item for item in items if not item.unsafe][:limit]
    if policy is not None:
        flag, name, digest = _policy_flags(policy, surface, device)
    else:
        flag, name, digest = _check_flags(str(check), label, threshold, device)
    result = measure_evasion(
        flag, items, judge=name, digest=digest, seed=seed, transformations=only or tuple(TRANSFORMATIONS)
    )
    typer.echo(json_module.dumps(result.to_dict()) if json else result.to_markdown())


def _check_flags(
    spec: str, label: str | None, threshold: float | None, device: str
) -> tuple[Any, str, str | None]:
    from safeguard.checks.loading import load_check
    from safeguard.evaluate.evasion import flag_by
    from safeguard.runtime.cache import ResultCache
    from safeguard.runtime.checks import CachedCheck

    loaded: Any = load_check(str(Path(spec).resolve()) if Path(spec).is_dir() else spec, device=device)
    if loaded.modality != "text":
        raise ValueError(f"{spec!r} judges pictures; only text checks are measured here")
    known = tuple(getattr(loaded, "labels", ()))
    if label is None and len(known) == 1:
        label = known[0]
    if label is None or label not in known:
        said = "give --label" if label is None else f"check {loaded.name!r} has no label {label!r}"
        raise ValueError(f"{said}; known: {', '.join(known)}")
    points = getattr(loaded, "operating_points", None) or {}
    asked: Any = CachedCheck(loaded, ResultCache(max_entries=_READINGS))
    cut = threshold if threshold is not None else points.get("standard", {}).get(label, 0.5)
    name = f"{loaded.name}, {label} at {cut:.3f}"
    return flag_by(asked, label, cut), name, getattr(loaded, "digest", None)


def _policy_flags(name_or_file: str, surface: Surface, device: str) -> tuple[Any, str, str | None]:
    from safeguard.cli.judge import Judge, policy_of, was_flagged, was_unjudged, without_refiner
    from safeguard.cli.sources import Entry

    policy = without_refiner(policy_of(name_or_file))
    # hundreds of texts in one call: time limits are meant for a request, and what they cut off is "flagged"
    rules = policy.runtime.model_copy(update={"cache_entries": _READINGS})
    folder = Path(name_or_file).parent if Path(name_or_file).is_file() else None
    judge = Judge(
        policy.model_copy(update={"runtime": rules, "check_timeout_s": None, "total_timeout_s": None}),
        kind="text",
        stage="output" if surface is Surface.text else "input",
        task="t2i" if surface is Surface.t2i else "llm",
        device=device,
        folder=folder,
    )

    def flag(texts: Sequence[str]) -> list[bool | None]:
        found: list[bool | None] = []
        for start in range(0, len(texts), judge.most):
            entries = [Entry("text", text) for text in texts[start : start + judge.most]]
            for report in judge(entries):
                unjudged = report is None or was_unjudged(report)
                found.append(None if report is None or unjudged else was_flagged(report))
        return found

    return flag, f"policy {policy.name}, {surface.value}", policy.digest
