# SPDX-License-Identifier: GPL-2.0-only
"""What ports can be told in documents, on real traffic: a port of the host's own, trunks, learning."""

from __future__ import annotations

import itertools
import json
import re
import socket
import struct
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns, oracle
from migrator.lab.cluster import port_messages
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until
from migrator.lab.workers import frames

from .byhand import ACK, GUEST, PEER, PSH, SYN, Wire
from .world import NUMBERS, SERVICE, World

INTERNAL = Path(__file__).parents[2] / "examples" / "internal-port.yaml"
GREEN_MAC = "02:00:00:00:30:02"


def apply(world: World, file: Path) -> None:
    ran = world.cluster.cli("apply", "-f", str(file))
    assert ran.returncode == 0, ran.stdout + ran.stderr


def document(world: World, machine: Machine, **fields: Any) -> None:
    """Declare a machine's port by a document, with `fields` beside what the lab knows."""
    file = world.cluster.directory / f"{machine.name}.yaml"
    file.write_text(json.dumps({"ports": [message | fields for message in port_messages(machine)]}))
    apply(world, file)


def ping(namespace: str, target: str) -> bool:
    """One ICMP echo from a namespace; True when its answer came within a second."""
    with netns.entered(netns.path(namespace)):
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with sender:
        request = struct.pack("!BBHHH", 8, 0, 0xF7FF - 0x4D56 - 1, 0x4D56, 1)  # RFC 1071 over these five words
        sender.sendto(request, (target, 0))
        deadline = time.monotonic() + 1.0
        while (left := deadline - time.monotonic()) > 0:
            sender.settimeout(left)
            try:
                data, (origin, _) = sender.recvfrom(200)
            except TimeoutError:
                break
            if origin == target and data[20:21] == b"\0" and data[24:28] == request[4:]:
                return True
    return False


def declared(world: World, sort: str, *names: str) -> None:
    """These go with the test."""
    for name in names:
        removal = pb.Removal(sort=sort, name=name)
        world.cluster.stack.callback(world.cluster.coordinator_stub().Remove, removal, timeout=10)


def test_a_host_talks_on_a_network(world: World) -> None:
    """As examples/internal-port.yaml says: both ways on an overlay, and what its policy does not allow is dropped."""
    host = world.cluster.name("h1")
    for command in re.findall(r"^#   ip (.+)$", INTERNAL.read_text(), flags=re.M):
        netns.ip(*command.split(), namespace=host)
    (example,) = yaml.safe_load(INTERNAL.read_text())["ports"]
    port = Port(example["mac"], example["network"], tuple(example["addresses"]), device=example["device"])
    world.machines.append(Machine(world.cluster, example["name"], "h1", [port], uuid=example["vm"]))
    apply(world, INTERNAL)
    declared(world, "policy", example["policy"])
    wait_until("the host's port is open", lambda: world.cluster.is_open(world.machines[-1], "h1"))
    far, near = world.peer("h3", "over"), world.peer("h1", "over")
    for peer in (far, near):
        wait_until(f"h1 reaches {peer.name}", partial(ping, host, peer.address))
        assert ping(world.cluster.name(peer.name), port.addresses[0])
    wire_drops = drops(world, "h1", port.mac).get("policy", 0)
    with netns.entered(netns.path(world.cluster.name(far.name))):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sender.sendto(b"not allowed", (port.addresses[0], 9))
    wait_until("it is dropped", lambda: drops(world, "h1", port.mac).get("policy", 0) == wire_drops + 1)


def drops(world: World, host: str, mac: str) -> Mapping[str, int]:
    return next(status.drops for status in world.cluster.ports(host) if status.instance.mac == mac)


def test_a_trunk_moves_with_its_tags(world: World) -> None:
    world.cluster.apply(networks=[{"name": "green", "kind": "uplink", "vlan": 130, "uplink": "up0"}])
    declared(world, "network", "green")
    wait_until(
        "all hosts have it",
        lambda: all("green" in world.cluster.agent_stub(h).Status(pb.Empty()).networks for h in world.before),
    )
    world.before = {host: oracle.traces(world.cluster, host) for host in world.before}
    vm, blue = world.vm("h1"), world.peer("h3")
    port = Port(GREEN_MAC, "green", (), silent=("10.30.0.2",))
    green = add_peer(world.cluster, "green1", "h3", port, policy="open")
    world.machines.append(green)
    world.cluster.declare(green)
    wire = Wire(vm, green)

    def tagged(number: int) -> bytes:
        frame = datagram(wire, GUEST, number)
        return frame[:12] + struct.pack("!HH", 0x8100, 30) + frame[12:]

    def arrived(number: int) -> bool:
        wire.send(GUEST, tagged(number))
        return wire.arrived(GUEST, datagram(wire, GUEST, number))

    wire.send(GUEST, tagged(1))
    wait_until("an access port may not tag", lambda: drops(world, "h1", vm.ports[0].mac).get("vlan") == 1)
    document(world, vm, trunk={"30": "green"})
    wait_until("the tag is the network's", lambda: arrived(2))
    world.move(vm, "h2")
    wait_until("so it is after the move", lambda: arrived(3))
    answer = datagram(wire, PEER, 4)
    wire.send(PEER, answer)
    wait_until("the answer has the tag", lambda: wire.arrived(PEER, answer[14:]))
    assert ping(world.cluster.name(vm.name), blue.address), "untagged frames are on the port's own network"


def datagram(wire: Wire, side: bool, number: int) -> bytes:
    """A frame from `side` to the other on a port that the policy of servers allows."""
    ends = wire.address(side, ipv6=False), wire.address(not side, ipv6=False)
    return wire.ip(side, frames.UDP, frames.udp(*ends, NUMBERS, NUMBERS, b"numbered %d" % number))


def test_learning_takes_up_what_is_under_way(world: World) -> None:
    vm, peer = world.vm("h1"), world.peer("h3")
    wire = Wire(vm, peer)
    numbers = itertools.count(20_000)

    def segment(port: int, flags: int, number: int = 0, data: bytes = b"") -> bytes:
        ends = wire.address(PEER, ipv6=False), wire.address(GUEST, ipv6=False)
        source = number or next(numbers)
        return wire.ip(PEER, frames.TCP, frames.tcp(*ends, source, port, flags, 1000, 1000, data))

    def drops_again() -> bool:
        assert blocked(segment(SERVICE, ACK)), "in the middle of what nobody knows"
        return drops(world, "h1", vm.ports[0].mac).get("ct-invalid", 0) > dropped

    def blocked(frame: bytes) -> bool:
        return wire.blocked(PEER, frame, after=segment(SERVICE, SYN))

    document(world, peer, learning=True)  # its own port has not seen the beginning either
    dropped = drops(world, "h1", vm.ports[0].mac).get("ct-invalid", 0)
    wait_until("the peer's port learns", drops_again)
    document(world, vm, learning=True)
    wait_until("learning", lambda: not blocked(segment(SERVICE, ACK)))
    wire.pass_through(PEER, segment(SERVICE, ACK | PSH, 30_000, b"learned"))
    document(world, vm, learning=False)
    wait_until("no longer", lambda: blocked(segment(SERVICE, ACK)))
    wire.pass_through(PEER, segment(SERVICE, ACK | PSH, 30_000, b"goes on"))
