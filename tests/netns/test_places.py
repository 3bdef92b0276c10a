# SPDX-License-Identifier: GPL-2.0-only
"""Wherever the peer is: no frame is lost, doubled or overtaken by the switchover, in either direction."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from migrator.lab.machines import Machine

from .traffic import Streams
from .world import World

NETWORKS = ("blue", "over")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "host", ["h1", "h2", "h3"], ids=["peer at the source", "peer at the destination", "third host"]
)
def test_rule_the_agent_leads(world: World, route: tuple[str, ...], network: str, host: str) -> None:
    """The source agent leads: a datagram each way every millisecond, all of them, once, in order."""
    vm, peer = world.vm("h1", network), world.peer(host, network)
    streams = Streams(vm, peer)
    for report in world.follow(vm, route):
        assert report.leading
        assert not report.frames.get("may_be_lost")
    streams.run_on(100)
    streams.assert_perfect()


@pytest.mark.parametrize("network", NETWORKS)
def test_rule_a_guest_that_stops_by_itself(world: World, network: str) -> None:
    """Following: only the frames that the hypervisor swallowed are missing, and the report says that some may be."""
    behaviour = {"memory_ms": 60_000, "self_stop_ms": 300, "swallow": True}
    vm, peer = world.vm("h1", network, behaviour=behaviour), world.peer("h3", network)
    streams = Streams(vm, peer)
    report = world.move(vm, "h2")
    assert not report.leading
    streams.run_on(100)
    swallowed = vm.order("status")["swallowed"]
    result = streams.finish()
    assert result[1]["missing_count"] <= swallowed <= 2
    assert result[2]["missing_count"] == 0
    assert report.frames["may_be_lost"] >= result[1]["missing_count"]
    assert [result[flow][what] for flow in (1, 2) for what in ("doubled", "overtaken")] == [0, 0, 0, 0]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("late", [None, "left", "right", "both"])
def test_two_that_talk_change_places(world: World, network: str, late: str | None) -> None:
    """Two VMs that talk to each other move in opposite directions at once; either of them, or both, fail late."""
    behaviours = {
        side: {"memory_ms": 100, "swallow": False, **({"fail_after_ms": 60} if late in (side, "both") else {})}
        for side in ("left", "right")
    }
    if late:
        world.expected.append("aborted|rolled|failed|gone|lost")
    left = world.vm("h1", network, policy="open", behaviour=behaviours["left"])
    right = world.vm("h2", network, policy="open", behaviour=behaviours["right"])
    streams = Streams(left, right)
    outcomes = at_once(world, (left, "h2"), (right, "h1"))
    assert outcomes == ["aborted" if late in (side, "both") else "complete" for side in ("left", "right")]
    if late is None:
        assert at_once(world, (left, "h1"), (right, "h2")) == ["complete"] * 2
    streams.run_on(100)
    streams.assert_perfect()


def at_once(world: World, *moves: tuple[Machine, str]) -> list[str]:
    with ThreadPoolExecutor(len(moves)) as pool:
        begun = [pool.submit(world.cluster.migrate, vm, to) for vm, to in moves]
        return [move.result().outcome for move in begun]
