"""`safeguard evaluate detox | toxigen | rtp`: how toxic a language model is, and what it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    output_check: OutputCheck = None,
    step: Step = None,
    device: Device = "cpu",
) -> None:
    """TP, EMT, perplexity, variety and few-shot accuracy of a language model, with or without guards."""
    from safeguard.evaluate.detox import Subject, evaluate_detox
    from safeguard.evaluate.detox_judges import load_judge
    from safeguard.evaluate.detox_settings import DetoxSettings
    from safeguard.files import write_whole
    from safeguard.train.unidetox.models import digest_of_model, load_lm

    settings = DetoxSettings.model_validate(dict(_pair(item) for item in set_ or ()))
    judges = [load_judge(spec, device=device) for spec in judge or ()]
    if not judges:
        raise ValueError("give at least one --judge")
    loaded, tokenizer = load_lm(model, dtype=settings.weights, device=device)
    extra = {
        n: load_lm(n, dtype=settings.weights, device=device) for n in {other, reference, anti_expert} if n
    }
    subject = Subject(
        name or Path(model).name,
        loaded,
        tokenizer,
        digest=digest_of_model(model),
        before=before,
        processors=None if anti_expert is None else _against(extra[anti_expert][0], strength, settings.top_p),
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


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    for name, command in (
        ("detox", detox),
        ("toxigen", toxigen),
        ("rtp", rtp),
        ("detox-report", detox_report),
    ):
        app.command(name)(command)


def _against(anti: Any, strength: float, top_p: float) -> Any:
    from safeguard.decoding.contrastive import ContrastiveProcessor

    def make(mask: Any, pad: int) -> Sequence[Any]:
        return [
            ContrastiveProcessor(
                anti, strength=strength, plausibility=None, top_p=top_p, attention_mask=mask, pad_token_id=pad
            )
        ]

    return make


def _pair(item: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise ValueError(f"--set must be name=value, got {item!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
