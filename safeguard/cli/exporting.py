"""What the commands of `safeguard export` share: options, progress on stderr, a clean end, the report."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from safeguard.manifest import Manifest

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is at OUT, at the end and at once.")
]
RecordJson = Annotated[bool, typer.Option("--json", help="Print the record of the export as JSON.")]
PackName = Annotated[str | None, typer.Option(help="The pack's name; by default that of SOURCE.")]
License = Annotated[str | None, typer.Option(help="The model's licence, for the pack's manifest.")]


def pack_fields(name: str | None, license: str | None) -> dict[str, str]:
    """What was said of a pack, for its manifest."""
    return {key: value for key, value in (("name", name), ("license", license)) if value}


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers above 0 with commas between, ascending, each once; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"sizes must be whole numbers such as 16,32,64, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function to tell each long step: a spinner on a terminal, lines on stderr elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: typer.echo(step, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def hush() -> None:
    """No bars of transformers' own between the steps."""
    from safeguard.errors import MissingExtra

    try:
        from transformers.utils import logging
    except ImportError as exc:
        raise MissingExtra("transformers", "export") from exc
    logging.disable_progress_bar()


def report(made: Manifest, out: Path, *, json: bool) -> None:
    """Print where a pack lies and how far it is from its model."""
    record = made.export
    if json:
        typer.echo(record.model_dump_json() if record else "null")
        return
    typer.echo(f"{out}: {made.name}, {made.kind}, {made.precision}")
    for one in record.parity if record else ():
        flips = f", {one.flips} of {one.decisions} decisions differ" if one.decisions else ""
        typer.echo(f"  {one.tensor}: off by at most {one.max_abs:.2g} (largest {one.scale:.3g}){flips}")
