"""Plots as SVG, written by hand: bars with their spread, points with names, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 220, 20, 44
_COLOURS = ("#2563a8", "#b4441c", "#3c7d3c", "#7a4fa0", "#8a6d00", "#1b7f86", "#a03060", "#555555")


def bars(rows: Sequence[tuple[str, float, float | None]], title: str) -> str:
    """One horizontal bar for each (name, value in [0, 1], its standard deviation or None)."""
    left, line = 260, 26
    height = 34 + line * len(rows) + 26
    scale = _WIDTH - left - 90
    parts = [_open(height, title)]
    for tenth in range(0, 11, 2):
        at = left + scale * tenth / 10
        parts.append(f'<line x1="{at:.1f}" y1="26" x2="{at:.1f}" y2="{height - 24}" stroke="#ddd"/>')
        parts.append(_text(at, height - 8, f"{tenth / 10:g}", anchor="middle", colour="#666"))
    for i, (name, value, deviation) in enumerate(rows):
        y, end = 34 + i * line, left + scale * min(1.0, max(0.0, value))
        parts.append(_text(left - 8, y + 13, name, anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{max(1.0, end - left):.1f}" height="17" '
            f'fill="{_COLOURS[i % len(_COLOURS)]}"/>'
        )
        reach = end
        if deviation:
            low, reach = max(float(left), end - scale * deviation), end + scale * deviation
            parts.append(f'<line x1="{low:.1f}" y1="{y + 8}" x2="{reach:.1f}" y2="{y + 8}" stroke="#000"/>')
        parts.append(_text(max(end, reach) + 6, y + 13, f"{value:.3f}"))
    return "\n".join([*parts, "</svg>"])


def scatter(points: Sequence[tuple[str, float, float]], x_name: str, y_name: str) -> str:
    """One named point for each (name, x, y)."""
    axes = _Axes([x for _, x, _ in points], [y for _, _, y in points], x_name, y_name)
    places = [axes.place(x, y) for _, x, y in points]
    names = apart([y for _, y in places])
    for i, ((name, _, _), (at_x, at_y), at_name) in enumerate(zip(points, places, names, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.parts.append(f'<circle cx="{at_x}" cy="{at_y}" r="5" fill="{colour}"/>')
        axes.parts += _named(at_x, at_y, at_name, name, colour)
    return axes.done()


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """One line for each name, through its (x, y) in their order."""
    every = [point for points in lines.values() for point in points]
    axes = _Axes([x for x, _ in every], [y for _, y in every], x_name, y_name)
    drawn = {name: [axes.place(x, y) for x, y in points] for name, points in lines.items()}
    names = apart([places[-1][1] for places in drawn.values()])
    for i, ((name, places), at_name) in enumerate(zip(drawn.items(), names, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in places)
        axes.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        axes.parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in places]
        axes.parts += _named(*places[-1], at_name, name, colour)
    return axes.done()


def apart(heights: Sequence[float], gap: float = 14.0) -> list[float]:
    """The heights, in their order, moved upwards (to smaller ones) until all are a line of text apart."""
    out, free = list(heights), math.inf
    for i in sorted(range(len(out)), key=lambda i: -out[i]):
        out[i] = min(out[i], free)
        free = out[i] - gap
    return out


def _named(x: float, y: float, at: float, name: str, colour: str) -> list[str]:
    """A name beside a point, at a height that is its own or joined to it by a line."""
    line = f'<line x1="{x}" y1="{y}" x2="{x + 14}" y2="{at:.1f}" stroke="{colour}" stroke-width="0.7"/>'
    moved = abs(at - y) > 1
    return [*([line] if moved else []), _text(x + (16 if moved else 8), at + 4, name, colour=colour)]


class _Axes:
    """A frame with round numbers at its axes; y begins at 0."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_name: str, y_name: str) -> None:
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs)), ticks(0.0, max(ys))
        self.parts = [_open(_HEIGHT, f"{y_name} against {x_name}")]
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for x in self.x_ticks:
            at = self.place(x, 0)[0]
            self.parts.append(f'<line x1="{at}" y1="{_TOP}" x2="{at}" y2="{bottom}" stroke="#eee"/>')
            self.parts.append(_text(at, bottom + 16, f"{x:g}", anchor="middle", colour="#666"))
        for y in self.y_ticks:
            at = self.place(self.x_ticks[0], y)[1]
            self.parts.append(f'<line x1="{_LEFT}" y1="{at}" x2="{right}" y2="{at}" stroke="#ddd"/>')
            self.parts.append(_text(_LEFT - 8, at + 4, f"{y:g}", anchor="end", colour="#666"))
        self.parts.append(_text((_LEFT + right) / 2, _HEIGHT - 8, x_name, anchor="middle"))
        self.parts.append(_text(12, _TOP - 6, y_name))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pair of values lies in the picture."""
        low, high = self.x_ticks[0], self.x_ticks[-1]
        across = _LEFT + (x - low) / (high - low) * (_WIDTH - _RIGHT - _LEFT)
        up = y / self.y_ticks[-1] * (_HEIGHT - _BOTTOM - _TOP)
        return round(across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    def done(self) -> str:
        """The finished picture."""
        return "\n".join([*self.parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most low to at least high, two at least."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def _open(height: int, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(title, quote=True)}" style="font:12px sans-serif">'
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#1b1b1b") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
