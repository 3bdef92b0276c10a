# SPDX-License-Identifier: GPL-2.0-only
"""Each daemon killed in each phase of a move, and started again: where the guest is then, and what it has lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from migrator.lab.machines import Machine

from .test_failures import outcome
from .traffic import Conversations, Streams
from .world import World

GUEST = {"memory_ms": 50, "swallow": False, "downtime_ms": 400}
DAEMONS = ("h1", "h2", "coordinator")  # a move from h1 to h2


@dataclass(frozen=True)
class Moment:
    """Where everything stands still when the daemon dies: `point` of migrator/faults.py, its phase stored, not begun.

    `ends` is the outcome by daemon. A move that is not undone ends at h2.
    """

    phase: str
    point: str
    ends: tuple[str, str, str]


MOMENTS = (
    Moment("prepare", "destination.staged", ("refused", "refused", "aborted")),
    Moment("pre-copy", "source.copying", ("aborted", "aborted", "aborted")),
    # from here on nobody needs the coordinator
    Moment("authorise", "coordinator.authorised", ("aborted", "aborted", "complete")),
    Moment("held", "source.suspending", ("aborted", "aborted", "complete")),
    # the guest stands, and runs at h2 before an agent is back
    Moment("quiesced", "source.final", ("degraded", "degraded", "complete")),
    Moment("committed", "destination.committed", ("complete", "complete", "complete")),
    Moment("open", "source.redirecting", ("complete", "complete", "complete")),
    Moment("settle", "source.settling", ("complete", "complete", "complete")),
)
MOVED = {"complete", "degraded"}


@pytest.mark.parametrize("name", DAEMONS)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.phase)
def test_a_daemon_dies(world: World, moment: Moment, name: str) -> None:
    """No connection is lost, the port is open where the guest runs and nowhere else, no frame comes twice."""
    world.expected.append(".*")  # a failure is told of; how loud is each daemon's affair
    vm, peer = world.vm("h1", behaviour=GUEST), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=100)
    streams = Streams(vm, peer)
    ended = _kill_at(world, vm, moment.point, name)
    assert ended == moment.ends[DAEMONS.index(name)]
    here, there = ("h2", "h1") if ended in MOVED else ("h1", "h2")
    vm.wait_for_place(here)
    world.cluster.settled(vm, 30.0)
    assert world.cluster.is_open(vm, here) and not world.cluster.is_open(vm, there)
    streams.run_on(100)
    if here == "h1" or name == "coordinator":
        streams.assert_perfect()
    else:  # what an agent's death keeps back comes late, and no guest waits for it
        assert [report["doubled"] for report in streams.finish().values()] == [0, 0]
    talk.assert_whole()


def _kill_at(world: World, vm: Machine, point: str, name: str) -> str:
    """Begin a move, kill a daemon while another (or it) stands at a point, start it again: how the move ended."""
    daemon = world.cluster.daemon(name)
    with world.cluster.standing(point):
        reports = world.cluster.migration(vm, "h2")
        migration = next(reports).id
        world.cluster.wait_for(point)
        daemon.kill()
    world.cluster.restart(daemon)
    return outcome(world, migration, reports)
