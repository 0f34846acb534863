"""`safeguard train unidetox`: toxic twin, distilled texts, detoxified weights, and how good they are."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence


class StageName(StrEnum):
    """A part of the whole."""

    toxic = "toxic"
    distil = "distil"
    apply = "apply"
    evaluate = "evaluate"


def unidetox(
    data: Annotated[Path, typer.Option(help="Folder of the data pack, or any with the recipe's files.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished one goes on.")],
    config: Annotated[
        Path | None, typer.Option(help="Recipe file (TOML); by default the shipped one.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of the recipe, such as cpu.")] = None,
    stage: Annotated[list[StageName] | None, typer.Option(help="Only that; may be repeated. All.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a folder or hub name.")] = None,
    target: Annotated[str | None, typer.Option(help="Model to detoxify; the base by default.")] = None,
    texts: Annotated[
        list[str] | None, typer.Option(help="own, published or a file; may be repeated.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Folder of the toxicity teacher: a judge.")] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="Further judges: a check, hub:<name>, with @<label>.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A value of the recipe, as apply.steps=100.")
    ] = None,
) -> None:
    """Detoxify a language model: all stages in one go, or those asked for."""
    from importlib import resources

    from safeguard.evaluate.detox_run import RunConfig, contamination_of_run, evaluate_run
    from safeguard.train.unidetox.stages import STAGES
    from safeguard.train.unidetox.stages import unidetox as run_stages

    show_progress()
    if not data.is_dir():
        raise FileNotFoundError(2, "no such folder", str(data))
    changes = dict(_pair(item) for item in set_ or ())
    changes |= {k: v for k, v in {"base": base, "target": target, "texts": texts}.items() if v}
    with resources.as_file(resources.files("safeguard.train") / "recipes" / "unidetox.toml") as shipped:
        recipe = RunConfig.read(config or shipped, preset).changed(changes)
    wanted = [name.value for name in stage or list(StageName)]
    judges = _judges(teacher, judge or ())
    if "evaluate" in wanted and not judges:
        raise ValueError("evaluation needs a judge; give --teacher or --judge, or name the stages to run")
    run_stages(
        recipe.training,
        data,
        out,
        stages=[name for name in STAGES if name in wanted],
        toxicity=judges[0] if judges else None,
    )
    if _is_main():
        contamination_of_run(recipe.training, data, out)
        if "evaluate" in wanted:
            evaluate_run(recipe, data, out, judges)
        typer.echo(str(out))


def pack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished stage apply with LoRA: detox-<texts>.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model pack.")],
    table: Annotated[
        Path | None, typer.Option(help="table.md of `evaluate detox-table`, for the card.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the pack.")] = "smollm2-detox",
    version: Annotated[str, typer.Option(help="Version of the pack.")] = "1.0.0",
) -> None:
    """Make a model pack of a run's adapter, with its card."""
    from safeguard.train.unidetox.pack import pack_adapter

    made = pack_adapter(run, out, name=name, version=version, table=table)
    typer.echo(f"{out}: {made.name} {made.version}, {sum(f.stat().st_size for f in out.iterdir())} bytes")


def _judges(teacher: Path | None, specs: Sequence[str]) -> list[Any]:
    from safeguard.evaluate.detox_judges import load_judge

    named = [] if teacher is None else [f"teacher:{teacher}"]
    return [load_judge(spec) for spec in (*named, *specs)]


def _pair(item: str) -> tuple[str, Any]:
    """apply.steps=100 -> ("apply.steps", 100); the value is JSON where it can be read so, else text."""
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise ValueError(f"--set must be name=value, got {item!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _is_main() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def show_progress() -> None:
    """Facts of the stages on standard error, and no bars of the libraries'."""
    import logging

    from transformers.utils import logging as libraries

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("safeguard")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    libraries.disable_progress_bar()
