# SPDX-License-Identifier: GPL-2.0-only
"""What every wire carried during a move, frame by frame: captures at guest and peer, all their taps, all uplinks."""

from __future__ import annotations

import pytest

from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until

from .test_rules import instances
from .traffic import Streams
from .wires import Flow, Wires
from .world import World

NETWORKS = ("blue", "over")


def captured(world: World, streams: Streams, vm: Machine, peer: Machine) -> tuple[Wires, Flow, Flow]:
    """Begin to capture; the flows to and from the VM from here on."""
    wires = Wires(world, (vm, peer)).begin()
    to, back = Flow(1, peer, vm, streams.sent(1)), Flow(2, vm, peer, streams.sent(2))
    streams.run_on(20)
    return wires, to, back


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "host", ["h1", "h2", "h3"], ids=["peer at the source", "peer at the destination", "third host"]
)
def test_every_frame_on_every_wire(world: World, route: tuple[str, ...], network: str, host: str) -> None:
    """Each frame once on each wire it takes, the same at every host: what comes in goes on, native or redirected."""
    vm, peer = world.vm("h1", network, behaviour={"memory_ms": 300}), world.peer(host, network)
    streams = Streams(vm, peer)
    wires, to, back = captured(world, streams, vm, peer)
    for report in world.follow(vm, route):
        assert report.leading
    streams.run_on(100)
    streams.assert_perfect()

    for flow in (to, back):
        wires.assert_lossless(flow)
    for flow, way in ((to, "out"), (back, "in")):
        assert_stays(wires.taps(vm, flow, way), route)
    away = wires.taps(vm, to, "out")["h2"]
    if host != "h1":
        redirected = wires.uplink("h1", to, "out")
        assert redirected[:10] == away[: len(redirected)][:10], "the source passed on what the destination got first"
    if host == "h3":
        assert wires.uplink("h3", to, "out") == wires.inside(peer, to, "out"), "once, whatever network it is"


def assert_stays(taps: dict[str, list[int]], route: tuple[str, ...]) -> None:
    """The tap away from home has one part of the numbers without a gap, the tap at home what was before and after."""
    home, away = taps["h1"], taps["h2"]
    assert home and away and not taps["h3"]
    assert away == list(range(away[0], away[-1] + 1)), "one stay"
    assert home[0] < away[0], "the move was seen"
    assert (home[-1] > away[-1]) == (route[-1] == "h1"), "where it ended"


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_is_lost_when_the_redirect_ends(world: World, network: str) -> None:
    """A peer at the source reaches the VM through the redirect until that ends, and by its new place from then on."""
    vm, peer = world.vm("h1", network), world.peer("h1", network)
    streams = Streams(vm, peer)
    wires, to, back = captured(world, streams, vm, peer)
    world.move(vm, "h2")
    assert instances(world, "h1", vm), "the redirect stands"
    wait_until("the redirect ends", lambda: not instances(world, "h1", vm), 20.0)
    streams.run_on(100)
    streams.assert_perfect()
    for flow in (to, back):
        wires.assert_lossless(flow)
