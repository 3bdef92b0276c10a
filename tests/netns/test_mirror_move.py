# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors by the real daemons: an operator declares them, they follow a VM under load, tcpdump is the oracle."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from migrator.lab import netns
from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until

from .captures import Captures, captures, same
from .traffic import Conversations, Streams
from .world import NUMBERS, SERVICE, World

TRAFFIC = f"tcp port {SERVICE} or udp port {NUMBERS}"


@pytest.fixture
def watch() -> Iterator[Captures]:
    with captures() as made:
        yield made


@contextlib.contextmanager
def monitor_devices(world: World, *hosts: str) -> Iterator[Mapping[str, str]]:
    """`mon0` of hosts; host -> the namespace with `tap0` behind it."""
    cluster = world.cluster
    behind = {host: cluster.namespace(f"mon-{host}") for host in hosts}
    for host, namespace in behind.items():
        cluster.wire(host, "mon0", f"mon-{host}", "tap0")
        for device, place in (("mon0", cluster.name(host)), ("tap0", namespace)):
            netns.ip("link", "set", device, "mtu", "9000", "up", namespace=place)
    try:
        yield behind
    finally:
        for host in hosts:
            netns.ip("link", "del", "mon0", namespace=cluster.name(host))


def port_name(machine: Machine) -> str:
    return f"{machine.uuid}/{machine.ports[0].mac}"


def declare(world: World, vm: Machine, *sessions: dict[str, Any]) -> None:
    """These mirrors; none: the port takes copies."""
    document = json.dumps({"sessions": list(sessions), "takes_copies": not sessions})
    answer = world.cluster.cli("port", "set", port_name(vm), "mirror", document)
    assert answer.returncode == 0, answer.stderr


def shown(world: World, vm: Machine, host: str) -> str:
    answer = world.cluster.cli("port", "show", port_name(vm), host=host)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_mirrors_follow_a_vm_under_load(world: World, watch: Captures) -> None:
    """Streams both ways and a conversation with large segments; there, and back within two seconds."""
    vm, peer = world.vm("h1", network="over"), world.peer("h3", network="over")
    monitor = world.peer("h3", network="over", policy="")
    declare(world, monitor)
    with monitor_devices(world, "h1", "h2") as behind:
        declare(
            world,
            vm,
            {"name": "local", "output": {"device": "mon*"}},
            {"name": "remote", "output": {"port": port_name(monitor)}},
        )
        wait_until("the mirrors are in force", lambda: "remote" in shown(world, vm, "h1"), 20.0)
        wire = watch.on(world.cluster.name(vm.name), "eth0", TRAFFIC)
        local = [watch.on(namespace, "tap0", TRAFFIC) for namespace in behind.values()]
        remote = watch.on(world.cluster.name(monitor.name), "eth0", TRAFFIC)
        talk = Conversations.begin(vm, peer, inbound=1, outbound=1, every_ms=20)
        streams = Streams(vm, peer, every_ms=5.0)
        world.follow(vm, ("h2", "h1"), within_s=10.0)
        talk.assert_whole()
        flows = streams.finish()
        assert all(not flow["missing"] and not flow["doubled"] for flow in flows.values()), flows
        for client in talk.clients:
            client.close()
        copies = same(local, [wire])
        assert copies.total() > 300 and max(map(len, copies)) > 1500, "large segments are among them"
        same([remote], [wire])
        wait_until("the counters came along", lambda: _counts(shown(world, vm, "h1"), copies), 20.0)


def test_a_monitoring_vm_that_moves_misses_nothing(world: World, watch: Captures) -> None:
    """Copies that find it between two hosts wait for it, as what is sent to it does."""
    vm, peer = world.vm("h1", network="over"), world.peer("h3", network="over")
    monitor = world.vm("h1", network="over", policy="")
    declare(world, monitor)
    declare(world, vm, {"name": "ids", "output": {"port": port_name(monitor)}})
    wait_until("the mirror is in force", lambda: "ids" in shown(world, vm, "h1"), 20.0)
    wire = watch.on(world.cluster.name(vm.name), "eth0", TRAFFIC)
    output = watch.on(world.cluster.name(monitor.name), "eth0", TRAFFIC)
    streams = Streams(vm, peer, every_ms=2.0)
    streams.run_on(100)
    for host in ("h2", "h1"):
        world.move(monitor, host)
        streams.run_on(100)
    streams.finish()
    assert same([output], [wire]).total() > 400


def _counts(text: str, copies: Counter[bytes]) -> bool:
    """Each mirror has counted at least what the wire had: segments one by one, and what is of no service."""
    packets = [int(line.split()[-2]) for line in text.splitlines() if line.startswith(("local ", "remote "))]
    return len(packets) == 2 and all(count >= copies.total() for count in packets)


def test_a_destination_without_the_output_is_refused_by_name(world: World) -> None:
    vm = world.vm("h1")
    world.expected.append("mon0")
    with monitor_devices(world, "h1"):
        declare(world, vm, {"name": "ids", "output": {"device": "mon0"}})
        wait_until("the mirror is in force", lambda: "ids" in shown(world, vm, "h1"), 20.0)
        report = world.cluster.migrate(vm, "h2")
        assert report.outcome != "complete"
        assert "mirror ids, output device mon0: this host has no such device" in report.reason
        assert vm.place() == "h1"
