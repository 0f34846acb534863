"""A picture of a benchmark: one SVG, written by hand, so that it needs no library and diffs as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _LEFT, _RIGHT = 980, 330, 120
_LINE, _HEAD, _GAP = 18, 44, 26
_OURS, _OTHERS, _GRID = "#2563a8", "#9a9a9a", "#dddddd"
_STYLE = "font: 12px sans-serif"


def svg(document: Mapping[str, Any]) -> str:
    """Every row as a bar on a logarithmic axis, with a line from quartile to quartile; ours are blue."""
    parts: list[str] = []
    y = 40
    for section in document["sections"]:
        for workload, rows in _panels(section):
            title = f"{section['title']} - {workload}" if workload else section["title"]
            parts += _panel(title, rows, y)
            y += _HEAD + _LINE * len(rows) + _GAP
    machine = document["machine"]
    caption = f"{machine['processor']}, {machine['cores']} cores. Milliseconds per item, less is better."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" style="{_STYLE}">',
            f'<rect width="{_WIDTH}" height="{y}" fill="white"/>',
            f'<text x="12" y="22">{escape(caption)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def _panels(section: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """(title, rows with their names): a panel for each workload, or for each model under load."""
    by = "workload" if section["name"] in ("text", "image") else "contender"
    other = "contender" if by == "workload" else "workload"
    for value in dict.fromkeys(row[by] for row in section["rows"]):
        yield value, [(row[other], row) for row in section["rows"] if row[by] == value]


def _panel(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], top: int) -> list[str]:
    least = min(row["quartiles_ms"][0] for _, row in rows)
    most = max(row["quartiles_ms"][1] for _, row in rows)
    low, high = _decades(least, most)

    def x(value: float) -> float:
        share = (math.log10(max(value, 10**low)) - low) / (high - low)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    bottom = top + _HEAD + _LINE * len(rows) - 12
    parts = [f'<text x="12" y="{top + 12}" font-weight="bold">{escape(title)}</text>']
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at}" y1="{top + 32}" x2="{at}" y2="{bottom}" stroke="{_GRID}"/>')
        parts.append(f'<text x="{at}" y="{top + 28}" text-anchor="middle" fill="#666">{10.0**power:g}</text>')
    for i, (name, row) in enumerate(rows):
        parts += _bar(name, row, top + _HEAD + i * _LINE, x)
    return parts


def _bar(name: str, row: Mapping[str, Any], y: int, x: Any) -> list[str]:
    first, third = (x(value) for value in row["quartiles_ms"])
    end, middle = x(row["median_ms"]), y - 4
    width = max(1.0, round(end - _LEFT, 1))
    ours = row["contender"].startswith(("ours", "safeguard", "text-guard"))
    colour = _OURS if ours else _OTHERS
    return [
        f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{_LEFT}" y="{y - 10}" width="{width}" height="12" fill="{colour}"/>',
        f'<line x1="{first}" y1="{middle}" x2="{third}" y2="{middle}" stroke="black"/>',
        f'<text x="{max(end, third) + 6}" y="{y}">{row["median_ms"]:.3g}</text>',
    ]


def _decades(least: float, most: float) -> tuple[int, int]:
    """Powers of ten around the values, one decade at least; what is not above 0 does not count."""
    low = math.floor(math.log10(least)) if least > 0 else -4
    return low, max(low + 1, math.ceil(math.log10(most)) if most > 0 else 0)
