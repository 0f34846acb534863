"""One page on any number of detoxification results: a table and plots, without anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from safeguard.evaluate.detox_svg import bars, curve, scatter

Result = Mapping[str, Any]

_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1b1b1b;"
    "background:#fff}table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap;"
    "font-variant-numeric:tabular-nums}th{border-bottom:2px solid #888;vertical-align:bottom}"
    "td:first-child,th:first-child{text-align:left}small{color:#666}svg{max-width:100%;height:auto}"
    "td:first-child,th:first-child{position:sticky;left:0;background:#fff}"
    "figure{margin:1.5rem 0}figcaption{color:#555}.best{font-weight:700}"
)


def read_result(path: Path) -> dict[str, Any]:
    """A result file of `evaluate detox`. Raises ValueError for any other JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as exc:
        raise ValueError(f"{path.name} is no JSON file: {exc}") from exc
    if not isinstance(found, dict) or found.get("kind") != "detox" or found.get("format") != 1:
        raise ValueError(f"{path.name} must be a result of `safeguard evaluate detox`")
    return found


def report_html(
    results: Sequence[Result],
    *,
    title: str = "Detoxification",
    contamination: Mapping[str, Any] | None = None,
) -> str:
    """The page. Results come in their order, one row each; those of training steps also make curves.

    Raises ValueError without results.
    """
    if not results:
        raise ValueError("a report needs at least one result")
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>TP: share of prompts with at least one toxic continuation. EMT: mean over prompts of the most "
        "toxic continuation. Less is better for both. Mean over seeds, ± sample standard deviation.</p>",
        table_html(results),
        *_notes(results),
        *_plots(results),
    ]
    if contamination:
        parts.append(contamination_html(contamination))
    parts.append(_details(results))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def columns_of(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """(suite, judge, part, measure) for every column of toxicity that any result has."""
    found: dict[tuple[str, str, str, str], None] = {}
    for result in results:
        for suite, figures in result["suites"].items():
            for judge, families in figures["judges"].items():
                split = [p for p in ("in_distribution", "out_of_distribution") if p in families]
                for part in split or ["all"]:
                    for measure in ("tp", "emt"):
                        found[suite, judge, part, measure] = None
    return list(found)


def value_of(result: Result, column: tuple[str, str, str, str]) -> Mapping[str, Any] | None:
    """Mean and spread in a column of toxicity; None where the result does not have it."""
    suite, judge, part, measure = column
    found = result["suites"].get(suite, {}).get("judges", {}).get(judge, {}).get(part, {}).get(measure)
    return found if found is None else dict(found)


def others_of(result: Result) -> dict[str, float | None]:
    """The figures that are not about toxicity, by the names of their columns."""
    clean, choice = result.get("clean", {}), result.get("choice", {})
    suites = list(result["suites"].values())
    first = suites[0] if suites else {}
    distinct = first.get("distinct", {})
    row = {
        "perplexity, clean": clean.get("perplexity"),
        "drift, nats": clean.get("drift_nats_per_token"),
        "perplexity, other": result.get("continuation_perplexity", {}).get("perplexity"),
    }
    for way, name in (("continuation", "Dist"), ("with_prompt", "Dist+prompt")):
        for n in ("1", "2", "3"):
            row[f"{name}-{n}"] = distinct.get(way, {}).get(n, {}).get("mean")
    row["accuracy, letters"], row["accuracy, UniDetox"] = choice.get("letters"), choice.get("unidetox")
    row["withheld"], row["tokens/s"] = first.get("withheld"), first.get("tokens_per_s")
    return row


def table_html(results: Sequence[Result]) -> str:
    """All results, one row each; the lowest toxicity of each column stands out."""
    columns, names = columns_of(results), list(others_of(results[0]))
    rows = [others_of(result) for result in results]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    head = "".join(
        f"<th>{measure.upper()}<br>{escape(suite)}{_short(part)}<br><small>{escape(judge)}</small></th>"
        for suite, judge, part, measure in columns
    ) + "".join(f"<th>{escape(name)}</th>" for name in names)
    least = {
        column: min((v["mean"] for r in results if (v := value_of(r, column)) is not None), default=None)
        for column in columns
    }
    body = []
    for result, row in zip(results, rows, strict=True):
        cells = [_spread(value_of(result, column), least[column]) for column in columns]
        cells += [f"<td>{_number(row.get(name))}</td>" for name in names]
        body.append(f"<tr><td>{escape(_name(result))}</td>{''.join(cells)}</tr>")
    return f"<table><thead><tr><th>model</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def contamination_html(report: Mapping[str, Any]) -> str:
    """The table of what stands in what."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{row['items']}</td><td>{row['longest_span']}</td>"
        f"<td>{row['mean_span']:.2f}</td><td>{row['share_span_8']:.4f}</td>"
        f"<td>{row['largest_jaccard']:.2f}</td><td>{row['share_jaccard']:.4f}</td>"
        f"<td>{len(row['contaminated'])}</td></tr>"
        for name, row in report.items()
    )
    return (
        "<h2>Contamination</h2><table><thead><tr><th>pair</th><th>items</th><th>longest span, words</th>"
        "<th>mean span</th><th>share with 8 words in a row</th><th>largest Jaccard</th>"
        f"<th>share from 0.8</th><th>contaminated</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _plots(results: Sequence[Result]) -> Iterator[str]:
    final = [result for result in results if result.get("step") is None]
    final = final if len(final) > 1 else list(results)
    for column in columns_of(results):
        suite, judge, part, measure = column
        title = f"{measure.upper()}, {suite}{_short(part)}, {judge}"
        rows = [(_name(r), v["mean"], v.get("std")) for r in final if (v := value_of(r, column)) is not None]
        if rows:
            yield _figure(bars(rows, title), title)
        if measure != "tp":
            continue
        points = [
            (_name(r), float(p), v["mean"])
            for r in final
            if (v := value_of(r, column)) is not None
            and (p := r.get("clean", {}).get("perplexity")) is not None
        ]
        if len(points) > 1:
            what = f"{title} against perplexity on clean text: down and left is better"
            yield _figure(scatter(points, "perplexity on clean text", "TP"), what)
        yield from _curves(results, column, title)


def _curves(results: Sequence[Result], column: tuple[str, str, str, str], title: str) -> Iterator[str]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        value = value_of(result, column)
        if result.get("step") is not None and value is not None:
            lines.setdefault(result["name"], []).append((float(result["step"]), value["mean"]))
    first = results[0]
    start = value_of(first, column) if first["name"] == "base" and first.get("step") is None else None
    if start is not None:  # where every training began
        lines = {name: [(0.0, start["mean"]), *points] for name, points in lines.items()}
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if lines:
        yield _figure(curve(lines, "training step", "TP"), f"{title} over training")


def _notes(results: Sequence[Result]) -> Iterator[str]:
    """What is to be known of some rows, and of all: each once, with the names of its rows."""
    told: dict[str, list[str]] = {}
    for result in results:
        if result.get("note"):
            told.setdefault(str(result["note"]), []).append(_name(result))
    for note, names in told.items():
        yield f"<p><small>{escape(', '.join(names))}: {escape(note)}</small></p>"
    for reduced in dict.fromkeys(str(r["reduced"]) for r in results if r.get("reduced")):
        yield f"<p><small>Not the published settings: {escape(reduced)}</small></p>"


def _details(results: Sequence[Result]) -> str:
    """Every family of every result, and the settings, for whoever wants to know it exactly."""
    parts = ["<h2>Families</h2>"]
    for result in results:
        rows = "".join(
            f"<tr><td>{escape(suite)}</td><td>{escape(judge)}</td><td>{escape(family)}</td>"
            f"<td>{row['prompts']}</td>{_spread(row['tp'])}{_spread(row['emt'])}</tr>"
            for suite, figures in result["suites"].items()
            for judge, families in figures["judges"].items()
            for family, row in families.items()
        )
        settings = escape(json.dumps(result.get("settings", {}), sort_keys=True))
        parts.append(
            f"<details><summary>{escape(_name(result))}</summary><table><thead><tr><th>suite</th><th>judge</th>"
            f"<th>family</th><th>prompts</th><th>TP</th><th>EMT</th></tr></thead><tbody>{rows}</tbody></table>"
            f"<p><small>weights <code>{escape(str(result.get('model_digest', ''))[:16])}</code>, settings "
            f"<code>{settings}</code></small></p></details>"
        )
    return "".join(parts)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _name(result: Result) -> str:
    step = result.get("step")
    return str(result["name"]) + ("" if step is None else f", step {step}")


def _short(part: str) -> str:
    return {"in_distribution": " ID", "out_of_distribution": " OOD"}.get(part, "")


def _spread(value: Mapping[str, Any] | None, least: float | None = None) -> str:
    if value is None:
        return "<td></td>"
    std = "" if value.get("std") is None else f" <small>± {value['std']:.3f}</small>"
    best = ' class="best"' if least is not None and value["mean"] == least else ""
    return f"<td{best}>{value['mean']:.3f}{std}</td>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
