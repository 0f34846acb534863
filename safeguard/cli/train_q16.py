"""`safeguard train q16`: learn a pair of prompts on a frozen picture encoder from labelled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Adds the command to `safeguard train`."""
    app.command("q16")(q16)


def q16(
    config: Annotated[Path, typer.Option(help="Recipe file (TOML).")],
    encoder: Annotated[
        str, typer.Option(help="Folder of a CLIP model, hub:owner/name, or a model pack (name or folder).")
    ],
    pictures: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for heads, prompts and metrics.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV or JSONL: file, label (0 or 1) or rating, split, group, category. "
            "By default labels.jsonl or labels.csv in the folder."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Output of a pack's model that is an embedding.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="Prompts to begin with: released Q16 prompts, or heads.npz.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's; 0 measures.")] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Also write encoder and head as one pack, ready as a check.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
) -> None:
    """Train a Q16-style head; the same recipe, pictures and seed give the same prompts."""
    from safeguard.train.q16 import Q16Config, train_q16
    from safeguard.train.q16_encoder import open_encoder

    recipe = Q16Config.read(config)
    if epochs is not None:
        recipe = Q16Config.model_validate({**recipe.model_dump(), "epochs": epochs})
    if not pictures.is_dir():
        raise FileNotFoundError(2, "no such folder", str(pictures))
    listed = labels or _labels(pictures)
    if start is not None and not start.is_file():
        raise FileNotFoundError(2, "no such file of prompts", str(start))
    opened = open_encoder(encoder, device=device, output=output)
    result = train_q16(recipe, opened, pictures, listed, out, start=start, pack=pack)
    typer.echo(f"{result.folder}: {_line(result.metrics)}")


def _labels(folder: Path) -> Path:
    for name in ("labels.jsonl", "labels.csv"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(2, "no labels.jsonl or labels.csv in it; give --labels", str(folder))


def _line(metrics: Any) -> str:
    """The figures of the held-out part, or of validation where there is none."""
    part = "held_out" if metrics["held_out"] else "validation"
    found = metrics[part]
    at = found["at"]["half"]
    figures = {
        "AUROC": found["auroc"],
        "recall": at["recall"],
        "false positives": at["false_positives"],
        "calibration error": found["calibration_error"],
    }
    said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)
    return f"{part.replace('_', ' ')} {said}"
