"""`safeguard export triton`: a pack as a model repository for NVIDIA Triton."""

from __future__ import annotations

import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safeguard.cli.exporting import Overwrite, RecordJson, progress, sizes, terminable


class Device(StrEnum):
    """Where Triton runs the model."""

    cpu = "cpu"
    gpu = "gpu"


def triton(
    pack: Annotated[str, typer.Argument(help="Name or folder of a pack of texts or pictures.")],
    out: Annotated[Path, typer.Argument(help="The repository's folder, which must not be there yet.")],
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model on each device.")] = 1,
    max_rows: Annotated[int, typer.Option(min=1, help="Largest batch of the model.")] = 64,
    preferred: Annotated[str, typer.Option(help="Batches to wait for, such as 8,16,32,64.")] = "8,16,32,64",
    queue_delay_us: Annotated[int, typer.Option(min=0, help="Longest wait for company.")] = 200,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of one run; 0: the runtime's choice.")] = 0,
    views: Annotated[
        bool, typer.Option(help="Score texts in all readings, disguised words included.")
    ] = True,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of one text before it is refused.")] = 512,
    overwrite: Overwrite = False,
    json: RecordJson = False,
) -> None:
    """Write a complete Triton model repository: tokeniser or decoder, model, readout and their ensemble."""
    from safeguard.exporters.triton import Serving, export_triton
    from safeguard.packs import resolve

    serving = Serving(
        device=device.value,
        instances=instances,
        max_rows=max_rows,
        preferred_rows=sizes(preferred) if preferred else (),
        queue_delay_us=queue_delay_us,
        threads=threads,
        views=views,
        max_windows=max_windows,
    )
    with terminable(), progress() as say:
        record = export_triton(resolve(pack), out, serving=serving, overwrite=overwrite, say=say)
    if json:
        typer.echo(json_module.dumps(record))
        return
    typer.echo(f"{out}: {record['pack']['name']} {record['pack']['version']}, {record['precision']}")
    typer.echo(f"  models {', '.join(record['models'])}; {len(record['labels'])} labels; see README.md there")
