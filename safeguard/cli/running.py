"""How every command ends: one line for an error, and exit codes that scripts can rely on."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from safeguard.errors import SafeguardError

CLEAN, FLAGGED, ERROR = 0, 1, 2
"""Exit codes: nothing flagged; something flagged; something not judged or done, which beats flagged."""
INTERRUPTED = 130
BROKEN_PIPE = 141
"""As the shell counts them: 128 plus the number of the signal."""


class Commands(TyperGroup):
    """A group of commands that turns exceptions into exit codes; `--debug` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command named on the command line."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:  # our reader has left; at exit nothing may be written to it again
            _to_nowhere()
            raise typer.Exit(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (SafeguardError, OSError, ValueError) as exc:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {one_line(exc)}", err=True)
            raise typer.Exit(ERROR) from None
        return result


def one_line(exc: BaseException) -> str:
    """An error's message on one line, without the numbers and quotes of the operating system's."""
    if isinstance(exc, OSError) and exc.strerror and exc.filename is not None:
        return f"{exc.filename}: {exc.strerror}"
    lines = [line.strip().removeprefix("- ") for line in str(exc).splitlines()]
    return "; ".join(line for line in lines if line).replace(":; ", ": ") or type(exc).__name__


def _to_nowhere() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):  # not a real stream: nothing is written to it at exit
        return
    finally:
        os.close(nowhere)
