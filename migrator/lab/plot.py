# SPDX-License-Identifier: GPL-2.0-only
"""The demonstration as a picture: connections alive and probes answered over time, written as SVG by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 860, 150, 64, 64, 46, 58
ALIVE, PROBES, GRID, TEXT = "#1f6feb", "#d97706", "#d0d7de", "#1f2328"


@dataclass(frozen=True)
class Panel:
    """One run: seconds from its begin, connections alive and share of probes answered (0..1), and the moves in it."""

    title: str
    seconds: Sequence[float]
    alive: Sequence[float]
    total: int
    probe_seconds: Sequence[float]
    answered: Sequence[float]
    moves: Sequence[tuple[float, str]]


def write(file: Path, panels: Sequence[Panel]) -> None:
    """Write the picture; panels below each other on one scale of time."""
    end = max((max([*p.seconds, *p.probe_seconds], default=1.0) for p in panels), default=1.0)
    height = TOP + len(panels) * (PANEL + GAP) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, TOP + number * (PANEL + GAP), end)
    file.write_text("\n".join([*parts, "</svg>", ""]))


def _legend() -> list[str]:
    return [
        _line(LEFT, 16, LEFT + 24, 16, ALIVE, 3) + _text(LEFT + 30, 20, "connections alive"),
        _line(LEFT + 190, 16, LEFT + 214, 16, PROBES, 3)
        + _text(LEFT + 220, 20, "probes answered (every 10 ms, share per 100 ms)"),
    ]


def _panel(panel: Panel, top: float, end: float) -> list[str]:
    def x(second: float) -> float:
        return LEFT + second / end * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return top + 18 + (1 - share) * (PANEL - 18)

    parts = [_text(LEFT, top + 8, panel.title, weight="bold")]
    for share in (0.0, 0.5, 1.0):
        parts.append(_line(LEFT, y(share), WIDTH - RIGHT, y(share), GRID))
        parts.append(_text(LEFT - 8, y(share) + 4, f"{share * panel.total:.0f}", anchor="end", colour=ALIVE))
        parts.append(_text(WIDTH - RIGHT + 8, y(share) + 4, f"{share:.0%}", colour=PROBES))
    for tick in range(0, int(end) + 1, max(1, int(end) // 12)):
        parts.append(_text(x(tick), top + PANEL + 16, f"{tick} s", anchor="middle"))
    for second, name in panel.moves:
        parts.append(_line(x(second), y(1.0), x(second), y(0.0), TEXT, 1, dash="4 3"))
        parts.append(_text(x(second) + 4, y(0.0) - 6, name))
    parts.append(_path([(x(s), y(a)) for s, a in zip(panel.probe_seconds, panel.answered, strict=True)], PROBES, 1.5))
    parts.append(
        _path([(x(s), y(a / max(1, panel.total))) for s, a in zip(panel.seconds, panel.alive, strict=True)], ALIVE, 2.5)
    )
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "") -> str:
    style = f'stroke="{colour}" stroke-width="{width}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = TEXT, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}">{text}</text>'


def _path(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
