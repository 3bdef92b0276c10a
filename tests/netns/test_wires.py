# SPDX-License-Identifier: GPL-2.0-only
"""What every wire carried during a move, wherever the peer is: captures inside of both, on their taps, all uplinks."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until

from .matrix import state_of
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
def test_rule_the_agent_leads(world: World, route: tuple[str, ...], network: str, host: str) -> None:
    """Each frame once on each wire it takes, the same at every host: what comes in goes on, native or redirected."""
    vm, peer = world.vm("h1", network, behaviour={"memory_ms": 300}), world.peer(host, network)
    streams = Streams(vm, peer)
    wires, to, back = captured(world, streams, vm, peer)
    for report in world.follow(vm, route):
        assert report.leading and not report.frames.get("may_be_lost")
    streams.run_on(100)
    streams.finish()
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
    streams.assert_perfect()


def assert_stays(taps: dict[str, list[int]], route: tuple[str, ...]) -> None:
    """The tap away from home has one part of the numbers without a gap, the tap at home what was before and after."""
    home, away = taps["h1"], taps["h2"]
    assert home and away and not taps["h3"]
    assert away == list(range(away[0], away[-1] + 1)), "one stay"
    assert home[0] < away[0], "the move was seen"
    assert (home[-1] > away[-1]) == (route[-1] == "h1"), "where it ended"


@pytest.mark.parametrize("network", NETWORKS)
def test_rule_nothing_is_lost_when_the_redirect_ends(world: World, network: str) -> None:
    """A peer at the source reaches the VM through the redirect until that ends, and by its new place from then on."""
    vm, peer = world.vm("h1", network), world.peer("h1", network)
    streams = Streams(vm, peer)
    wires, to, back = captured(world, streams, vm, peer)
    world.move(vm, "h2")
    assert instances(world, "h1", vm), "the redirect stands"
    wait_until("the redirect ends", lambda: not instances(world, "h1", vm))
    streams.run_on(100)
    streams.finish()
    for flow in (to, back):
        wires.assert_lossless(flow)
    streams.assert_perfect()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "late", ["", "left", "right", "left right"], ids=["both move", "left fails", "right fails", "both fail"]
)
def test_two_that_talk_change_places(world: World, network: str, late: str) -> None:
    """Two VMs that talk to each other, in opposite directions at once, and either or both of them fail late."""
    if late:
        world.expected.append("aborted|rolled|failed|gone|lost")
    left, right = (
        world.vm(host, network, policy="open", behaviour=changing(side in late))
        for side, host in (("left", "h1"), ("right", "h2"))
    )
    streams = Streams(left, right)
    wires, to, back = captured(world, streams, left, right)
    outcomes = at_once(world, (left, "h2"), (right, "h1"))
    assert outcomes == ["aborted" if side in late else "complete" for side in ("left", "right")]
    if not late:
        assert at_once(world, (left, "h1"), (right, "h2")) == ["complete"] * 2
    streams.run_on(100)
    streams.finish()
    for flow in (to, back):
        wires.assert_lossless(flow)
    streams.assert_perfect()


def at_once(world: World, *moves: tuple[Machine, str]) -> list[str]:
    with ThreadPoolExecutor(len(moves)) as pool:
        begun = [pool.submit(world.cluster.migrate, vm, to) for vm, to in moves]
        return [move.result().outcome for move in begun]


def changing(fails: bool) -> dict[str, Any]:
    return {"memory_ms": 300, "swallow": False, **({"fail_after_ms": 60} if fails else {})}


@pytest.mark.parametrize("network", NETWORKS)
def test_rule_a_guest_that_stops_by_itself(world: World, route: tuple[str, ...], network: str) -> None:
    """Following: it misses only what its hypervisor swallowed. That was on a tap of it, and no host lost any."""
    behaviour = {"memory_ms": 60_000, "swallow": True}
    vm, peer = world.vm("h1", network, behaviour=behaviour), world.peer("h3", network)
    streams = Streams(vm, peer)
    wires, to, back = captured(world, streams, vm, peer)
    reports = [stopping_by_itself(world, vm, host) for host in route]
    streams.run_on(100)
    streams.finish()
    wires.assert_conserved(to, taken=sum(report.frames["taken"] for report in reports))
    sent, came = wires.inside(peer, to, "out"), wires.inside(vm, to, "in")
    missing = set(sent) - set(came)
    assert came == [number for number in sent if number not in missing], "in order, and nothing else"
    on_taps = {number for numbers in wires.taps(vm, to, "out").values() for number in numbers}
    assert missing <= on_taps, f"missing, and on no tap: {sorted(missing - on_taps)[:20]}"
    assert len(missing) <= vm.order("status")["swallowed"] <= 2 * len(route)
    assert all(not report.leading and report.frames["may_be_lost"] == 2 for report in reports)
    wires.assert_lossless(back)


def stopping_by_itself(world: World, vm: Machine, to: str) -> pb.Migration:
    reports = world.cluster.migration(vm, to)
    next(reports)
    wait_for_device(world, vm, to)
    vm.order("suspend")
    *_, report = reports
    assert report.outcome == "complete", report
    assert vm.place() == to
    return report


def wait_for_device(world: World, vm: Machine, host: str) -> None:
    """Until the host's switch has the VM's device: a hypervisor made it there long before its memory was copied."""

    def there() -> bool:
        own = [port for port in world.cluster.ports(host) if port.instance.vm == vm.uuid]
        return any(port.instance.state == "staged" and port.device for port in own)

    wait_until(f"{host} has the device", there, interval_s=0.002)


def test_rule_a_guest_that_stops_while_its_agent_has_no_cpu(world: World) -> None:
    """Its device is gone before the source's agent hears of the stop: what came for it waits in the device's queue."""
    behaviour = {"memory_ms": 60_000, "swallow": False}
    vm, peer = world.vm("h1", behaviour=behaviour), world.peer("h3")
    streams = Streams(vm, peer)
    wires, to, back = captured(world, streams, vm, peer)
    agent = world.cluster.agents["h1"].pid
    reports = world.cluster.migration(vm, "h2")
    next(reports)
    try:
        wait_for_device(world, vm, "h2")
        os.kill(agent, signal.SIGSTOP)
        wait_until("it stands", lambda: state_of(agent) == "T", interval_s=0.0)
        vm.order("suspend")
        vm.wait_for_place("h2")
        mark = streams.sent(1)
        wait_until("the source's device would be gone", lambda: streams.sent(1) >= mark + 60)
    finally:
        os.kill(agent, signal.SIGCONT)
    *_, report = reports
    assert report.outcome == "complete", report
    streams.run_on(100)
    streams.finish()
    wires.assert_conserved(to, taken=report.frames["taken"])
    wires.assert_lossless(back)
    assert report.frames["taken"] >= 60
    streams.assert_perfect()
