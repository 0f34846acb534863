"""`safeguard train`: offline recipes, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train models from a recipe file.")


@app.callback()
def _group() -> None:
    """Train models from a recipe file."""


@app.command("classifier")
def classifier(
    config: Annotated[Path, typer.Option(help="Recipe file (TOML).")],
    data: Annotated[Path, typer.Option(help="Folder of the data pack.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, configuration and metrics.")],
    teacher: Annotated[Path | None, typer.Option(help="Folder of the six-label toxicity teacher.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")
    ] = False,
) -> None:
    """Train the text classifier; the same recipe, data and seed give the same metrics."""
    from safeguard.train.classifier import ClassifierConfig, train_classifier

    recipe = ClassifierConfig.read(config)
    if not data.is_dir():
        raise FileNotFoundError(2, "no such folder", str(data))
    if not resume and any((out / name).exists() for name in ("checkpoint", "model.safetensors")):
        raise ValueError(f"{out} holds a run already; give a new folder, or --resume to go on with it")
    result = train_classifier(recipe, data, out, teacher=teacher)
    typer.echo(str(result.folder))
