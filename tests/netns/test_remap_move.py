# SPDX-License-Identifier: GPL-2.0-only
"""A VM with floating addresses moves under load: its peers know none but these."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from dataclasses import dataclass
from typing import Any

from migrator.lab import netns
from migrator.lab.cluster import port_messages
from migrator.lab.machines import Machine
from migrator.lab.processes import Worker, wait_until

from .traffic import Conversations, Streams
from .world import SERVICE, World

CLOSED = 9001  # nobody listens there


@dataclass
class Floating:
    """A machine as its peers know it."""

    machine: Machine
    address: str
    address6: str
    service: str  # an address of which one port leads to it

    @classmethod
    def of(cls, machine: Machine) -> Floating:
        last = machine.address.rpartition(".")[2]
        return cls(machine, f"10.1.200.{last}", f"fd00:1::f:{last}", f"10.1.201.{last}")

    def worker(self, module: str) -> Worker:
        return self.machine.worker(module)

    def declare(self, world: World) -> None:
        """Its rules, on top of what is declared of its port."""
        rules = [
            {"outside": self.address, "inside": self.machine.address},
            {"outside": self.address6, "inside": self.machine.address6},
            {
                "outside": self.service,
                "inside": self.machine.address,
                "protocol": "tcp",
                "outside_port": 443,
                "inside_port": SERVICE,
            },
        ]
        port = port_messages(self.machine)[0] | {"kinds": {"remap": json.dumps({"rules": rules})}}
        world.cluster.apply(ports=[port])
        wait_until("the rules are there", lambda: len(self.shown(world)) == len(rules))

    def shown(self, world: World) -> list[dict[str, Any]]:
        """Its rules with what they counted, as the operator sees them."""
        key = f"{self.machine.uuid}/{self.machine.ports[0].mac}"
        done = world.cluster.cli("--json", "port", "show", key, host=self.machine.place())
        assert done.returncode == 0, done.stderr
        (shown,) = json.loads(done.stdout)
        found: list[dict[str, Any]] = (shown["status"] or {}).get("kinds", {}).get("remap", [])
        return found


def inside(machine: Machine, *command: str) -> str:
    done = subprocess.run(
        netns.inside(machine.lab.name(machine.name), list(command)),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_port(talk: Conversations, server: Floating, client: Machine, count: int) -> None:
    """Connections to the address of which only a port leads to the server."""
    server.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
    worker = client.worker("tcp")
    opened = worker.call("connect", address=server.service, port=443, count=count, timeout_s=20)
    assert opened == {"connected": count, "failed": 0}
    worker.call("flow", every_ms=500, size=64)
    talk.clients.append(worker)
    talk.total += count


def traced(machine: Machine, address: str) -> bool:
    """Datagrams to ports where nobody listens come back as errors, from the address that they were sent to."""
    shown = inside(machine, "traceroute", "-n", "-q", "1", "-w", "5", "-m", "2", address)
    return f" {address} " in shown.splitlines()[1]


REFUSED = """
import socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.settimeout(5)
    one.connect((sys.argv[1], int(sys.argv[2])))
    one.send(b"is anybody there?")
    try:
        one.recv(100)
    except ConnectionRefusedError:
        print("refused")
"""


def refused(machine: Machine, address: str, port: int) -> bool:
    """An ICMP error comes back, and the kernel finds the socket that it is about."""
    return inside(machine, "python3", "-c", REFUSED, address, str(port)) == "refused\n"


def test_a_vm_with_floating_addresses_moves(world: World, route: tuple[str, ...]) -> None:
    """Connections in both directions byte for byte, numbered streams without a loss, over IPv4 and IPv6."""
    vm, peer = world.vm("h1"), world.peer("h3")
    known = Floating.of(vm)
    known.declare(world)
    listening = peer.worker("raw")
    listening.call("capture")
    talk = Conversations.begin(known, peer, inbound=0, outbound=100)  # type: ignore[arg-type]
    six = Conversations.begin(known, peer, inbound=50, outbound=50, ipv6=True)  # type: ignore[arg-type]
    by_port(talk, known, peer, 100)
    streams = Streams(known, peer)  # type: ignore[arg-type]
    for report in world.follow(vm, route):
        assert report.moved["conntrack"] >= 300
        assert report.moved["remap"] >= 3
    talk.assert_whole()
    six.assert_whole()
    streams.run_on(100)
    streams.assert_perfect()
    assert_announced(listening, known)
    assert_only_outside(listening, vm)


def assert_announced(capture: Worker, known: Floating) -> None:
    """The destination says where each outside address is: gratuitous ARP, unsolicited advertisements."""
    own = known.machine.ports[0].mac.replace(":", "")
    for address in (known.address, known.service):
        said = "".join(f"{int(part):02x}" for part in address.split("."))
        gratuitous = f"0001{own}{said}000000000000{said}"
        assert capture.call("captured", contains=gratuitous)["frames"], f"{address} was not announced"
    six = ipaddress.ip_address(known.address6).packed.hex()
    assert capture.call("captured", contains=f"20000000{six}0201{own}")["frames"], "the IPv6 address was not announced"


def assert_only_outside(capture: Worker, vm: Machine) -> None:
    """No frame of all this named an inside address, but where a fragment of another number looks like one."""
    address = "".join(f"{int(part):02x}" for part in vm.address.split("."))
    seen = [frame for _, _, frame in capture.call("captured", contains=address)["frames"]]
    wrong = [frame for frame in seen if address in (frame[52:60], frame[60:68], frame[56:64], frame[76:84])]
    assert wrong == []


def test_who_asks_and_who_errs(world: World) -> None:
    """Echoes and ICMP errors find their way through the remapping, before and after a move."""
    vm, peer = world.vm("h1", policy="open"), world.peer("h3")
    known = Floating.of(vm)
    known.declare(world)
    for _ in range(2):
        for address, own in ((known.address, peer.address), (known.address6, peer.address6)):
            assert "1 received" in inside(peer, "ping", "-c", "1", "-W", "5", address)
            assert "1 received" in inside(vm, "ping", "-c", "1", "-W", "5", own)
            assert traced(peer, address)
            assert traced(vm, own)
            assert refused(peer, address, CLOSED), "an error of the guest, about a packet to its outside address"
            assert refused(vm, own, CLOSED), "an error for the guest, about a packet from its outside address"
        assert not reached(peer, vm.address), "the inside address is not the network's"
        if vm.place() == "h1":
            world.move(vm, "h2")
    counted = {rule["outside"]: rule for rule in known.shown(world)}
    assert counted[known.address]["packets_to"] >= 4, "what was counted at the source counts on"
    assert counted[known.address6]["packets_from"] >= 4


def reached(machine: Machine, address: str) -> bool:
    command = netns.inside(machine.lab.name(machine.name), ["ping", "-c", "1", "-W", "1", address])
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
