from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from safeguard.demo.results import Result, Summary
from safeguard.demo.table import summary, table
from safeguard.types import Action
from tests.demo.demo_results import result


def printed(*results: Result, width: int = 110) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(results, title="title", made="answer"))
    return captured.get()


def test_a_row_says_what_was_asked_done_why_and_how_long() -> None:
    text = printed(result(Action.BLOCK, harmful=True, text="a bad thing", guard_ms=12.4))

    row = next(line for line in text.splitlines() if "a bad thing" in line)
    assert "blocked" in row
    assert "bad 0.90 ≥ 0.50" in row
    assert row.split()[-3:] == ["nothing", "12", "30"]


def test_only_the_first_line_of_an_answer_is_shown() -> None:
    text = printed(result(answer="first line\nsecond line"))

    assert "first line" in text
    assert "second line" not in text


def test_a_refined_prompt_is_shown() -> None:
    assert "a small dog" in printed(result(Action.REFINE, harmful=True, revised="a small dog"))


def test_markup_and_escapes_in_an_answer_are_shown_as_they_are() -> None:
    text = printed(result(answer="[red]x[/red]\x1b[0m"))

    assert "[red]x[/red]·[0m" in text


def test_wrong_decisions_are_marked_and_explained() -> None:
    text = printed(result(Action.BLOCK, harmful=False))

    assert "blocked ✗" in text
    assert "✗ wrong: a harmless prompt was stopped" in text


def test_no_mark_is_explained_where_all_is_right() -> None:
    assert "✗" not in printed(result())


def test_the_table_fits_into_110_columns() -> None:
    text = printed(result(text="word " * 60, answer="word " * 60))

    assert max(len(line) for line in text.splitlines()) <= 110


def test_the_summary_names_counts_share_and_files() -> None:
    results: Sequence[Result] = [result(), result(Action.BLOCK, harmful=True)]
    console = Console(width=300)
    with console.capture() as captured:
        console.print(summary([("texts", Summary.of(results))], ["out/report.json"]))

    assert captured.get().splitlines() == [
        "texts: 2 prompts, 1 blocked, 0 refined; harmful stopped 1 of 1, harmless stopped 0 of 1; "
        "guard 10 ms a prompt, 25.0% of the time",
        "written: out/report.json",
    ]
