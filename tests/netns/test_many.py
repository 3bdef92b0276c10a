# SPDX-License-Identifier: GPL-2.0-only
"""Much of everything: a hundred thousand connections, two thousand new ones a second, ten VMs at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from migrator.lab import oracle
from migrator.lab.processes import wait_until
from migrator.lab.workers import frames
from migrator.lab.workers.raw import Blast

from .traffic import Conversations, Streams
from .world import NUMBERS, World

BACKGROUND = 100_000
PROBED = 1000
POLICY = {
    "name": "background",
    "rules": [
        {"direction": "from", "priority": 1, "protocol": "udp", "ports": ["10000-10100"], "action": "allow"},
        {
            "direction": "to",
            "priority": 1,
            "protocol": "udp",
            "ports": [f"{NUMBERS}-{NUMBERS + 100}"],
            "action": "allow",
        },
        {"direction": "from", "priority": 2, "protocol": "udp", "ports": [str(NUMBERS)], "action": "allow"},
    ],
}


def test_a_hundred_thousand_connections(world: World, route: tuple[str, ...]) -> None:
    """Key sets agree at both ends, and answers to 1,000 of them, taken at random, still pass by state alone."""
    world.cluster.apply(policies=[POLICY])
    vm = world.vm("h1", policy="background", connections_max=1 << 18, timeouts_ms={"udp": 600_000})
    peer = world.peer("h3", connections_max=1 << 18)
    flows = Blast(
        vm.ports[0].silent[0], peer.ports[0].silent[0], vm.ports[0].mac, peer.ports[0].mac, BACKGROUND, 50_000
    )
    guest, outside = vm.worker("raw"), peer.worker("raw")
    guest.call("blast", **{k: v for k, v in vars(flows).items() if k not in ("sent", "began", "made")})
    wait_until("the background is sent", lambda: guest.call("blasting")["over"], 60.0)
    wait_until("all are tracked", lambda: tracked(world, "h1", vm) >= BACKGROUND, 30.0)
    streams = Streams(vm, peer)
    newcomers = Blast(
        peer.ports[0].silent[0],
        vm.ports[0].silent[0],
        peer.ports[0].mac,
        vm.ports[0].mac,
        20_000,
        2_000,
        port_base=NUMBERS,
    )
    before = background(world, "h1", vm)
    outside.call("blast", **{k: v for k, v in vars(newcomers).items() if k not in ("sent", "began", "made")})
    reports = world.follow(vm, route, within_s=10.0)
    assert all(report.moved["conntrack"] >= BACKGROUND for report in reports)
    assert not any(report.not_moved for report in reports)
    after = background(world, route[-1], vm)
    assert len(before) == BACKGROUND
    assert np.array_equal(before, after)
    answers(guest, outside, flows)
    streams.assert_perfect()


def tracked(world: World, host: str, vm) -> int:  # type: ignore[no-untyped-def]
    return sum(p.connections for p in world.cluster.ports(host) if p.instance.vm == vm.uuid)


def background(world: World, host: str, vm):  # type: ignore[no-untyped-def]
    """Keys and ids of the connections to the background's ports."""
    table = oracle.columns(world.cluster, host, vm)
    wanted = (table["rport"] >= 10000) & (table["rport"] < 10100)
    return oracle.keys({name: values[wanted] for name, values in table.items()})


def answers(guest, outside, flows: Blast) -> None:  # type: ignore[no-untyped-def]
    """Answers to connections taken at random reach the guest; those to connections that never were do not."""
    guest.call("capture")
    chosen = random.Random(7).sample(range(BACKGROUND), PROBED)
    outside.call("send", frames=[_answer(flows, n).hex() for n in (*range(BACKGROUND, BACKGROUND + 50), *chosen)])
    wait_until("answers arrive", lambda: len(_came(guest)) >= PROBED, 10.0, explain=lambda: len(_came(guest)))
    assert _came(guest) == set(chosen)


def _answer(flows: Blast, number: int) -> bytes:
    sport, dport = flows.ports(number)
    body = frames.udp(flows.destination, flows.source, dport, sport, b"mgAN" + number.to_bytes(4, "big"))
    packet = frames.ip(flows.destination, flows.source, frames.UDP, body)
    return frames.ethernet(flows.destination_mac, flows.source_mac, packet)


def _came(guest) -> set[int]:  # type: ignore[no-untyped-def]
    found = guest.call("captured", contains=b"mgAN".hex())["frames"]
    return {int(frame[-8:], 16) for _, way, frame in found if way == "in"}


def test_ten_at_once(world: World, route: tuple[str, ...]) -> None:
    """Five VMs each way at the same time, and back; none loses anything."""
    peer = world.peer("h3")
    vms = [world.vm("h1" if n % 2 else "h2", behaviour={"memory_ms": 300}) for n in range(10)]
    talks = [Conversations.begin(vm, peer, inbound=0, outbound=10, every_ms=100) for vm in vms[:1]]
    talks += [_more(vm, peer) for vm in vms[1:]]
    streams = Streams(vms[0], peer, every_ms=5)
    other = {"h1": "h2", "h2": "h1"}
    for host in route:
        with ThreadPoolExecutor(10) as pool:
            ways = [(vm, other[vm.host] if host == "h2" else vm.host) for vm in vms]
            moves = [pool.submit(world.cluster.migrate, vm, to) for vm, to in ways]
            reports = [move.result() for move in moves]
        assert [report.outcome for report in reports] == ["complete"] * 10, [r.reason for r in reports]
    for talk in talks:
        talk.assert_whole()
    streams.assert_perfect()


def _more(vm, peer) -> Conversations:  # type: ignore[no-untyped-def]
    """Connections into a VM: the peer's server is one for all."""
    return Conversations.begin(vm, peer, inbound=10, outbound=0, every_ms=100)
