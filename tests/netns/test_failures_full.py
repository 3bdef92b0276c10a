# SPDX-License-Identifier: GPL-2.0-only
"""A table of a host that anybody can fill is full: the VM comes with all of its connections."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.lab.machines import Machine
from migrator.lab.workers import frames

from .standing import StandingCluster
from .traffic import Conversations, Streams
from .world import NETWORKS, ClusterBox, World

PLACES = 64
VLAN = b"\x81\x00\x00\x64"  # of the network "blue"


class SmallHosts(ClusterBox):
    def _made(self) -> StandingCluster:
        options = {"slots": 5, "l2": PLACES}
        return StandingCluster(
            networks=NETWORKS, driver_options=options, migration_options={"redirect_idle_s": 1.0, "step_s": 3.0}
        )


@pytest.fixture(scope="module")
def small_hosts() -> Iterator[SmallHosts]:
    box = SmallHosts()
    yield box
    box.close()


@pytest.fixture
def world(small_hosts: SmallHosts) -> Iterator[World]:
    made = World(small_hosts.get())
    small_hosts.dirty = True
    with made.cluster.scope():
        yield made
        if not made.failed:
            made.leave_nothing()
    small_hosts.dirty = made.failed


def test_a_vm_comes_to_a_host_that_knows_too_many_stations(world: World) -> None:
    """Anybody on the wire can fill the table of what was learned: the VM's own places must still have room."""
    world.expected.append("could not set all places|cannot be set|order failed|not as configured")
    vm, peer = world.vm("h1"), world.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=5, outbound=5, every_ms=200)
    streams = Streams(vm, peer)
    flood(world, vm, "h2")
    world.move(vm, "h2")
    streams.run_on(50)
    streams.assert_perfect()
    talk.assert_whole()
    flood(world, vm, "h1")
    world.move(vm, "h1")
    talk.assert_whole()


def flood(world: World, vm: Machine, host: str) -> None:
    """Frames of many stations come in at a host."""
    worker = world.cluster.worker("fabric", "raw", {"device": host}, name=f"flood-{host}-{len(world.cluster.workers)}")
    for first in range(0, 2 * PLACES, 32):
        sent = []
        for number in range(first, first + 32):
            plain = frames.ethernet(f"02:77:00:00:00:{number:02x}", vm.ports[0].mac, b"\x88\xb5" + bytes(50))
            sent.append((plain[:12] + VLAN + plain[12:]).hex())
        worker.call("send", frames=sent)
