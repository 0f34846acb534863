"""`safeguard demo`: a guarded chat model and a guarded diffusion pipeline, harmless to hostile."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safeguard.demo.results import Prompt, Result, Summary
from safeguard.errors import MissingExtra
from safeguard.files import write_whole
from safeguard.guards import Guard

if TYPE_CHECKING:
    from rich.console import Console

SHEET = "before_after.png"
REPORT = "report.json"


@dataclass(slots=True)
class _Half:
    """Texts or images: what was asked of what, and what became of it."""

    name: str
    title: str
    model: str
    results: list[Result] = field(default_factory=list)


def run(
    output: Path = Path("demo_output"),
    *,
    model: str | None = None,
    pipeline: str | None = None,
    preset: str = "standard",
    guard: Guard | None = None,
    texts: bool = True,
    images: bool = True,
    device: str = "cpu",
    max_new_tokens: int = 48,
    is_detoxified: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo: tables to the console, `report.json` and the before/after sheet to the output folder.

    model, pipeline: a hub name or folder in place of the embedded ones. guard: in place of the preset's.
    is_detoxified: the embedded language model with the shipped adapter that makes it less toxic.
    Returns what stands in `report.json`. Progress goes to stderr.
    Raises ValueError when nothing is asked for; PackNotFound or MissingExtra, with the command that installs
    it, when a model is missing: nothing is ever faked.
    """
    if not texts and not images:
        raise ValueError("nothing to show: give texts or images, not neither")
    from rich.console import Console as RichConsole

    console = console or RichConsole()
    progress = RichConsole(stderr=True)
    _refuse_missing(model if texts else "", images=images, is_detoxified=texts and is_detoxified)
    guard = guard or Guard.from_preset(preset, device=device)
    _load_checks(guard, texts=texts, images=images, progress=progress)
    output.mkdir(parents=True, exist_ok=True)
    halves: list[_Half] = []
    if texts:
        halves.append(_run_texts(model, guard, device, max_new_tokens, progress, is_detoxified))
        _show(halves[-1], console)
    if images:
        halves.append(_run_images(pipeline, guard, device, progress))
        _show(halves[-1], console)
    return _write(output, guard, halves, console)


def prompts(part: Literal["texts", "images"]) -> list[Prompt]:
    """What the demo asks, in order; the wording is mild, because it is shown and shipped."""
    text = (resources.files("safeguard.demo") / "data" / "prompts.json").read_text(encoding="utf-8")
    return [Prompt(row["prompt"], row["harmful"], row.get("seed", 0)) for row in json.loads(text)[part]]


def _refuse_missing(model: str | None, *, images: bool, is_detoxified: bool = False) -> None:
    """Say what is missing before anything slow begins."""
    for module, extra in [("torch", "torch"), ("transformers", "torch")] + [
        ("diffusers", "diffusers")
    ] * images:
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module, extra=extra)
    if model is None:
        from safeguard import smollm2

        smollm2.find()
    if is_detoxified:
        from safeguard import detoxified, packs

        packs.resolve(detoxified.NAME)


def _load_checks(guard: Guard, *, texts: bool, images: bool, progress: Console) -> None:
    """Load what the guard judges with, and keeps: a missing pack is told before a model is loaded."""
    if texts:
        guard.route("llm", "text")
    if images:
        progress.print("getting the refiner ready (the first time takes about a minute) ...", highlight=False)
        guard.prepare("t2i", "image")
        progress.print(f"refiner in use: {guard.refiner_in_use() or 'none'}", highlight=False)


def _run_texts(
    model: str | None,
    guard: Guard,
    device: str,
    max_new_tokens: int,
    progress: Console,
    is_detoxified: bool = False,
) -> _Half:
    from safeguard.demo import texts

    half = _Half(
        "texts", "A guarded language model", model or (texts.DETOXIFIED if is_detoxified else texts.EMBEDDED)
    )
    progress.print(f"loading {half.model} ...", highlight=False)
    lm, tokenizer = texts.load(model, device=device, is_detoxified=is_detoxified)
    asked = prompts("texts")
    progress.print("asking, guarded ...", highlight=False)
    answers = texts.ask(lm, tokenizer, guard, asked, max_new_tokens=max_new_tokens)
    with texts.half_of_the_cores():
        half.results.extend(_counted(answers, len(asked), progress))
    return half


def _run_images(pipeline: str | None, guard: Guard, device: str, progress: Console) -> _Half:
    from safeguard.demo import pictures
    from safeguard.demo.texts import half_of_the_cores

    progress.print(f"loading {pipeline or 'the picture pipeline'} ...", highlight=False)
    pipe, name = pictures.load(pipeline, device=device)
    half = _Half("images", f"A guarded {type(pipe).__name__}", name)
    asked = prompts("images")
    progress.print("painting, without and with the guard ...", highlight=False)
    with half_of_the_cores():
        half.results.extend(_counted(pictures.paint(pipe, guard, asked), len(asked), progress))
    return half


def _counted(results: Iterator[Result], total: int, console: Console) -> Iterator[Result]:
    """The results, with a bar on a terminal."""
    from rich.progress import track

    return iter(
        track(
            results,
            description="",
            total=total,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )


def _show(half: _Half, console: Console) -> None:
    from safeguard.demo.table import table

    made = "answer begins" if half.name == "texts" else "prompt used"
    console.print()
    console.print(table(half.results, title=f"{half.title} ({half.model})", made=made))


def _write(output: Path, guard: Guard, halves: Sequence[_Half], console: Console) -> dict[str, Any]:
    """Sheet, report and summary."""
    from safeguard import __version__
    from safeguard.demo.sheet import draw
    from safeguard.demo.table import summary

    written: list[str] = []
    data: dict[str, Any] = {
        "safeguard": __version__,
        "policy": {"name": guard.policy.name, "digest": guard.policy.digest},
    }
    for half in halves:
        found = Summary.of(half.results)
        data[half.name] = {
            "model": half.model,
            "summary": {**asdict(found), "guard_share": found.guard_share},
            "results": [r.to_dict() for r in half.results],
        }
        if half.name == "images":
            refiner = data[half.name]["refiner"] = guard.refiner_in_use()
            subtitle = f"{half.model}; policy {guard.policy.name}; refiner {refiner or 'none'}; "
            subtitle += "the same seed on both sides"
            draw(half.results, title="safeguard demo", subtitle=subtitle).save(output / SHEET)
            data[half.name]["sheet"] = SHEET
            written.append(str(output / SHEET))
    text = json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False)
    write_whole(output / REPORT, text + "\n")
    written.append(str(output / REPORT))
    console.print(summary([(h.name, Summary.of(h.results)) for h in halves], written))
    return data
