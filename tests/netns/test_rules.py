# SPDX-License-Identifier: GPL-2.0-only
"""The rules of the migration protocol that close an interleaving, each by its name."""

from __future__ import annotations

import grpc
import pytest

from migrator.lab import netns, oracle
from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until
from migrator.lab.workers import frames

from .byhand import GUEST, PEER, Wire
from .traffic import Conversations, Streams
from .world import ECHO, NUMBERS, SERVICE, World

PORT = 30000


def instances(world: World, host: str, vm: Machine) -> list[tuple[str, bool, int]]:
    """State, committed and epoch of a VM's port instances on a host."""
    return [
        (p.instance.state, p.instance.committed, p.instance.epoch)
        for p in world.cluster.ports(host)
        if p.instance.vm == vm.uuid
    ]


def test_rule_committed_is_not_open(world: World) -> None:
    """The destination has everything, but its guest does not run: nothing is delivered there yet."""
    vm, peer = world.vm("h1", behaviour={"memory_ms": 50, "downtime_ms": 700, "swallow": False}), world.peer("h3")
    streams = Streams(vm, peer)
    reports = world.cluster.migration(vm, "h2")
    seen: set[tuple[str, bool, int]] = set()
    next(reports)
    wait_until("the guest stands", lambda: not vm.order("status")["running"], interval_s=0.002)
    now: list[tuple[str, bool, int]] = []
    while not vm.order("status")["running"]:
        seen.update(now)  # what was seen before the guest was known to stand still
        now = instances(world, "h2", vm)
    assert ("staged", True) in {(state, committed) for state, committed, _ in seen}
    assert "active" not in {state for state, _, _ in seen}
    *_, report = reports
    assert report.outcome == "complete"
    streams.run_on(100)
    streams.assert_perfect()


def test_rule_every_instance_has_its_epoch(world: World) -> None:
    """There and back at once: what is late from the first move does not touch the port of the second."""
    vm, peer = world.vm("h1"), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=5, outbound=5, every_ms=50)
    first = instances(world, "h1", vm)[0][2]
    epochs = [report.epoch for report in world.follow(vm, ("h2", "h1"))]
    assert first < epochs[0] < epochs[1]
    world.cluster.settled(vm)
    wait_until(
        "only the newest is left",
        lambda: instances(world, "h1", vm) == [("active", True, epochs[1])],
        explain=lambda: instances(world, "h1", vm),
    )
    talk.assert_whole()


def test_rule_frames_wait_at_the_source(world: World) -> None:
    """A pause much longer than usual: what arrives waits at the source, and reaches the guest in order."""
    vm, peer = world.vm("h1", behaviour={"memory_ms": 50, "downtime_ms": 900, "swallow": False}), world.peer("h3")
    streams = Streams(vm, peer)
    report = world.move(vm, "h2")
    assert report.frames["held"] >= 700
    streams.run_on(100)
    streams.assert_perfect()


def test_rule_the_guest_may_run_first(world: World) -> None:
    """The guest runs at the destination the moment it stops: what it sends before the commit waits there."""
    vm, peer = world.vm("h1", behaviour={"memory_ms": 50, "downtime_ms": 0, "swallow": False}), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=50, outbound=50, every_ms=20)
    streams = Streams(vm, peer)
    world.move(vm, "h2")
    streams.run_on(100)
    streams.assert_perfect()
    talk.assert_whole()


def test_rule_activation_grants_the_full_timeout(world: World) -> None:
    """A flow dumped with little time left and refreshed at the source for longer than that lives at the destination."""
    vm = world.vm("h1", timeouts_ms={"udp": 1000}, behaviour={"memory_ms": 3000})
    peer = world.peer("h3")
    wire = Wire(vm, peer)
    here, there = wire.address(GUEST, ipv6=False), wire.address(PEER, ipv6=False)
    ask = wire.ip(GUEST, frames.UDP, frames.udp(here, there, PORT, ECHO, b"asked"))
    for _ in world.cluster.migration(vm, "h2"):
        wire.send(GUEST, ask)
        while vm.place() == "h1":
            wire.send(GUEST, ask)
    assert vm.place() == "h2"
    wire.pass_through(PEER, wire.ip(PEER, frames.UDP, frames.udp(there, here, ECHO, PORT, b"answer")))


def test_rule_accounting_is_exact(world: World, route: tuple[str, ...]) -> None:
    """Counted there plus counted here: every packet of a flow, once."""
    vm, peer = world.vm("h1"), world.peer("h3")
    streams = Streams(vm, peer)
    world.follow(vm, route)
    streams.run_on(100)
    result = streams.finish()
    world.cluster.settled(vm)

    def counted() -> dict[str, int]:
        table = oracle.columns(world.cluster, route[-1], vm)
        inbound = (table["lport"] == NUMBERS) & (table["proto"] == frames.UDP)
        outbound = (table["rport"] == NUMBERS) & (table["proto"] == frames.UDP)
        return {"to": int(table["packets_to"][inbound].sum()), "from": int(table["packets_from"][outbound].sum())}

    assert counted() == {"to": result[1]["sent"], "from": result[2]["sent"]}


def test_rule_broadcast_comes_by_one_path(world: World, route: tuple[str, ...]) -> None:
    """Broadcast reaches both hosts on their own: the guest sees each at most once, and none from before the move."""
    vm, peer = world.vm("h1"), world.peer("h3")
    receiver, sender = vm.worker("probe"), peer.worker("probe")
    receiver.call("receive", address="0.0.0.0", port=NUMBERS)
    sender.call("send", flow=3, address="10.1.255.255", port=NUMBERS, every_ms=2)

    def came() -> int:
        return int(receiver.call("report")["flows"].get("3", {}).get("received", 0))

    wait_until("broadcasts arrive", lambda: came() > 50)
    world.follow(vm, route)
    mark = came()
    wait_until("broadcasts arrive after the move", lambda: came() > mark + 100)
    report = receiver.call("report")["flows"]["3"]
    assert (report["doubled"], report["overtaken"]) == (0, 0)


def test_rule_a_plain_suspend_is_no_move(world: World) -> None:
    vm, peer = world.vm("h1", behaviour={"swallow": False}), world.peer("h3")
    streams = Streams(vm, peer)
    vm.order("suspend")
    mark = streams.sent(1)
    wait_until("frames are sent meanwhile", lambda: streams.sent(1) > mark + 200)
    assert world.cluster.is_open(vm, "h1")
    vm.order("resume")
    streams.run_on(100)
    streams.assert_perfect()


def test_rule_a_vm_may_move_while_paused(world: World) -> None:
    """No stop and no resume: where it is told of last decides, and the port opens when it runs."""
    vm, peer = world.vm("h1", behaviour={"memory_ms": 50, "swallow": False}), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=5, outbound=5, every_ms=50)
    vm.order("suspend")
    reports = world.cluster.migration(vm, "h2", deadline_s=30)
    next(reports)
    wait_until("it is at the destination", lambda: vm.order("status")["place"] == "h2")
    vm.order("resume")
    *_, report = reports
    assert report.outcome == "complete", report
    talk.assert_whole()


def test_rule_never_two_moves_of_one_vm(world: World) -> None:
    vm = world.vm("h1", behaviour={"memory_ms": 700})
    reports = world.cluster.migration(vm, "h2")
    next(reports)
    with pytest.raises(grpc.RpcError) as refused:
        world.cluster.migrate(vm, "h3")
    assert refused.value.code() in (
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.ABORTED,
    )
    *_, report = reports
    assert report.outcome == "complete"


def test_rule_the_redirect_outlives_the_tap_and_ends_when_idle(world: World) -> None:
    vm, peer = world.vm("h1"), world.peer("h3")
    streams = Streams(vm, peer)
    world.move(vm, "h2")
    wait_until("the source's tap is gone", lambda: vm.ports[0].devices["h1"] not in _links(world, "h1"))
    wait_until(
        "the redirect ends", lambda: not instances(world, "h1", vm), 20.0, explain=lambda: instances(world, "h1", vm)
    )
    streams.assert_perfect()


def test_rule_a_flood_does_not_follow_the_vm(world: World) -> None:
    """The network forgets where a VM is that just moved: both hosts get what is for it, and the guest gets it once."""
    vm, peer = world.vm("h1"), world.peer("h3")
    streams = Streams(vm, peer, every_ms=5)
    world.move(vm, "h2")
    streams.run_on(60)  # longer than what was under way when the network turned
    streams.ends[0].call("stop", flow=2)  # a guest that says nothing is not learned again
    before = streams.received(1)
    netns.ip("link", "set", "br0", "type", "bridge", "fdb_flush", namespace=world.cluster.name("fabric"))
    wait_until("floods arrive", lambda: streams.received(1) > before + 40)
    assert instances(world, "h1", vm), "the redirect is still there"
    streams.assert_perfect()


def test_rule_three_hosts_in_a_row(world: World) -> None:
    """The destination moves on before the first redirect has ended: the first source learns of the newest place."""
    vm, peer = world.vm("h1"), world.peer("h3")
    streams = Streams(vm, peer)
    talk = Conversations.begin(vm, peer, inbound=5, outbound=5, every_ms=50)
    world.follow(vm, ("h2", "h3"))
    streams.run_on(100)
    streams.assert_perfect()
    talk.assert_whole()


def test_rule_new_connections_while_it_moves(world: World) -> None:
    """Connections that begin during the switchover are judged once and live."""
    vm, peer = world.vm("h1", behaviour={"memory_ms": 300}), world.peer("h3")
    server, client = vm.worker("tcp"), peer.worker("tcp")
    server.call("listen", address="0.0.0.0", port=SERVICE)
    total = 0
    for _ in world.cluster.migration(vm, "h2"):
        assert client.call("connect", address=vm.address, port=SERVICE, count=20)["failed"] == 0
        total += 20
    checked = client.call("check", size=500)
    assert (checked["alive"], checked["total"]) == (total, total)


def _links(world: World, host: str) -> list[str]:
    return oracle.traces(world.cluster, host)["links"]
