"""Charts of what was measured, as SVG: lines over a scale, and bars beside each other.

A mark is a median; the thin line through it reaches from the least to the most that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from bench.figures import Figure

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 78, 20, 60, 52
HEIGHT, BAR, NAMES = 380, 20, 300
GRID, TEXT = "#d0d7de", "#1f2328"
COLOURS = ("#1f6feb", "#d97706", "#1a7f37", "#cf222e", "#8250df", "#57606a", "#0a7ea4", "#bf3989")
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass
class Lines:
    """One line a name over `x`; both scales are logarithmic unless told otherwise. A line may have a hole."""

    title: str
    x: str
    y: str
    log_x: bool = True
    log_y: bool = True
    points: dict[str, list[tuple[float, Figure]]] = field(default_factory=dict)

    def add(self, name: str, x: float, figure: Figure) -> None:
        self.points.setdefault(name, []).append((x, figure))

    def svg(self) -> str:
        across = _Scale([x for line in self.points.values() for x, _ in line], self.log_x, LEFT, WIDTH - RIGHT)
        values = [end for line in self.points.values() for _, figure in line for end in figure.span()]
        up = _Scale(values, self.log_y, HEIGHT - BOTTOM, TOP)
        parts = [*_legend([*self.points]), *_axes(across, up, self.x, self.y)]
        for colour, line in zip(_colours(), self.points.values(), strict=False):
            parts += _line(line, across, up, colour)
        return _picture(self.title, HEIGHT, parts)


@dataclass
class Bars:
    """A bar for each name in each group, all of one unit, from zero."""

    title: str
    unit: str
    groups: dict[str, dict[str, Figure]] = field(default_factory=dict)

    def add(self, group: str, name: str, figure: Figure) -> None:
        self.groups.setdefault(group, {})[name] = figure

    def svg(self) -> str:
        values = [end for bars in self.groups.values() for figure in bars.values() for end in figure.span()]
        across = _Scale([0.0, *values], False, NAMES, WIDTH - 80)
        names = list(dict.fromkeys(name for bars in self.groups.values() for name in bars))
        colours = dict(zip(names, _colours(), strict=False))
        parts, top = [*_legend(names)] if len(names) > 1 else [], TOP
        for group, bars in self.groups.items():
            parts.append(_text(NAMES - 8, top + BAR * len(bars) / 2 + 4, group, anchor="end"))
            for name, figure in bars.items():
                parts += _bar(figure, across, top, colours[name])
                top += BAR
            top += 8
        parts.append(_text(NAMES, top + 14, self.unit))
        return _picture(self.title, top + 26, parts)


class _Scale:
    """From values to pixels."""

    def __init__(self, values: list[float], log: bool, low: float, high: float) -> None:
        least, most = min(values), max(values)
        self.least: float
        self.most: float
        self.log = log and least > 0
        if self.log:
            first = math.floor(math.log10(least))
            last = max(first + 1, math.ceil(math.log10(most)))
            self.least, self.most = first, last
            self.ticks = [10.0**power for power in range(first, last + 1)]
        else:
            step = _step(max(most, 0.0) or 1.0)
            self.least, self.most = min(0.0, least), step * math.ceil(max(most / step, 1.0))
            self.ticks = [step * number for number in range(round(self.most / step) + 1)]
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.low + (value - self.least) / (self.most - self.least) * (self.high - self.low)


def _step(most: float) -> float:
    """A round step that divides 0..most in four to eight."""
    unit = 10.0 ** math.floor(math.log10(most / 4))
    return next(unit * factor for factor in (1, 2, 5, 10) if most / (unit * factor) <= 8)


def _axes(across: _Scale, up: _Scale, x: str, y: str) -> Iterator[str]:
    for tick in up.ticks:
        yield _stroke(LEFT, up(tick), WIDTH - RIGHT, up(tick), GRID)
        yield _text(LEFT - 6, up(tick) + 4, number(tick), anchor="end")
    for tick in across.ticks:
        yield _stroke(across(tick), TOP, across(tick), HEIGHT - BOTTOM, GRID)
        yield _text(across(tick), HEIGHT - BOTTOM + 16, number(tick), anchor="middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x, anchor="middle")
    yield _text(6, TOP - 8, y)


def _line(line: list[tuple[float, Figure]], across: _Scale, up: _Scale, colour: str) -> Iterator[str]:
    line = sorted(line, key=lambda point: point[0])
    path = " ".join(f"{across(x):.1f},{up(figure.median):.1f}" for x, figure in line)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for x, figure in line:
        least, most = figure.span()
        yield _stroke(across(x), up(least), across(x), up(most), colour)
        yield f'<circle cx="{across(x):.1f}" cy="{up(figure.median):.1f}" r="3.5" fill="{colour}"/>'


def _bar(figure: Figure, across: _Scale, top: float, colour: str) -> Iterator[str]:
    begin, end, middle = across(0), across(figure.median), top + BAR / 2
    least, most = figure.span()
    yield f'<rect x="{begin}" y="{top + 2}" width="{end - begin:.1f}" height="{BAR - 4}" fill="{colour}"/>'
    yield _stroke(across(least), middle, across(most), middle, TEXT)
    yield _text(max(end, across(most)) + 6, middle + 4, number(figure.median))


def _legend(names: list[str]) -> Iterator[str]:
    x = LEFT
    for colour, name in zip(_colours(), names, strict=False):
        yield _stroke(x, 34, x + 18, 34, colour, 3)
        yield _text(x + 24, 38, name)
        x += 44 + round(6.6 * len(name))


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def number(value: float) -> str:
    """As short as it can be said: 1.5M, 20k, 0.25."""
    for unit, letter in UNITS:
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def _picture(title: str, height: float, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="sans-serif" font-size="12">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>'
    name = _text(6, 16, title, weight="bold")
    return "\n".join([head, ground, name, *parts, "</svg>", ""])


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    line = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {line} stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{TEXT}" font-weight="{weight}">{escape(text)}</text>'
