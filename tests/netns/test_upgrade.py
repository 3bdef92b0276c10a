# SPDX-License-Identifier: GPL-2.0-only
"""An agent that stops, dies, or comes back as another version: its VMs do not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab.machines import Machine
from migrator.lab.processes import Daemon, wait_until

from .test_failures import outcome
from .test_failures_killed import GUEST
from .traffic import Conversations, Streams
from .versions import Edit, Version, make_version
from .world import World

EVERY_MS = 0.5  # 2,000 datagrams a second each way

# The same layouts, other programs, an older protocol: what the release before may be.
PATCH = (
    Edit(
        "datapath/bpf/from_port.bpf.c",
        "int from_port(struct __sk_buff *skb)\n{\n",
        "int from_port(struct __sk_buff *skb)\n{\n\tif (skb->len == 0xffff)\n\t\treturn TC_ACT_SHOT;\n",
    ),
    Edit("migrator/protocol.py", "MAJOR, MINOR = 1, 1", "MAJOR, MINOR = 1, 0"),
)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("versions"), "9.1.0", *PATCH)


@pytest.fixture
def hosts(world: World) -> Iterator[World]:
    """Hosts whose agents are put back to this version at the end."""
    before = dict(world.cluster.agents)
    yield world
    for host, daemon in before.items():
        if world.cluster.agents[host] is not daemon and not world.failed:
            replace(world, host, daemon, Daemon.stop)


def replace(world: World, host: str, daemon: Daemon, end: Callable[[Daemon], object]) -> None:
    """The agent of a host ends in that way, and the other one takes its place."""
    end(world.cluster.agents[host])
    world.cluster.agents[host] = daemon
    if daemon.process is None:  # this test's own; others are stopped with the cluster
        world.cluster.stack.callback(daemon.stop)
    world.cluster.restart(daemon)
    wait_until(f"{host} is there again", lambda: version(world, host))


def version(world: World, host: str) -> str:
    return str(world.cluster.agent_stub(host).Status(pb.Empty(), timeout=10).version)


def counted(world: World, vm: Machine) -> dict[str, int]:
    """Counters of the VM's port at h1, not of a redirect that is left of a move."""
    (port,) = [p for p in world.cluster.ports("h1") if p.instance.vm == vm.uuid and p.instance.state == "active"]
    return {name: port.counters[name] for name in ("packets_from", "packets_to", "bytes_from", "bytes_to")}


def programs(world: World, host: str) -> set[str]:
    """Digests of the objects whose programs are pinned at a host."""
    (root,) = (world.cluster.directory / host / "bpf").glob("migrator-*")
    return {path.name for path in root.glob("programs-*")}


def test_an_agent_is_stopped_killed_and_replaced_under_traffic(hosts: World, patched: Version) -> None:
    """Nothing lost, doubled or overtaken, connections live, counters go on; moves between versions; the way back."""
    vm, peer = hosts.vm("h1"), hosts.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=100)
    streams = Streams(vm, peer, EVERY_MS)
    first = hosts.cluster.agents["h1"]
    before, old, own = counted(hosts, vm), programs(hosts, "h1"), version(hosts, "h1")
    for following, end in ((first, Daemon.stop), (patched.applied(first), Daemon.kill)):
        replace(hosts, "h1", following, end)
        streams.run_on(500)
        after = counted(hosts, vm)
        assert all(after[name] > before[name] + 400 for name in before), f"{before} -> {after}"
        assert version(hosts, "h1") == (own if following is first else patched.name)
        assert (programs(hosts, "h1") == old) is (following is first)
        before = after
    known = {
        host.name: (host.version, host.protocol) for host in hosts.cluster.coordinator_stub().Hosts(pb.Empty()).hosts
    }
    assert known["h1"] == (patched.name, "1.0") and known["h2"][0] == own
    hosts.follow(vm, ("h2", "h1"), within_s=60.0)
    replace(hosts, "h1", first, Daemon.stop)
    streams.run_on(500)
    streams.assert_perfect()
    talk.assert_whole()


@pytest.mark.parametrize("point, host", [("destination.committed", "h2"), ("source.redirecting", "h1")])
def test_another_version_comes_back_in_the_middle_of_a_move(
    hosts: World, patched: Version, point: str, host: str
) -> None:
    """The move goes on where the agent died: what is stored is read by the other version."""
    hosts.expected.append(".*")  # a failure is told of
    vm, peer = hosts.vm("h1", behaviour=GUEST), hosts.peer("h3")
    talk = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=100)
    streams = Streams(vm, peer)
    with hosts.cluster.standing(point):
        reports = hosts.cluster.migration(vm, "h2")
        migration = next(reports).id
        hosts.cluster.wait_for(point)
        replace(hosts, host, patched.applied(hosts.cluster.agents[host]), Daemon.kill)
    assert outcome(hosts, migration, reports) == "complete"
    vm.wait_for_place("h2")
    hosts.cluster.settled(vm, 30.0)
    streams.run_on(100)
    assert [report["doubled"] for report in streams.finish().values()] == [0, 0]
    talk.assert_whole()
