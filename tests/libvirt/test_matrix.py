# SPDX-License-Identifier: GPL-2.0-only
"""The crash matrix with a QEMU guest that libvirt moves: each step, each call of the hook, broken in every way.

Here every second phase and call of the hook, by faults of every kind; `test_killed` has all of them with the daemons
that die alone. `make matrix-qemu MATRIX=steps` breaks at each once, `MATRIX=cover` at each message as well; without it
runs all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from migrator import faults
from tests.netns.matrix_case import SHARE, SLOW, Case, Theatre, chosen, play, spread
from tests.netns.matrix_faults import FAULTS
from tests.netns.matrix_scenarios import RESERVED, RESTARTING, UNLOADABLE

from .faulty import GUEST_FAULTS, SCENARIOS, FaultyCluster, GuestStage
from .test_killed import HOOKS

pytestmark = pytest.mark.slow
ELSEWHERE = "the crash matrix of vNIC guests comes to it"
UNREACHED = {
    "source.send.restart": RESTARTING,
    "destination.got.restart": RESTARTING,
    "destination.send.failed": UNLOADABLE,
    "source.got.failed": UNLOADABLE,
    "source.send.judged": RESERVED,
    "destination.got.judged": RESERVED,
    "agent.send.instance": RESERVED,
    "coordinator.got.instance": RESERVED,
    **dict.fromkeys((f"{at}.remove" for at in ("coordinator.send", "agent.got")), ELSEWHERE),
}
"""Points that no move of a QEMU guest comes to, and why."""
SOMETIMES = {
    # The source says that its redirect is idle, and all hosts that they know the place, before or after it has settled.
    "coordinator.done",
    # It says "redirecting" before the destination's "opened" comes, which names the configuration that it has.
    *("coordinator.send.port", "agent.got.port"),
    # QEMU stops the guest before the agent does: before the switchover is authorised; it runs before the last changes.
    *("source.drained", "destination.waiting"),
    # A deadline passes, and it is given up, asked for, or opened without.
    *("source.aborting", "destination.fenced", "coordinator.in-doubt"),
    *("source.send.ask", "destination.got.ask", "destination.send.answer", "source.got.answer"),
    *(f"{at}.progress.{event}" for at in ("agent.send", "coordinator.got") for event in ("failed", "degraded")),
    # So slow that a connection is taken for dead.
    *("agent.send.hello", "coordinator.got.hello", "coordinator.send.sync", "agent.got.sync"),
}
"""Points that time decides on: come to when one end is quicker than another, or the machine too slow for a deadline."""
CALLS = [f"hook.{operation}" for operations in HOOKS.values() for operation in operations]
PHASES = [point for point in faults.points() if point.count(".") == 1]
MESSAGES = [point for point in faults.points() if point.count(".") > 1]


def _reached(points: list[str]) -> list[str]:
    return [point for point in points if point not in UNREACHED and point not in SOMETIMES]


def cases() -> list[Case]:
    steps, messages = [*CALLS, *_reached(PHASES)], _reached(MESSAGES)
    share = os.environ.get(SHARE, "")
    many = [fault for fault in GUEST_FAULTS if fault.name not in ("kill-A", "kill-B", "kill-C")]
    if share in ("", "steps"):
        return spread(steps, many)[:: 1 if share else 2]
    if share == "cover":
        return [*spread(steps, GUEST_FAULTS), *spread(messages, [one for one in FAULTS if one.kind not in SLOW])]
    return chosen([*steps, *messages], GUEST_FAULTS, share)


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    made = Theatre(FaultyCluster, GuestStage, SCENARIOS)
    yield made
    made.close()


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in cases()])
def test_a_fault_at_a_step(theatre: Theatre, case: Case) -> None:
    try:
        print(play(theatre, case))
    except BaseException as error:
        print(theatre.logs(), f"{case}: {type(error).__name__}: {error}", sep="\n")
        theatre.close()
        raise


def test_scenarios_come_to_every_point(theatre: Theatre) -> None:
    """A phase, message or call of the hook that is new in the code is red here until it is in the matrix."""
    sometimes = SOMETIMES & set(theatre.ways())
    trouble = theatre.trouble([*CALLS, *_reached(PHASES), *_reached(MESSAGES), *sometimes])
    print(trouble)
    assert not trouble, trouble


def test_every_kind_of_fault_is_among_the_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE, raising=False)
    assert {case.fault.kind for case in cases()} == {fault.kind for fault in GUEST_FAULTS if fault.kind != "kill"}


@pytest.mark.parametrize(("spoilt", "begun"), [(0, []), (1, ["h1"]), (3, ["h1", "h1", "h2"])])
def test_a_guest_that_a_move_has_spoilt_is_at_the_other_host_in_the_end(
    spoilt: int, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = GuestStage.__new__(GuestStage)
    places: list[str] = ["h1"]
    anew: list[str] = []
    stage.vm = SimpleNamespace(place=lambda: places[-1])  # type: ignore[assignment]

    def move(to: str) -> None:
        assert to != places[-1]
        places.append(to)
        stage.spoilt = len(anew) < spoilt

    def begin_anew(host: str) -> None:
        anew.append(host)
        places.append(host)
        stage.spoilt = False

    monkeypatch.setattr(stage, "_move_to", move)
    monkeypatch.setattr(stage, "_begin_anew", begin_anew)
    stage.move_on()
    assert (places[-1], anew, stage.spoilt) == ("h2", begun, False)
