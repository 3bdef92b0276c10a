"""The exhaustive model within its small budgets; `--model=full` (`make model`) goes further."""

from __future__ import annotations

import pytest

from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source_words as aw
from tests.model.budgets import FULL, SMALL
from tests.model.explore import explore
from tests.model.model import Model
from tests.model.world import Budget

pytestmark = pytest.mark.timeout(900)  # seconds of CPU, but others may have most of it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "budget" in metafunc.fixturenames:
        full = metafunc.config.getoption("--model", default="small") == "full"
        metafunc.parametrize("budget", (*SMALL, *(FULL if full else ())), ids=str)


def test_every_interleaving(budget: Budget, capsys: pytest.CaptureFixture[str]) -> None:
    found = explore(Model(budget))
    with capsys.disabled():
        print(f"\n  {budget}: {found.states} states, {found.transitions} transitions, {found.ends} ends", end="")
    assert found.ends > 0


@pytest.mark.parametrize(
    "given", [{}, {"hypervisor": False}, {"dry_run": True}, {"strict": True}], ids=lambda given: str(Budget(**given))
)
def test_the_reduction_hides_nothing(given: dict[str, bool]) -> None:
    """With every step apart, what parties and invariants can tell apart is the same."""
    reduced = explore(Model(Budget(**given)), views=True)
    whole = explore(Model(Budget(**given, reduced=False)), views=True)
    assert reduced.views == whole.views
    assert reduced.states < whole.states


def test_a_search_reaches_every_phase() -> None:
    """What is explored is what the machines have: a model in which nothing happens would find nothing either."""
    source: set[str] = set()
    destination: set[str] = set()
    for budget in (Budget(self_stops=1), Budget(hypervisor=False, cuts=1)):
        model = Model(budget)
        explore(model)
        source |= set(model.a.phases)
        destination |= set(model.b.phases)
    assert source >= set(aw.Phase)
    assert destination >= set(bw.Phase)
