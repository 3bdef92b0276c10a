# SPDX-License-Identifier: GPL-2.0-only
"""The crash matrix (docs/reliability.md): every step of a move, broken in every way that a daemon can break.

Here each phase once. `make matrix MATRIX=cover` breaks at each message as well, `make matrix` runs all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator import faults

from .matrix import MatrixCluster
from .matrix_case import Case, Theatre, parameters, play
from .matrix_faults import FAULTS
from .matrix_scenarios import RESERVED, UNREACHED


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    made = Theatre(MatrixCluster)
    yield made
    made.close()


def test_scenarios_come_to_every_point(theatre: Theatre) -> None:
    """A phase or message that is new in the code is red here until a scenario comes to it."""
    reached = set(theatre.ways())
    assert reached | set(UNREACHED) == set(faults.points())
    assert not reached & set(UNREACHED)


@pytest.mark.parametrize("why", sorted({*UNREACHED.values()} - {RESERVED}))
def test_a_point_without_a_scenario_has_a_test_of_its_own(why: str) -> None:
    file, _, test = why.partition("::")
    assert f"def {test}(" in Path(__file__).parents[1].joinpath(f"{file}.py").read_text()


@pytest.mark.parametrize("case", parameters())
def test_a_fault_at_a_step(theatre: Theatre, case: Case) -> None:
    try:
        print(play(theatre, case))
    except BaseException:
        print(theatre.logs())
        theatre.close()
        raise


def test_every_fault_is_there() -> None:
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)
