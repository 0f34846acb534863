"""`safeguard evaluate detox | toxigen | rtp`: how toxic a language model is, and what it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="Causal language model: a folder, a hub name or smollm2-135m-instruct.")
]
Data = Annotated[Path, typer.Option(help="Folder of the data pack.")]
Out = Annotated[Path, typer.Option(help="Result file (JSON).")]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(help="A check, hub:<name> or teacher:<folder>, with @<label>; may be repeated."),
]
Name = Annotated[str | None, typer.Option(help="Name of the row; the model's by default.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting, as seeds=[42] or per_family=20.")
]
Other = Annotated[str | None, typer.Option(help="Another model, which scores the continuations' perplexity.")]
Reference = Annotated[str | None, typer.Option(help="The model it came from, for the drift on clean text.")]
Journal = Annotated[Path | None, typer.Option(help="Folder that keeps continuations, to go on after a stop.")]
Before = Annotated[str, typer.Option(help="Text before every prompt: a safety instruction.")]
Anti = Annotated[str | None, typer.Option(help="Toxic twin to decode against (contrastive guard).")]
Strength = Annotated[float, typer.Option(min=0, help="Of the contrastive guard.")]
ValueModelOption = Annotated[
    Path | None, typer.Option(help="Folder of a value model to rectify by (safeguard train value).")
]
Epsilon = Annotated[float, typer.Option(min=0, max=0.999, help="Of rectification: taken off every cap.")]
Edit = Annotated[Path | None, typer.Option(help="Weight edit to apply first (safeguard train surgery).")]
OutputCheck = Annotated[str | None, typer.Option(help="A check that withholds what it flags, as --judge.")]
Step = Annotated[int | None, typer.Option(help="Training step, for curves.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")]


def detox(
    model: Model,
    data: Data,
    out: Out,
    judge: JudgeOption = None,
    name: Name = None,
    set_: Settings = None,
    other: Other = None,
    reference: Reference = None,
    journal: Journal = None,
    before: Before = "",
    anti_expert: Anti = None,
    strength: Strength = 2.0,
    value_model: ValueModelOption = None,
    epsilon: Epsilon = 0.1,
    edit: Edit = None,
    output_check: OutputCheck = None,
    step: Step = None,
    device: Device = "cpu",
) -> None:
    """TP, EMT, perplexity, variety and few-shot accuracy of a language model, with or without guards."""
    from safeguard.decoding.surgery import WeightEdit
    from safeguard.evaluate.detox import Subject, evaluate_detox
    from safeguard.evaluate.detox_guards import against, load_value_model, rectified_by
    from safeguard.evaluate.detox_judges import load_judge
    from safeguard.evaluate.detox_settings import DetoxSettings
    from safeguard.files import write_whole
    from safeguard.packs import canonical_digest, file_digest
    from safeguard.train.unidetox.models import digest_of_model, load_lm

    if anti_expert is not None and value_model is not None:
        raise ValueError("give --anti-expert or --value-model, not both")
    settings = DetoxSettings.model_validate(dict(_pair(item) for item in set_ or ()))
    judges = [load_judge(spec, device=device) for spec in judge or ()]
    if not judges:
        raise ValueError("give at least one --judge")
    loaded, tokenizer = load_lm(model, dtype=settings.weights, device=device)
    extra = {
        n: load_lm(n, dtype=settings.weights, device=device) for n in {other, reference, anti_expert} if n
    }
    digest = digest_of_model(model)
    if edit is not None:
        WeightEdit.load(edit).apply(loaded)
        digest = canonical_digest([digest, file_digest(edit)])
    processors, decoding = None, ""
    if anti_expert is not None:
        processors = against(extra[anti_expert][0], strength, settings.top_p)
        decoding = f"dexperts {strength:g} {digest_of_model(anti_expert)}"
    elif value_model is not None:
        processors = rectified_by(load_value_model(value_model, loaded), epsilon)
        decoding = f"rectify {epsilon:g} {digest_of_model(str(value_model))}"
    subject = Subject(
        name or Path(model).name,
        loaded,
        tokenizer,
        digest=digest,
        before=before,
        processors=processors,
        decoding=decoding,
        output=None if output_check is None else load_judge(output_check, device=device),
        step=step,
    )
    result = evaluate_detox(
        subject,
        data,
        judges,
        settings,
        other=None if other is None else (other, *extra[other]),
        reference=None if reference is None else extra[reference][0],
        journal=journal,
    )
    write_whole(out, json.dumps(result, indent=1) + "\n")
    typer.echo(str(out))


def toxigen(
    model: Model, data: Data, out: Out, judge: JudgeOption = None, name: Name = None, set_: Settings = None
) -> None:
    """`evaluate detox` on ToxiGen's prompts alone: groups, in and out of distribution."""
    detox(model, data, out, judge, name, [*(set_ or ()), 'suites=["toxigen"]'])


def rtp(
    model: Model, data: Data, out: Out, judge: JudgeOption = None, name: Name = None, set_: Settings = None
) -> None:
    """`evaluate detox` on the RealToxicityPrompts subset alone."""
    detox(model, data, out, judge, name, [*(set_ or ()), 'suites=["rtp"]'])


def detox_report(
    results: Annotated[
        list[Path], typer.Argument(help="Result files of `evaluate detox`, in the table's order.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file.")],
    contamination: Annotated[Path | None, typer.Option(help="contamination.json of the run.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Detoxification",
) -> None:
    """One page with a table and plots of any number of results."""
    from safeguard.evaluate.detox_report import read_result, report_html
    from safeguard.files import write_whole

    found = None if contamination is None else json.loads(contamination.read_text(encoding="utf-8"))
    write_whole(out, report_html([read_result(p) for p in results], title=title, contamination=found))
    typer.echo(str(out))


def detox_table(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished one goes on.")],
    judge: JudgeOption = None,
    teacher: Annotated[Path | None, typer.Option(help="Folder of the toxicity teacher: a judge.")] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe file; by default the shipped one.")] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of the recipe, such as hour.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only that row; may be repeated. All.")] = None,
    train_only: Annotated[bool, typer.Option("--train-only", help="Train, but measure no row.")] = False,
    set_: Settings = None,
) -> None:
    """Train and measure every way to a less toxic model: the whole table, in one command that goes on."""
    from importlib import resources

    from safeguard.cli.train_unidetox import show_progress
    from safeguard.evaluate.detox_judges import load_judge
    from safeguard.evaluate.detox_table import TableConfig, make_table

    if not data.is_dir():
        raise FileNotFoundError(2, "no such folder", str(data))
    show_progress()
    with resources.as_file(resources.files("safeguard.train") / "recipes" / "detox_table.toml") as shipped:
        recipe = TableConfig.read(config or shipped, preset)
    recipe = recipe.changed(dict(_pair(item) for item in set_ or ()) | ({"rows": row} if row else {}))
    specs = [*([f"teacher:{teacher}"] if teacher else []), *(judge or ())]
    if not specs:
        raise ValueError("give at least one --judge, or --teacher")
    make_table(recipe, data, out, [load_judge(spec) for spec in specs], train_only=train_only)
    typer.echo(str(out))


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    for name, command in (
        ("detox", detox),
        ("toxigen", toxigen),
        ("rtp", rtp),
        ("detox-report", detox_report),
        ("detox-table", detox_table),
    ):
        app.command(name)(command)


def _pair(item: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise ValueError(f"--set must be name=value, got {item!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
