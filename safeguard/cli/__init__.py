"""The command line, `safeguard`. Slow modules are imported inside the commands that need them."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from safeguard.cli import bench, calibrate, check, demo, doctor, evaluate, export, policy, train
from safeguard.cli.running import ERROR, Commands

app = typer.Typer(
    name="safeguard",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Guardrails for diffusers pipelines, causal language models and any generating function.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from safeguard import __version__

        typer.echo(f"safeguard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Guardrails for diffusers pipelines, causal language models and any generating function."""


app.command("demo")(demo.demo)
app.command("check")(check.check)
app.add_typer(policy.app, name="policy")
app.command("doctor")(doctor.doctor)
app.add_typer(export.app, name="export")
app.add_typer(train.app, name="train")
app.command("calibrate")(calibrate.calibrate)
app.add_typer(evaluate.app, name="evaluate")
app.command("bench")(bench.bench)


def main() -> None:
    """Entry point of the `safeguard` script."""
    try:
        app(prog_name="safeguard")
    except Exception:  # Python itself would exit with 1, which says "flagged"
        traceback.print_exc()
        sys.exit(ERROR)
