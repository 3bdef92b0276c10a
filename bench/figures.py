"""What a benchmark measured: named series with a unit, their medians and spreads, and ratios between them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from rich.table import Table


@dataclass
class Figure:
    """One series. `budget` is what the design asks of the median: "<" or ">" and a number in `unit`."""

    name: str
    unit: str
    values: list[float]
    budget: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def met(self) -> bool | None:
        if not self.budget:
            return None
        bound = float(self.budget[1:])
        return self.median < bound if self.budget[0] == "<" else self.median > bound


@dataclass
class Figures:
    rows: list[Figure] = field(default_factory=list)

    def add(self, name: str, unit: str, values: list[float], budget: str = "") -> Figure:
        self.rows.append(Figure(name, unit, values, budget))
        return self.rows[-1]

    def ratio(self, name: str, over: Figure, under: Figure, budget: str = "") -> None:
        """`over` / `under`, pair by pair: both were measured alternately."""
        pairs = zip(over.values, under.values, strict=True)
        self.add(name, "x", [above / below for above, below in pairs], budget)

    def table(self, title: str) -> Table:
        table = Table("figure", "median", "least", "most", "n", "unit", "budget", title=title, title_justify="left")
        for row in self.rows:
            met = {None: "", True: f"{row.budget} met", False: f"{row.budget} MISSED"}[row.met()]
            numbers = [f"{value:,.4g}" if value < 1e5 else f"{value:,.0f}" for value in _span(row)]
            table.add_row(row.name, *numbers, str(len(row.values)), row.unit, met)
        return table

    def as_data(self) -> list[dict[str, object]]:
        return [
            {"name": row.name, "unit": row.unit, "median": row.median, "values": row.values, "budget": row.budget}
            for row in self.rows
        ]


def _span(row: Figure) -> tuple[float, float, float]:
    return row.median, min(row.values), max(row.values)
