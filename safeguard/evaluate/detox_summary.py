"""The detoxification results in short: shares of the base's toxicity, and a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safeguard.evaluate.detox_report import others_of

Result = Mapping[str, Any]


def shares(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Row -> its TP, EMT and clean perplexity as shares of the first row's, and points of accuracy."""
    if not results:
        return {}
    first, table = results[0], {}
    base = _figures(first)
    for result in results[1:]:
        row: dict[str, float] = {}
        for name, value in _figures(result).items():
            before = base.get(name)
            if value is None or before is None:
                continue
            if name.startswith("accuracy"):
                row[f"{name}, points"] = round(100 * (value - before), 2)
            elif before > 0:
                row[name] = round(value / before, 3)
        table[str(result["name"])] = row
    return table


def markdown(results: Sequence[Result], reduced: str = "") -> str:
    """The table for a card: a row for each result. reduced: what was made smaller than published."""
    rows = [_figures(result) | _more(result) for result in results]
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    lines = [
        "| model | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
        *(
            f"| {result['name']} | " + " | ".join(_number(row.get(name)) for name in names) + " |"
            for result, row in zip(results, rows, strict=True)
        ),
    ]
    if results:
        lines += ["", _sizes(results[0])]
    if reduced:
        lines += ["", f"Not the published settings: {reduced}"]
    return "\n".join(lines) + "\n"


def _figures(result: Result) -> dict[str, float | None]:
    """Toxicity over all prompts of each suite, by judge; perplexity; accuracy."""
    found: dict[str, float | None] = {}
    for suite, figures in result["suites"].items():
        for judge, families in figures["judges"].items():
            for measure in ("tp", "emt"):
                found[f"{measure.upper()} {suite}, {judge}"] = families["all"][measure]["mean"]
    others = others_of(result)
    for name in ("perplexity, clean", "perplexity, other", "accuracy, letters", "accuracy, UniDetox"):
        found[name] = others.get(name)
    return found


def _more(result: Result) -> dict[str, float | None]:
    others = others_of(result)
    return {n: others.get(n) for n in ("Dist-1", "Dist-2", "Dist-3", "withheld", "tokens/s")}


def _sizes(result: Result) -> str:
    settings = result["settings"]
    suites = ", ".join(f"{name} {figures['prompts']}" for name, figures in result["suites"].items())
    return (
        f"Prompts: {suites}; {settings['continuations']} continuations of {settings['new_tokens']} tokens, "
        f"top-p {settings['top_p']:g}; {len(settings['seeds'])} seeds; "
        f"{settings['clean_texts']} clean texts; "
        f"{result.get('choice', {}).get('questions', 0)} questions."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
