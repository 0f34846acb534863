"""`safeguard check`: judge texts, lines of a file or pictures, and say so in the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeguard.cli.running import CLEAN, ERROR, FLAGGED

if TYPE_CHECKING:
    from safeguard.cli.judge import Judge
    from safeguard.cli.sinks import RowFile, Sink
    from safeguard.cli.sources import Entry, Lines
    from safeguard.types import Modality


class StageName(StrEnum):
    """Where the content comes from."""

    input = "input"
    output = "output"


class TaskName(StrEnum):
    """What a prompt is for."""

    t2i = "t2i"
    llm = "llm"


class Kind(StrEnum):
    """What the arguments are."""

    auto = "auto"
    text = "text"
    image = "image"


@dataclass(frozen=True, slots=True)
class _Source:
    entries: Iterable[Entry]
    kind: Modality
    lines: Lines | None = None
    left_out: int = 0
    waits: Callable[[], bool] | None = None


def check(
    content: Annotated[
        list[str] | None,
        typer.Argument(help="Texts, or pictures and folders; '-' or nothing: standard input, a text a line."),
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", help="A JSONL file, also packed (.gz); '-': standard input.")
    ] = None,
    field: Annotated[str, typer.Option(help="Key of the text or of the picture's path.")] = "text",
    output: Annotated[
        str | None, typer.Option("--output", help="Write each line with its report added to this JSONL file.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="monitor, lenient, standard or strict; standard if no policy is given.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="A policy file instead of a preset.")] = None,
    stage: Annotated[
        StageName | None, typer.Option(help="Prompts or results; input for texts, output for pictures.")
    ] = None,
    task: Annotated[TaskName, typer.Option(help="What prompts are for.")] = TaskName.llm,
    kind: Annotated[
        Kind, typer.Option(help="What is given; auto: by ending, and folders hold pictures.")
    ] = Kind.auto,
    json: Annotated[bool, typer.Option("--json", help="Print one report a line.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="Standard input is one text.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help='Write {"error": ...} for a bad line and go on.')
    ] = False,
    no_refine: Annotated[
        bool, typer.Option("--no-refine", help="Rewrite nothing; what would be refined is blocked.")
    ] = False,
    show_text: Annotated[bool, typer.Option("--show-text", help="Show texts in the table.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
) -> None:
    """Judge content. Exit code 0: all clean; 1: something flagged; 2: something not judged, or an error."""
    from safeguard.cli.judge import Judge, without_refiner
    from safeguard.cli.sinks import Tally
    from safeguard.policy import Policy

    if preset is not None and policy is not None:
        raise ValueError("give --preset or --policy, not both")
    if output == "-" and json:
        raise ValueError("--json and --output - both write to standard output; give one of them")
    source = _source(content or [], input, field, kind, whole=whole)
    chosen = Policy.from_file(policy) if policy is not None else Policy.preset(preset or "standard")
    if no_refine:
        chosen = without_refiner(chosen)
    at = stage.value if stage is not None else "input" if source.kind == "text" else "output"
    folder = policy.parent if policy is not None else None
    judge = Judge(chosen, kind=source.kind, stage=at, task=task.value, device=device, folder=folder)  # type: ignore[arg-type]
    tally = Tally()
    with _opened(source, output) as file:
        sinks = _sinks(file, source, json=json, show_text=show_text)
        with _progress(source, shown=sys.stderr.isatty() and not _fills_terminal(sinks, file)) as advance:
            _run(source, judge, [*sinks, tally], skip_bad=skip_bad, advance=advance)
    if not json:
        typer.echo(f"{tally}; policy {chosen.name} {chosen.digest[:12]}", err=file is not None)
    if source.left_out:
        typer.echo(f"left out, not pictures by their endings: {source.left_out} files", err=True)
    raise typer.Exit(ERROR if tally.errors else FLAGGED if tally.flagged else CLEAN)


def _run(
    source: _Source,
    judge: Judge,
    sinks: list[Sink],
    *,
    skip_bad: bool,
    advance: Callable[[int], None],
) -> None:
    """Judge all entries and write each to every sink. Raises ValueError at a bad one, after those before."""
    from safeguard.cli.sources import batches

    for batch in batches(source.entries, judge.most, judge.most_chars, waits=source.waits):
        bad = next((i for i, e in enumerate(batch) if e.bad is not None), None) if not skip_bad else None
        todo = batch if bad is None else batch[:bad]
        for entry, report in zip(todo, judge(todo), strict=True):
            for sink in sinks:
                sink.write(entry, report)
        for sink in sinks:
            sink.flush()
        advance(len(todo))
        if bad is not None:
            raise ValueError(f"{batch[bad].bad} (--skip-bad goes on)")


def _source(content: list[str], input: str | None, field: str, kind: Kind, *, whole: bool) -> _Source:
    from safeguard.cli import sources

    given_kind: Modality = "image" if kind is Kind.image else "text"
    if input is not None:
        if content or whole:
            raise ValueError("give texts, pictures or --input, one of them")
        lines = sources.Lines(input, field, given_kind)
        return _Source(lines, given_kind, lines, waits=getattr(lines.file, "waits", None))
    if content == ["-"] or (not content and not sys.stdin.isatty()):
        if kind is Kind.image:
            raise ValueError("pictures are given as files or folders, or by --input with --kind image")
        file = sources.open_stdin()
        return _Source(sources.stdin_texts(file, whole=whole), "text", waits=getattr(file, "waits", None))
    if whole:
        raise ValueError("--whole is for standard input")
    if not content:
        raise ValueError("nothing to judge; give texts, pictures, --input FILE or standard input")
    found = None if kind is Kind.text else sources.pictures(content, forced=kind is Kind.image)
    if found is None:
        return _Source([sources.Entry(str(i), text) for i, text in enumerate(content, 1)], "text")
    paths, left_out = found
    return _Source([sources.Entry(str(path), path) for path in paths], "image", left_out=left_out)


@contextmanager
def _opened(source: _Source, output: str | None) -> Iterator[RowFile | None]:
    """The output file, which gets its name when all went well; what was written until an error stays."""
    from safeguard.cli.sinks import RowFile

    file = None
    try:
        file = RowFile(output) if output is not None else None
        yield file
        if file is not None:
            file.finish()
    except BaseException:
        if file is not None:
            file.close()
            if file.part is not None:
                typer.echo(f"incomplete: what was judged so far is in {file.part}", err=True)
        raise
    finally:
        if source.lines is not None:
            source.lines.close()


def _sinks(file: RowFile | None, source: _Source, *, json: bool, show_text: bool) -> list[Sink]:
    from safeguard.cli.sinks import JsonLines, Table

    sinks: list[Sink] = [] if file is None else [file]
    if json:
        sinks.append(JsonLines())
    elif file is None:
        listed = source.entries if isinstance(source.entries, list) else []
        width = max([5, *(len(entry.name) for entry in listed)])
        name = "file" if source.kind == "image" and source.lines is None else "#"
        sinks.append(Table(show_text=show_text, name=name, width=min(width, 60)))
    return sinks


def _fills_terminal(sinks: list[Sink], file: RowFile | None) -> bool:
    """Whether reports go to the terminal, where a progress bar would be in their way."""
    return sys.stdout.isatty() and (sinks != [file] or (file is not None and file.path is None))


@contextmanager
def _progress(source: _Source, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many entries were done; it moves a bar on the terminal if one is shown."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    lines = source.lines
    size = (
        lines.size if lines is not None else len(source.entries) if isinstance(source.entries, list) else None
    )
    columns = (TextColumn("{task.fields[done]} judged"), BarColumn(), TimeRemainingColumn())
    done = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=size, done=0)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done if lines is None else lines.position, done=done)

        yield advance
