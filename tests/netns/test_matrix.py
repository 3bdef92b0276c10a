# SPDX-License-Identifier: GPL-2.0-only
"""The crash matrix (docs/reliability.md): every step of a move, broken in every way that a daemon can break.

Here each phase once. `make matrix MATRIX=cover` breaks at each message as well, `make matrix` runs all of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from . import matrix_case
from .matrix import MatrixCluster
from .matrix_case import Case, Theatre, differing, parameters, play, reachable
from .matrix_faults import FAULTS
from .matrix_scenarios import RESERVED, UNREACHED, Scenario


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    made = Theatre(MatrixCluster)
    yield made
    made.close()


def test_scenarios_come_to_every_point(theatre: Theatre) -> None:
    """A phase or message that is new in the code is red here until a scenario comes to it."""
    trouble = theatre.trouble(reachable())
    print(trouble)  # once more behind the logs, of which there may be more than one is shown
    assert not trouble, trouble


@pytest.mark.parametrize("why", sorted({*UNREACHED.values()} - {RESERVED}))
def test_a_point_without_a_scenario_has_a_test_of_its_own(why: str) -> None:
    file, _, test = why.partition("::")
    assert f"def {test}(" in Path(__file__).parents[1].joinpath(f"{file}.py").read_text()


@pytest.mark.parametrize("case", parameters())
def test_a_fault_at_a_step(theatre: Theatre, case: Case) -> None:
    try:
        print(play(theatre, case))
    except BaseException as error:
        print(theatre.logs(), f"{case}: {type(error).__name__}: {error}", sep="\n")
        theatre.close()
        raise


def test_points_that_differ_are_named_both_ways() -> None:
    assert differing(["a", "b"], ["b", "c"]) == [
        "c: no scenario came to it",
        "a: a scenario came to it, and none is said to",
    ]


def test_a_scenario_that_fails_takes_only_its_own_points_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    came = {"first": ["a"], "last": ["a", "c"]}
    stage: Any = SimpleNamespace(logs=str)
    cluster: Any = contextlib.nullcontext
    theatre = Theatre(cluster, lambda _: stage, [Scenario(name) for name in ("first", "broken", "last")])
    monkeypatch.setattr(matrix_case, "trace", lambda _, scenario: came[scenario.name])
    assert [way.name for way in theatre.ways_to("a")] == ["first", "last"]
    assert [way.name for way in theatre.ways_to("c")] == ["last"]
    with pytest.raises(AssertionError, match=r"(?s)'broken' failed:.*KeyError.*no scenario comes to b"):
        theatre.ways_to("b")
    assert re.search(r"(?s)b: no scenario came to it.*KeyError: 'broken'", theatre.trouble("abc"))


def test_every_fault_is_there() -> None:
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)
