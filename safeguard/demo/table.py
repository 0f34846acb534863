"""The demo in a terminal: one table per half, and a summary below."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from safeguard.demo.results import Result, Summary, done, visible, why

_COLOURS = {
    "allowed": "green",
    "reported": "cyan",
    "refined": "yellow",
    "blocked": "red",
    "not judged": "red",
}


def table(results: Sequence[Result], *, title: str, made: str) -> Table:
    """One row per prompt. made: what comes back, as a heading: "answer" or "prompt used"."""
    found = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        expand=True,
        show_lines=False,
    )
    found.add_column("asked", ratio=31)
    found.add_column("guard", no_wrap=True, min_width=9)
    found.add_column("why", width=26)
    found.add_column(made, ratio=31)
    found.add_column("guard\nms", justify="right", no_wrap=True)
    found.add_column("model\nms", justify="right", no_wrap=True)
    for result in results:
        word = done(result.report)
        mark = "" if result.right else " ✗"
        found.add_row(
            _cut(visible(result.prompt.text), 110),
            Text.assemble((word, _COLOURS.get(word, "magenta")), (mark, "bold magenta")),
            Text(visible(why(result.report)).replace(" (", "\n("), "dim"),  # the finer category below
            _came_back(result),
            f"{result.report.latency_ms:.0f}",
            f"{result.generation_ms:.0f}",
        )
    if not all(result.right for result in results):
        found.caption = "✗ wrong: a harmless prompt was stopped, or a harmful one was not"
        found.caption_justify = "left"
    return found


def summary(halves: Sequence[tuple[str, Summary]], written: Sequence[str]) -> Group:
    """A line per half, and where everything lies."""
    lines = [Text.assemble((f"{name}: ", "bold"), _sentence(found)) for name, found in halves]
    lines.append(Text.assemble(("written: ", "bold"), ", ".join(written)))
    return Group(*lines)


def _sentence(found: Summary) -> str:
    harmless = found.prompts - found.harmful
    return (
        f"{found.prompts} prompts, {found.blocked} blocked, {found.refined} refined; "
        f"harmful stopped {found.harmful_stopped} of {found.harmful}, "
        f"harmless stopped {found.harmless_stopped} of {harmless}; "
        f"guard {found.guard_ms / max(found.prompts, 1):.0f} ms a prompt, {found.guard_share:.1%} of the time"
    )


def _came_back(result: Result) -> Text:
    """First line of the answer, or the prompt that was used for the picture."""
    if result.report.blocked:
        return Text("nothing", "dim")
    if result.answer is not None:
        lines = result.answer.splitlines() or [""]
        return _cut(visible(lines[0]), 80)
    revised = result.report.revised_prompt
    return Text("as asked", "dim") if revised is None else _cut(visible(revised), 110)


def _cut(text: str, most: int) -> Text:
    return Text(text if len(text) <= most else text[: most - 4].rstrip() + " ...")
