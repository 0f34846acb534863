"""`safeguard bench`: how fast checks are here, beside what others would use, interleaved."""

from __future__ import annotations

import json as json_module
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Tower(StrEnum):
    """Size of the picture models."""

    b32 = "ViT-B/32"
    l14 = "ViT-L/14"


def bench(
    sections: Annotated[
        list[str] | None, typer.Argument(help="text, image, concurrency, growth; all by default.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to measure with: JSONL with `text`, or lines.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.svg.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender, 20 or more.")] = 20,
    tower: Annotated[Tower, typer.Option(help="Size of the picture models.")] = Tower.b32,
    peers: Annotated[
        Path | None, typer.Option(help="Folder with the peers' environments; their code paths without.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder to keep the random models in, made there once.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models and 2 repeats: to see that it works, not how fast.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
) -> None:
    """Measure text and picture checks, concurrency and growth on this machine: a quarter of an hour."""
    from safeguard.bench.report import lines
    from safeguard.bench.run import run_bench, write
    from safeguard.bench.settings import SECTIONS, Settings
    from safeguard.bench.texts import Texts, read_texts
    from safeguard.cli.exporting import hush, progress

    hush()
    with tempfile.TemporaryDirectory() as scratch, progress() as say:
        settings = Settings(
            work=work or Path(scratch),
            repeats=2 if quick else repeats,
            texts=read_texts(texts) if texts else Texts(),
            peers=peers,
            tower=tower.value,
            tiny=quick,
            say=say,
        )
        found = run_bench(settings, sections or SECTIONS)
    if out is not None:
        write(found, out)
    typer.echo(json_module.dumps(found) if json else "\n".join(lines(found)))
