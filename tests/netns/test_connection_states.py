# SPDX-License-Identifier: GPL-2.0-only
"""A connection in each state goes on after the move as if nothing had happened."""

from __future__ import annotations

import pytest

from migrator.lab import oracle
from migrator.lab.processes import wait_until
from migrator.lab.workers import frames

from .byhand import GUEST, PEER, RST, STATES, Conversation, Wire
from .traffic import Conversations, Streams
from .world import ECHO, NUMBERS, World

PORT = 30000


def by_hand(world: World, vm, host: str) -> dict[tuple[str, int], tuple[str, int]]:  # type: ignore[no-untyped-def]
    """State and id of the connections on addresses without a kernel, by local address and port."""
    silent = set(vm.ports[0].silent)
    return {
        (c.local, c.local_port): (c.state, c.id)
        for c in oracle.connections(world.cluster, host, vm)
        if c.local in silent
    }


def test_every_tcp_state(world: World, route: tuple[str, ...]) -> None:
    vm, peer = world.vm("h1"), world.peer("h3")
    wire = Wire(vm, peer)
    talks = {
        (state, ipv6): Conversation.to_state(wire, state, PORT + 2 * n + ipv6, ipv6=ipv6)
        for n, state in enumerate(STATES)
        for ipv6 in (False, True)
    }
    closed = Conversation.to_state(wire, "ESTABLISHED", PORT + 100, ipv6=False)
    closed.say(PEER, RST)
    before = by_hand(world, vm, "h1")
    assert {(port, state) for (_, port), (state, _) in before.items()} == {
        *((talk.port, state) for (state, _), talk in talks.items()),
        (closed.port, "CLOSE"),
    }
    world.follow(vm, route)
    assert by_hand(world, vm, route[-1]) == before
    for (state, _), talk in talks.items():
        talk.say(*STATES[state][1])


@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_answers_pass_by_state_alone(world: World, route: tuple[str, ...], ipv6: bool) -> None:
    """UDP and ICMP echo asked before the move, answered after it."""
    vm, peer = world.vm("h1"), world.peer("h3")
    wire = Wire(vm, peer)
    here, there = wire.address(GUEST, ipv6=ipv6), wire.address(PEER, ipv6=ipv6)
    icmp = frames.ICMPV6 if ipv6 else frames.ICMP
    wire.pass_through(GUEST, wire.ip(GUEST, frames.UDP, frames.udp(here, there, PORT, ECHO, b"asked"), ipv6=ipv6))
    wire.pass_through(GUEST, wire.ip(GUEST, icmp, frames.echo(here, there, 77, 1, b"asked"), ipv6=ipv6))
    world.follow(vm, route)
    udp = wire.ip(PEER, frames.UDP, frames.udp(there, here, ECHO, PORT, b"answer"), ipv6=ipv6)
    echo = wire.ip(PEER, icmp, frames.echo(there, here, 77, 1, b"answer", reply=True), ipv6=ipv6)
    stranger = wire.ip(PEER, frames.UDP, frames.udp(there, here, ECHO, PORT + 1, b"stranger"), ipv6=ipv6)
    assert wire.blocked(PEER, stranger, udp)
    wire.pass_through(PEER, echo)


@pytest.mark.parametrize("side", [GUEST, PEER], ids=["from the guest", "to the guest"])
@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_fragments_cut_by_the_move(world: World, route: tuple[str, ...], side: bool, ipv6: bool) -> None:
    """The first fragment passes before the move, the rest after it: nothing but the record of the first lets them."""
    vm, peer = world.vm("h1"), world.peer("h3")
    wire = Wire(vm, peer)
    here, there = wire.address(side, ipv6=ipv6), wire.address(not side, ipv6=ipv6)
    datagram = frames.udp(here, there, PORT, NUMBERS, bytes(range(256)) * 8)
    first = wire.ip(side, frames.UDP, datagram[:1024], ipv6=ipv6, identifier=4711, more=True)
    rest = wire.ip(side, frames.UDP, datagram[1024:], ipv6=ipv6, identifier=4711, offset=1024)
    orphan = wire.ip(side, frames.UDP, datagram[1024:], ipv6=ipv6, identifier=4712, offset=1024)
    wire.pass_through(side, first)
    world.follow(vm, route)
    assert wire.blocked(side, orphan, rest)


@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_large_sends_and_streams(world: World, route: tuple[str, ...], ipv6: bool) -> None:
    """TCP with segments the size of GSO frames, numbered UDP and ICMP echo, all under way during the move."""
    vm, peer = world.vm("h1"), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=4, outbound=4, every_ms=50, ipv6=ipv6)
    for client in talk.clients:
        client.call("flow", every_ms=50, size=60_000)
    streams = Streams(vm, peer, ipv6=ipv6)
    pinger = vm.worker("probe")
    target = peer.address6 if ipv6 else peer.address
    pinger.call("send", flow=9, address=target, every_ms=10, protocol="icmp")
    world.follow(vm, route)
    talk.assert_whole()
    streams.assert_perfect()
    sent = pinger.call("stop", flow=9)["sent"]
    answered = wait_until("the last echo", lambda: _all(pinger, sent), explain=lambda: pinger.call("report"))
    assert (answered["missing_count"], answered["doubled"]) == (0, 0)


def _all(pinger, sent: int):  # type: ignore[no-untyped-def]
    report = pinger.call("report")["flows"].get("9")
    return report if report and report["newest"] == sent - 1 else None
