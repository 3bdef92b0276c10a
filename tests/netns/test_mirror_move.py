# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors by the real daemons: an operator declares them, they follow a VM under load, tcpdump is the oracle."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from migrator.lab import netns
from migrator.lab.cluster import Cluster
from migrator.lab.machines import GUEST_DEVICE, Machine
from migrator.lab.processes import wait_until

from . import mirror_outputs
from .captures import Captures, captures, same
from .tagged import TAG, tag_of, trunked
from .traffic import Conversations, Streams
from .world import NUMBERS, SERVICE, World

TRAFFIC = f"tcp port {SERVICE} or udp port {NUMBERS}"


@pytest.fixture
def watch() -> Iterator[Captures]:
    with captures() as made:
        yield made


@contextlib.contextmanager
def monitor_devices(cluster: Cluster, *hosts: str) -> Iterator[Mapping[str, str]]:
    """`mon0` of hosts; host -> the namespace with `tap0` behind it."""
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
    with monitor_devices(world.cluster, "h1", "h2") as behind:
        declare(
            world,
            vm,
            {"name": "local", "output": {"device": "mon*"}},
            {"name": "remote", "output": {"port": port_name(monitor)}},
        )
        wait_until("the mirrors are in force", lambda: "remote" in shown(world, vm, "h1"))
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
        wait_until("the counters came along", lambda: _counts(shown(world, vm, "h1"), copies))


# ---- by VLAN, to VLANs and to an address ----

SNAP = 96
SESSIONS: Mapping[str, dict[str, Any]] = {
    "all": {},
    "tagged": {"vlans": [TAG], "direction": "to"},
    "untagged": {"vlans": [0], "direction": "from"},
    "heads": {"vlans": [0, TAG], "snap": SNAP},
}


def of_services(frame: bytes) -> bool:
    """IPv4 to or from the ports that the traffic uses."""
    at = 18 if tag_of(frame) else 14
    if frame[at - 2 : at] != b"\x08\x00" or frame[at + 9] not in (6, 17):
        return False
    ports = {int.from_bytes(frame[at + n : at + n + 2], "big") for n in (20, 22)}
    return bool(ports & {SERVICE, NUMBERS})


def due(
    vm: Machine, vlans: Sequence[int] = (), direction: str = "both", snap: int = 0
) -> Callable[[bytes], bytes | None]:
    """What a mirror copies of a frame on the guest's wire, None: nothing."""
    own = bytes.fromhex(vm.ports[0].mac.replace(":", ""))

    def part(frame: bytes) -> bytes | None:
        if direction != "both" and (direction == "from") != (frame[6:12] == own):
            return None
        if vlans and tag_of(frame) not in vlans:
            return None
        return frame[:snap] if snap else frame

    return part


@pytest.mark.parametrize("outputs", [mirror_outputs.vlans, mirror_outputs.collector], ids=["vlan", "remote"])
def test_mirrors_by_vlan_follow_a_vm_to_where_they_go(
    world: World, watch: Captures, outputs: Callable[..., Any]
) -> None:
    """A guest that talks in two networks by one NIC; there and back, each mirror has its share and nothing else."""
    vm, peer, other = world.vm("h1", network="over"), world.peer("h3", network="over"), world.peer("h3")
    tagged = trunked(world.cluster, vm, other, "10.2.0.1")
    with outputs(world.cluster, watch, tuple(SESSIONS)) as there:
        declared = [{"name": name, "output": there[name].output, **fields} for name, fields in SESSIONS.items()]
        declare(world, vm, *declared)
        wait_until("the mirrors are in force", lambda: "heads" in shown(world, vm, "h1"))
        wire = watch.on(world.cluster.name(vm.name), GUEST_DEVICE, "")
        talk = Conversations.begin(vm, peer, inbound=1, outbound=1, every_ms=20)
        streams = [Streams(one, end, every_ms=4.0, own=True) for one, end in ((vm, peer), (tagged, other))]
        world.follow(vm, ("h2", "h1"), within_s=10.0)
        for one in streams:
            one.run_on(50)
        talk.assert_whole()
        for one in streams:
            one.assert_perfect()
        for client in talk.clients:
            client.close()
        copies = {
            name: same([there[name].capture], [wire], due=due(vm, **fields), counts=of_services)
            for name, fields in SESSIONS.items()
        }
        assert all(found.total() > 200 for found in copies.values())
        assert max(map(len, copies["all"])) > 1500 and max(map(len, copies["heads"])) == SNAP
        declare(world, vm)


def test_a_monitoring_vm_that_moves_misses_nothing(world: World, watch: Captures) -> None:
    """Copies that find it between two hosts wait for it, as what is sent to it does."""
    vm, peer = world.vm("h1", network="over"), world.peer("h3", network="over")
    monitor = world.vm("h1", network="over", policy="")
    declare(world, monitor)
    declare(world, vm, {"name": "ids", "output": {"port": port_name(monitor)}})
    wait_until("the mirror is in force", lambda: "ids" in shown(world, vm, "h1"))
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


NOBODY = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01/52:54:00:00:00:09"
REMOTE = {"address": mirror_outputs.COLLECTOR, "vni": mirror_outputs.VNI}


@pytest.mark.parametrize(
    ("output", "only_at_h1", "why"),
    [
        ({"device": "mon0"}, monitor_devices, "device mon0: this host has no such device"),
        ({"remote": REMOTE}, mirror_outputs.routed, f"VNI {REMOTE['vni']} at {REMOTE['address']}: no route to it"),
        ({"port": NOBODY}, None, f"port {NOBODY}: no host is known to have it"),
    ],
    ids=["device", "address", "port"],
)
def test_a_destination_without_the_output_is_refused_by_name(
    world: World, output: dict[str, Any], only_at_h1: Callable[..., Any] | None, why: str
) -> None:
    vm = world.vm("h1")
    world.expected.append("mirror ids, output")
    with only_at_h1(world.cluster, "h1") if only_at_h1 else contextlib.nullcontext():
        declare(world, vm, {"name": "ids", "output": output})
        wait_until("the mirror is in force", lambda: "ids" in shown(world, vm, "h1"))
        report = world.cluster.migrate(vm, "h2")
        assert report.outcome == "refused", report
        assert f"mirror ids, output {why}" in report.reason
        assert vm.place() == "h1"
        declare(world, vm)
