"""`safeguard train refiner-pack`: the model pack of a finished refiner run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the command to `safeguard train`."""
    app.command("refiner-pack")(refiner_pack)


def refiner_pack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished refiner-sft or refiner-rl run.")],
    out: Annotated[Path, typer.Option(help="Folder for the pack.")],
    version: Annotated[str, typer.Option(help="The pack's version.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What `safeguard evaluate refine --out` wrote; its figures go on the card."),
    ] = None,
    contender: Annotated[
        str | None, typer.Option(help="Which refiner of the evaluation this is, where it has several.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A checkpoint of the run, in place of its end.")
    ] = None,
    name: Annotated[str, typer.Option(help="The pack's name.")] = "prompt-refiner-s",
    failure: Annotated[
        list[str] | None,
        typer.Option(help="What was seen to go wrong, a sentence for the card. May be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pack at OUT, at once.")] = False,
) -> None:
    """Pack a trained adapter: float16 weights, template, figures, card and digests."""
    from safeguard.train.refiner.pack import write_refiner_pack

    made = write_refiner_pack(
        run,
        out,
        version=version,
        evaluation=evaluation,
        contender=contender,
        adapter=adapter,
        name=name,
        failures=failure or (),
        overwrite=overwrite,
    )
    size = (out / made.model.file).stat().st_size
    typer.echo(f"{out}: {made.name} {made.version}, {len(made.files)} files, adapter {size / 1e6:.1f} MB")
