"""What a benchmark measured: named series with a unit, their medians and spreads, and ratios between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from rich.table import Table

KEPT = 50
"""Series of up to so many values are written whole, longer ones as quantiles."""
TAIL = 100
"""From so many values on a 99th percentile says something."""
QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
Result = TypeVar("Result")


class Unverified(AssertionError):
    """A workload was not what the benchmark says it measures, so that its times mean nothing."""


def verify(what: str, found: object, wanted: object) -> None:
    """Raises Unverified unless both are the same. Called before a time is used."""
    if found != wanted:
        raise Unverified(f"{what}: {found}, not {wanted}")


class Chart(Protocol):
    """What `bench.plot` draws."""

    def svg(self) -> str: ...


@dataclass
class Figure:
    """One series. `budget` is what the design asks of the median: "<" or ">" and a number in `unit`; `tail`: of p99."""

    name: str
    unit: str
    values: list[float]
    budget: str = ""
    tail: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def p99(self) -> float | None:
        return float(np.percentile(self.values, 99)) if len(self.values) >= TAIL else None

    def span(self) -> tuple[float, float]:
        """Least and most; of a long series its 1st and 99th percentile."""
        if len(self.values) < TAIL:
            return min(self.values), max(self.values)
        return float(np.percentile(self.values, 1)), float(np.percentile(self.values, 99))

    def met(self) -> bool | None:
        """Whether its budgets are met, None without one. A budget of the tail takes the most of a short series."""
        answers = [_within(self.median, self.budget)] if self.budget else []
        if self.tail:
            answers.append(_within(max(self.values) if self.p99 is None else self.p99, self.tail))
        return all(answers) if answers else None

    def as_data(self) -> dict[str, object]:
        data: dict[str, object] = {"name": self.name, "unit": self.unit, "n": len(self.values)}
        data["median"] = _short(self.median)
        if self.p99 is not None:
            data["p99"] = _short(self.p99)
        if len(self.values) <= KEPT:
            data["values"] = [_short(value) for value in self.values]
        else:
            data["quantiles"] = {str(q): _short(float(np.percentile(self.values, q))) for q in QUANTILES}
        if self.met() is not None:
            data |= {"budget": self.budget, "budget_p99": self.tail, "met": self.met()}
        return data


@dataclass
class Figures:
    rows: list[Figure] = field(default_factory=list)
    charts: dict[str, Chart] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the reader must know of these figures: a peer that is not installed, a series that was left out and why."""

    def add(self, name: str, unit: str, values: list[float], budget: str = "", tail: str = "") -> Figure:
        self.rows.append(Figure(name, unit, values, budget, tail))
        return self.rows[-1]

    def ratio(self, name: str, over: Figure, under: Figure, budget: str = "") -> Figure:
        """`over` / `under`, pair by pair: both were measured alternately."""
        pairs = zip(over.values, under.values, strict=True)
        return self.add(name, "x", [above / below for above, below in pairs], budget)

    def chart(self, name: str, chart: Chart) -> None:
        """Drawn into NAME-<name>.svg beside the benchmark's figures."""
        self.charts[name] = chart

    def table(self, title: str) -> Table:
        table = Table("figure", "median", "least", "p99", "most", "n", "unit", "budget", title=title)
        table.title_justify = "left"
        for row in self.rows:
            numbers = [_text(value) for value in (row.median, min(row.values), row.p99, max(row.values))]
            table.add_row(row.name, *numbers, str(len(row.values)), row.unit, _budget(row))
        return table

    def as_data(self) -> dict[str, object]:
        return {"figures": [row.as_data() for row in self.rows], "notes": self.notes}


def alternately(
    rounds: int, works: Mapping[str, Callable[[], Result]], *, warm_up: bool = True
) -> dict[str, list[Result]]:
    """What each work returned in each round; the works take turns, so that what slows the machine slows all.

    With `warm_up` a first round is thrown away.
    """
    found: dict[str, list[Result]] = {name: [] for name in works}
    for number in range(-int(warm_up), rounds):
        for name, work in works.items():
            result = work()
            if number >= 0:
                found[name].append(result)
    return found


@dataclass(frozen=True)
class Took:
    """Seconds that a work took, by the clock and of CPU; `peak`: bytes of memory that it needed beside what was there.

    Of another process: all of its memory.
    """

    wall_s: float
    cpu_s: float
    peak: int = 0


def measured(work: Callable[[], Result]) -> tuple[Took, Result]:
    """What the work took in this process, and what it returned."""
    _CLEAR_REFS.write_text("5")  # the peak begins anew (proc(5))
    before, wall, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    result = work()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return Took(wall_s, cpu_s, max(0, _memory("VmHWM") - before)), result


_CLEAR_REFS = Path("/proc/self/clear_refs")


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) << 10


def _within(value: float, budget: str) -> bool:
    bound = float(budget[1:])
    return value < bound if budget[0] == "<" else value > bound


def _budget(row: Figure) -> str:
    asked = ", ".join(part for part in (row.budget, row.tail and f"p99 {row.tail}") if part)
    return {None: "", True: f"{asked} met", False: f"{asked} MISSED"}[row.met()]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
