# SPDX-License-Identifier: GPL-2.0-only
"""Much of everything: a hundred thousand connections, two thousand new ones a second, ten VMs at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab import oracle
from migrator.lab.processes import wait_until
from migrator.lab.workers import frames
from migrator.lab.workers.raw import Blast

from .test_rules import instances
from .traffic import Conversations, Streams
from .world import MEMORY_MS, NUMBERS, SERVICE, World, since

pytestmark = pytest.mark.alone

BACKGROUND = 100_000
PROBED = 1000
NEWCOMERS_PER_S = 2000
REDIRECT_IDLE_S = 1.0  # of this cluster
POLICY = {
    "name": "background",
    "rules": [
        {"direction": "from", "priority": 1, "protocol": "udp", "ports": ["10000-10100"], "action": "allow"},
        {"direction": "to", "priority": 1, "protocol": "tcp", "ports": [str(SERVICE)], "action": "allow"},
        {"direction": "to", "priority": 1, "protocol": "udp", "ports": [str(NUMBERS)], "action": "allow"},
        {"direction": "from", "priority": 2, "protocol": "udp", "ports": [str(NUMBERS)], "action": "allow"},
    ],
}


def test_a_hundred_thousand_connections(world: World, route: tuple[str, ...]) -> None:
    """Key sets agree at both ends; answers to 1,000 of them, taken at random, still pass by state alone; and each of
    the 2,000 a second that begin meanwhile from outside is answered and echoed."""
    world.cluster.apply(policies=[POLICY])
    vm = world.vm(
        "h1",
        policy="background",
        connections_max=1 << 18,
        timeouts_ms={"udp": 600_000},
        behaviour={"memory_ms": MEMORY_MS, "swallow": False},  # a busy guest may not empty its queue in time
    )
    peer = world.peer("h3", connections_max=1 << 18)
    flows = Blast(
        vm.ports[0].silent[0], peer.ports[0].silent[0], vm.ports[0].mac, peer.ports[0].mac, BACKGROUND, 50_000
    )
    guest, outside, newcomers = vm.worker("raw"), peer.worker("raw"), peer.worker("newcomers")
    vm.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
    wait_until("all are tracked", lambda: tracked(world, "h1", vm) >= BACKGROUND or blast(guest, flows), 60.0, 0.5)
    wait_until("nothing more is sent", lambda: guest.call("blasting")["over"])
    streams = Streams(vm, peer)
    before = background(world, "h1", vm)
    assert len(before) == BACKGROUND
    newcomers.call("begin", address=vm.address, port=SERVICE, per_s=NEWCOMERS_PER_S)
    wait_until("newcomers succeed", lambda: newcomers.call("status")["done"] >= NEWCOMERS_PER_S // 10)
    reports = there_and_back(world, vm, route)
    come = newcomers.call("finish", limit_s=10.0)
    assert all(report.moved["conntrack"] >= BACKGROUND for report in reports)
    assert not any(report.not_moved for report in reports)
    assert np.array_equal(before, background(world, route[-1], vm))
    answers(guest, outside, flows)
    assert not come["failed"], f"{len(come['failed'])} of {come['begun']} newcomers failed: {come['failed'][:50]}"
    streams.assert_perfect()


def there_and_back(world: World, vm, route: tuple[str, ...]) -> list[pb.Migration]:  # type: ignore[no-untyped-def]
    """The way back is ordered when the first move is complete: less than two seconds after the guest went, while the
    host that it goes back to still redirects. How long so large a table takes to copy is the machine's affair."""
    reports = []
    for host in route:
        if reports:
            away_s = since(vm.order("status")["times"]["resumed"])
            assert away_s < 2.0, f"the first move took {away_s:.1f} s to end: {dict(reports[0].times_ms)}"
            if away_s < REDIRECT_IDLE_S:
                assert [state for state, _, _ in instances(world, host, vm)] == ["stub"], "it still redirects"
        reports.append(world.move(vm, host))
    return reports


def blast(guest, flows: Blast) -> None:  # type: ignore[no-untyped-def]
    """Send a datagram of each flow, unless that is under way. A busy machine's queues lose some: then once more."""
    if guest.call("blasting")["over"]:
        guest.call("blast", **{k: v for k, v in vars(flows).items() if k not in ("sent", "began", "made")})


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
    wait_until("answers arrive", lambda: len(_came(guest)) >= PROBED, explain=lambda: len(_came(guest)))
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
