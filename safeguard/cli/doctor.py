"""`safeguard doctor`: what is installed, what is missing, and the command that mends it."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from safeguard.cli.running import CLEAN, FLAGGED

_COLOURS = {"ok": "green", "missing": "yellow", "problem": "red", "note": "dim"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not look whether the hub answers.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Import torch in a process of its own and ask for its GPUs.")
    ] = False,
) -> None:
    """Say what is installed and missing. Exit code 1: the preset `standard` could not judge text."""
    from safeguard.doctor import examine

    found = examine(offline=offline, deep=deep)
    if json:
        typer.echo(json_module.dumps(found.to_dict(), indent=2))
        raise typer.Exit(CLEAN if found.ready else FLAGGED)
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    area = ""
    for item in found.items:
        if item.area != area:
            area = item.area
            console.print(Text(area, "bold"))
        console.print(
            Text(f"  {item.state:<8}", _COLOURS[item.state]), Text(f"{item.name}: {item.detail}"), sep=""
        )
        if item.remedy:
            console.print(Text(f"          -> {item.remedy}", "cyan"))
    verdict = "ready" if found.ready else "not ready: see what is missing above"
    console.print(Text(f"preset standard, text: {verdict}", "bold green" if found.ready else "bold red"))
    raise typer.Exit(CLEAN if found.ready else FLAGGED)
