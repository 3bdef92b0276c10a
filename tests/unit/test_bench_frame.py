"""What all benchmarks share: budgets, short results, charts, and no figure of a workload that was not there."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bench import __main__ as command
from bench.figures import Figure, Figures, Unverified, alternately, verify
from bench.plot import Bars, Lines, number


@pytest.mark.parametrize(
    ("values", "budget", "tail", "met"),
    [
        ([1.0, 2.0, 9.0], "<3", "", True),
        ([1.0, 2.0, 9.0], ">3", "", False),
        ([1.0, 2.0, 9.0], "<3", "<8", False),  # too few for a percentile: the most counts
        ([1.0] * 199 + [9.0], "<3", "<8", True),
        ([1.0] * 190 + [9.0] * 10, "<3", "<8", False),
        ([1.0], "", "", None),
    ],
)
def test_a_budget_is_of_the_median_and_of_the_tail(
    values: list[float], budget: str, tail: str, met: bool | None
) -> None:
    assert Figure("x", "ms", values, budget, tail).met() is met


def test_long_series_are_written_as_quantiles_and_short_ones_whole() -> None:
    assert Figure("x", "ms", [1.0, 2.0]).as_data()["values"] == [1.0, 2.0]
    long = Figure("x", "ms", [float(n) for n in range(1001)]).as_data()
    assert "values" not in long
    assert long["quantiles"]["99"] == long["p99"] == 990.0  # type: ignore[index]


def test_works_take_turns_and_the_first_round_is_thrown_away() -> None:
    order: list[str] = []

    def noting(name: str) -> int:
        order.append(name)
        return len(order)

    found = alternately(2, {"a": lambda: noting("a"), "b": lambda: noting("b")})
    assert order == ["a", "b"] * 3
    assert found == {"a": [3, 5], "b": [4, 6]}


@pytest.mark.parametrize("log", [True, False])
def test_charts_are_well_formed_and_have_a_mark_for_each_figure(log: bool) -> None:
    lines, bars = Lines("a < b", "x", "y", log_x=log, log_y=log), Bars("bars", "ns")
    for place, values in ((1_000, [2.0, 3.0]), (1_000_000, [20.0])):
        lines.add("ours & theirs", place, Figure("f", "ms", values))
        bars.add("group", str(place), Figure("f", "ns", values))
    drawn = ElementTree.fromstring(lines.svg())
    assert len(drawn.findall("{*}circle")) == 2
    across = [float(circle.attrib["cx"]) for circle in drawn.findall("{*}circle")]
    assert across == sorted(across)
    assert len(ElementTree.fromstring(bars.svg()).findall("{*}rect")) == 3  # with the ground


def test_numbers_on_a_scale_are_short() -> None:
    assert [number(value) for value in (0.25, 20_000, 1_500_000)] == ["0.25", "20k", "1.5M"]


def test_a_workload_that_was_not_there_gives_no_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK", tmp_path)

    class Good:
        @staticmethod
        def measure(*, quick: bool) -> Figures:  # noqa: ARG004
            figures = Figures(notes=["a note"])
            lines = Lines("title", "x", "y")
            lines.add("ours", 1, figures.add("one", "ms", [1.0]))
            figures.chart("picture", lines)
            return figures

    class Bad:
        @staticmethod
        def measure(*, quick: bool) -> Figures:  # noqa: ARG004
            verify("entries", 999, 1_000)
            return Figures()

    monkeypatch.setattr(command.importlib, "import_module", {"bench.good": Good, "bench.bad": Bad}.__getitem__)
    command.run("good", True, Console(width=140))
    assert "a note" in capsys.readouterr().out
    written = json.loads((tmp_path / "good.json").read_text())
    assert written["figures"][0]["median"] == 1.0
    assert written["machine"]["cpus"] >= 1
    assert (tmp_path / "good-picture.svg").exists()
    with pytest.raises(Unverified, match="entries: 999, not 1000"):
        command.run("bad", True, Console(width=140))
    assert not (tmp_path / "bad.json").exists()
