"""`safeguard train`: offline recipes, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeguard.cli import train_q16, train_refiner, train_refiner_pack, train_unidetox

Teacher = Annotated[Path | None, typer.Option(help="Folder of the six-label toxicity teacher.")]
Prompts = Annotated[
    list[Path] | None,
    typer.Option(help="Wheel with harmless prompts: evals, inspect-evals. Give it once for each."),
]

app = typer.Typer(no_args_is_help=True, help="Train models from a recipe file.")
train_q16.register(app)
train_refiner.register(app)
train_refiner_pack.register(app)


@app.callback()
def _group() -> None:
    """Train models from a recipe file."""


app.command("unidetox")(train_unidetox.unidetox)
app.command("unidetox-pack")(train_unidetox.pack)


@app.command("classifier")
def classifier(
    config: Annotated[Path, typer.Option(help="Recipe file (TOML).")],
    data: Annotated[Path, typer.Option(help="Folder of the data pack.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, configuration and metrics.")],
    teacher: Teacher = None,
    prompts: Prompts = None,
    trunk: Annotated[
        Path | None, typer.Option(help="Folder of the trunk, in place of the recipe's name.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Folder of the run of the stage before; its weights are gone on from.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")
    ] = False,
) -> None:
    """Train the text classifier; the same recipe, data and seed give the same metrics."""
    from safeguard.train.classifier import ClassifierConfig, train_classifier

    recipe = ClassifierConfig.read(config)
    _folder(data)
    changes: dict[str, str] = {}
    if trunk is not None:
        changes["trunk"] = str(_folder(trunk))
    if init is not None:
        weights = _folder(init) / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(2, "no model.safetensors of an earlier run", str(init))
        changes["init"] = str(weights)
    elif recipe.init is not None and not Path(recipe.init).is_file():
        raise ValueError(f"{config.name} goes on from weights; give --init with the folder of the run before")
    if not resume and any((out / name).exists() for name in ("checkpoint", "model.safetensors")):
        raise ValueError(f"{out} holds a run already; give a new folder, or --resume to go on with it")
    result = train_classifier(
        recipe.model_copy(update=changes), data, out, teacher=teacher, prompts=prompts or []
    )
    typer.echo(str(result.folder))


@app.command("text-guard")
def text_guard(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of `train classifier`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model pack.")],
    data: Annotated[Path, typer.Option(help="Folder of the data pack.")],
    teacher: Teacher = None,
    prompts: Prompts = None,
    name: Annotated[str, typer.Option(help="Name of the pack.")] = "text-guard-s",
    version: Annotated[str, typer.Option(help="Version of the pack.")] = "1.0.0",
) -> None:
    """Export a run to int8, calibrate it, measure it, write its card: the finished model pack."""
    from safeguard.evaluate.text_guard import make_text_guard

    for goal in make_text_guard(
        _folder(run), _folder(data), out, name=name, version=version, teacher=teacher, prompts=prompts or []
    ):
        typer.echo(goal.line())


@app.command("value")
def value(
    config: Annotated[Path, typer.Option(help="Recipe file (TOML).")],
    prompts: Annotated[Path, typer.Option(help="Prompts: JSON lines with `text` or `prompt`.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, samples and metrics.")],
    model: Annotated[
        str | None, typer.Option(help="Language model to guide, in place of the recipe's name.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")
    ] = False,
) -> None:
    """Train the value model of `decoding: rectify`: sample, score with a check, learn what leads to harm."""
    from safeguard.checks.loading import load_check
    from safeguard.train.language_models import load_language_model
    from safeguard.train.value import ValueConfig, train_value

    recipe = ValueConfig.read(config)
    recipe = recipe.model_copy(update={"model": model or recipe.model})
    if not resume and any((out / name).exists() for name in ("samples.jsonl", "checkpoint", "value.json")):
        raise ValueError(f"{out} holds a run already; give a new folder, or --resume to go on with it")
    check = load_check(recipe.sampling.check)
    result = train_value(recipe, prompts, out, language_model=load_language_model(recipe.model), check=check)
    typer.echo(str(result.folder))


@app.command("surgery")
def surgery(
    config: Annotated[Path, typer.Option(help="Recipe file (TOML).")],
    labelled: Annotated[Path, typer.Option(help="JSON lines with `text` and `label`, 1 for the behaviour.")],
    neutral: Annotated[Path, typer.Option(help="JSON lines with harmless `text`, for the perplexity.")],
    out: Annotated[Path, typer.Option(help="Folder for the edit and its metrics.")],
    model: Annotated[
        str | None, typer.Option(help="Language model to edit, in place of the recipe's name.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Save the edited model as well.")] = False,
) -> None:
    """Find an edit of MLP gates against a behaviour (Model Surgery), within a budget of perplexity."""
    from safeguard.train.language_models import load_language_model
    from safeguard.train.surgery import SurgeryConfig, train_surgery

    recipe = SurgeryConfig.read(config)
    recipe = recipe.model_copy(update={"model": model or recipe.model})
    if (out / "edit.safetensors").exists():
        raise ValueError(f"{out} holds an edit already; give a new folder")
    loaded = load_language_model(recipe.model)
    result = train_surgery(recipe, labelled, neutral, out, language_model=loaded)
    if full:
        edited, tokenizer = result.edit.apply(loaded[0]), loaded[1]
        edited.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    typer.echo(f"alpha {result.edit.alpha:.4g}, {result.edit.count} rows: {out / 'edit.safetensors'}")


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(2, "no such folder", str(path))
    return path
