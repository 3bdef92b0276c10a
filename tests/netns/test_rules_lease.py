# SPDX-License-Identifier: GPL-2.0-only
"""A lease that runs out because its agent is dead and not started again: what the programs then do by themselves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from migrator.lab.errors import LabError
from migrator.lab.processes import Daemon, Worker, wait_until
from migrator.lab.topology import UPLINK
from migrator.lab.workers import frames

from .byhand import GUEST, PEER, Wire
from .standing import StandingCluster
from .traffic import Conversations
from .world import NETWORKS, NUMBERS, ClusterBox, World, since

LEASE_S = 2.0
STANDS = 1e6  # ms: the guest stays where it is until the test says otherwise


class ShortLeases(ClusterBox):
    def _made(self) -> StandingCluster:
        return StandingCluster(networks=NETWORKS, migration_options={"redirect_idle_s": 1.0, "lease_s": LEASE_S})


@pytest.fixture(scope="module")
def short_leases() -> Iterator[ShortLeases]:
    box = ShortLeases()
    yield box
    box.close()


@pytest.fixture
def world(short_leases: ShortLeases) -> Iterator[World]:
    made = World(short_leases.get())
    short_leases.dirty = True
    with made.cluster.scope():
        yield made
        if not made.failed:
            made.leave_nothing()
    short_leases.dirty = made.failed


class Scene:
    """A VM that talks, and agents that die in the middle of its move from h1 to h2."""

    def __init__(self, world: World, downtime_ms: float = STANDS) -> None:
        self.world, self.cluster = world, world.cluster
        world.expected.append(".*")  # whoever is left tells of it
        behaviour = {"memory_ms": 50, "swallow": False, "downtime_ms": downtime_ms}
        self.vm, self.peer = world.vm("h1", behaviour=behaviour), world.peer("h3")
        self.talk = Conversations.begin(self.vm, self.peer, inbound=5, outbound=5, every_ms=200)
        self.wire = Wire(self.vm, self.peer)
        self.dead: list[Daemon] = []
        self.died = 0.0

    def kill(self, point: str, *hosts: str) -> None:
        with self.cluster.standing(point):
            reports = self.cluster.migration(self.vm, "h2")
            next(reports)
            self.cluster.wait_for(point)
            self.dead = [self.cluster.agents[host] for host in hosts]
            for daemon in self.dead:
                daemon.kill()
            self.died = time.monotonic()

    def pass_the_lease(self) -> None:
        """Nothing shows it from outside but the clock: it was renewed before the agent died."""
        wait_until("the lease has passed", lambda: since(self.died) > LEASE_S + 0.05, LEASE_S + 5)

    def restart(self) -> None:
        first, *others = self.dead
        for daemon in others:
            daemon.start()
        self.cluster.restart(first)

    def numbered(self, side: bool, number: int, wire: Wire | None = None) -> bytes:
        """A datagram of its own flow, which both policies let through."""
        wire = wire or self.wire
        source, destination = (wire.address(end, ipv6=False) for end in (side, not side))
        body = frames.udp(source, destination, 30_000 + number, NUMBERS, b"lease %d" % number)
        return wire.ip(side, frames.UDP, body)

    def dropped(self, host: str) -> int:
        """Frames that the VM's port on a host refused because of the lease."""
        mine = [port for port in self.cluster.ports(host) if port.instance.vm == self.vm.uuid]
        return sum(port.drops.get("lease", 0) for port in mine)

    def ends(self, host: str) -> None:
        self.vm.wait_for_place(host)
        wait_until("its ports are open", lambda: self.cluster.is_open(self.vm, host), 30.0)
        self.cluster.settled(self.vm, 40.0)
        self.talk.assert_whole()


def test_rule_leases_end_a_hold(world: World) -> None:
    """The source held, and dies before it stopped the guest: what comes once the lease has ended arrives as ever, what
    came before waits for the agent's return."""
    scene = Scene(world)
    scene.kill("source.suspending", "h1")
    before, after = scene.numbered(PEER, 1), scene.numbered(PEER, 2)
    scene.wire.send(PEER, before)
    scene.pass_the_lease()
    scene.wire.send(PEER, after)
    wait_until("what comes now arrives", lambda: scene.wire.arrived(PEER, after))
    assert not scene.wire.arrived(PEER, before)
    scene.restart()
    wait_until("what was held arrives", lambda: scene.wire.arrived(PEER, before))
    scene.ends("h1")
    assert not scene.dropped("h1")


def test_rule_leases_never_open_a_quiesced_source(world: World) -> None:
    """Its guest even runs there again: without an agent that knows so, nothing passes either way."""
    scene = Scene(world)
    scene.kill("source.final", "h1")
    scene.pass_the_lease()
    scene.vm.order("cancel")
    assert scene.vm.place() == "h1"
    tries = [(side, scene.numbered(side, number)) for number in range(20) for side in (GUEST, PEER)]
    before = scene.vm.order("status")["from_guest"]
    for side, frame in tries:
        scene.wire.send(side, frame)
    wait_until("the guest has sent", lambda: scene.vm.order("status")["from_guest"] >= before + 20)
    assert not any(scene.wire.arrived(side, frame) for side, frame in tries)
    scene.restart()
    scene.ends("h1")
    assert scene.dropped("h1") >= len(tries)
    assert not any(scene.wire.arrived(side, frame) for side, frame in tries)


def test_rule_leases_leave_a_staged_port_shut(world: World) -> None:
    """Both agents die while the tables are copied. The guest comes all the same: nothing passes, nothing is flooded."""
    scene = Scene(world, downtime_ms=20)
    scene.kill("source.converged", "h1", "h2")
    tap, uplink = capture(world, scene.vm.ports[0].devices["h2"]), capture(world, UPLINK)
    scene.vm.order("suspend")
    scene.vm.wait_for_place("h2")
    early, late = scene.numbered(GUEST, 1), scene.numbered(GUEST, 2)
    scene.wire.send(GUEST, early)
    scene.pass_the_lease()
    scene.wire.send(GUEST, late)
    flooded = frames.ethernet(scene.peer.ports[0].mac, "ff:ff:ff:ff:ff:ff", scene.numbered(PEER, 3)[14:])
    scene.wire.send(PEER, flooded)
    wait_until("a broadcast is at the host", lambda: seen(uplink, "in", flooded))
    assert not seen(tap, "out", b"")
    assert not scene.wire.arrived(GUEST, early) and not scene.wire.arrived(GUEST, late)
    scene.restart()
    scene.ends("h2")
    assert scene.wire.arrived(GUEST, early)  # before the lease ended it was held
    assert not scene.wire.arrived(GUEST, late)
    assert scene.dropped("h2") >= 1


def test_rule_leases_end_a_redirect(world: World) -> None:
    """What still comes to the source goes on to the destination, until the lease of the dead agent ends."""
    scene = Scene(world, downtime_ms=20)
    beside = Wire(scene.vm, world.peer("h1"))  # nobody there hears of its place any more
    scene.kill("source.stub", "h1")
    number = 0

    def passes() -> bool:
        """A second is more than it takes, also on a machine that does much besides."""
        nonlocal number
        number += 1
        stray = scene.numbered(PEER, number, beside)
        beside.send(PEER, stray)
        with contextlib.suppress(LabError):
            return bool(wait_until("the stray comes", lambda: beside.arrived(PEER, stray), 1.0))
        return False

    wait_until("strays are redirected", passes, LEASE_S, 0.005)
    wait_until("no stray is redirected any more", lambda: not passes(), LEASE_S + 6, 0.02)
    assert since(scene.died) > LEASE_S * 0.5, "the redirect ended long before its lease"
    scene.wire.pass_through(PEER, scene.numbered(PEER, 20_000))  # who knows the place is not concerned
    scene.restart()
    scene.ends("h2")


def capture(world: World, device: str) -> Worker:
    """What goes out of a device of h2, and comes in."""
    worker = world.cluster.worker("h2", "raw", {"device": device}, name=f"capture-{device}")
    worker.call("capture")
    return worker


def seen(worker: Worker, way: str, frame: bytes) -> bool:
    """Has a frame that contains these bytes gone that way? Tags are beside a captured frame, not in it."""
    found = worker.call("captured", contains=frame.hex())["frames"]
    return any(one == way for _, one, _ in found)
