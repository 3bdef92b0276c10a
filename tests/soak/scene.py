# SPDX-License-Identifier: GPL-2.0-only
"""Who is there in the soak and who talks to whom: data only, for the plan, the model and the lab alike."""

from __future__ import annotations

from dataclasses import dataclass

HOSTS = ("h1", "h2", "h3")
CONTROL = "coordinator"
TCP_PORTS = (7000, 7001)
UDP_PORTS = (9000, 9001)
ASK_PORT = 9100  # answered, which the asker lets in by state alone
FLOW_SOURCE = 20000  # source port of the first numbered stream
PREFIXES = {"blue": ("10.1.0.0/24", "fd00:1::/64"), "over": ("10.2.0.0/24", "fd00:2::/64")}
_SUBNET = {"blue": 1, "over": 2}


@dataclass(frozen=True)
class Nic:
    """One port: where it is, and its addresses."""

    network: str
    mac: str
    ip4: str
    ip6: str


@dataclass(frozen=True)
class Machine:
    """A VM (moves, has a policy of its own), or a peer that stays and lets everything through."""

    name: str
    host: str
    nics: tuple[Nic, ...]
    moves: bool

    def nic(self, network: str) -> Nic:
        return next(nic for nic in self.nics if nic.network == network)

    def address(self, network: str, *, six: bool) -> str:
        nic = self.nic(network)
        return nic.ip6 if six else nic.ip4


@dataclass(frozen=True)
class Group:
    """TCP connections that stay open and carry bytes that are compared."""

    name: str
    client: str
    server: str
    network: str
    port: int
    count: int
    six: bool = False


@dataclass(frozen=True)
class Flow:
    """A stream of numbered datagrams one way."""

    number: int
    sender: str
    receiver: str
    network: str
    port: int

    @property
    def source_port(self) -> int:
        return FLOW_SOURCE + self.number


def _machine(number: int, name: str, host: str, *networks: str) -> Machine:
    return Machine(name, host, tuple(_nic(number, network) for network in networks), name.startswith("v"))


def _nic(number: int, network: str) -> Nic:
    subnet = _SUBNET[network]
    return Nic(network, f"02:00:00:0{subnet}:00:{number:02x}", f"10.{subnet}.0.{number}", f"fd00:{subnet}::{number:x}")


MACHINES = {
    machine.name: machine
    for machine in (
        _machine(1, "v1", "h1", "blue"),
        _machine(2, "v2", "h2", "blue"),
        _machine(3, "v3", "h1", "blue", "over"),
        _machine(4, "v4", "h2", "over"),
        _machine(5, "v5", "h3", "over"),
        _machine(21, "p1", "h3", "blue"),
        _machine(22, "p2", "h1", "over"),
    )
}
VISITORS = {network: _machine(41, f"x-{network}", "", network) for network in PREFIXES}  # come and go, at any host
EVERYBODY = MACHINES | {visitor.name: visitor for visitor in VISITORS.values()}
VMS = tuple(name for name, machine in MACHINES.items() if machine.moves)
PEERS = tuple(name for name, machine in MACHINES.items() if not machine.moves)

GROUPS = tuple(
    Group(f"{client}-{server}-{network}", client, server, network, port, count, six)
    for client, server, network, port, count, six in (
        ("p1", "v1", "blue", 7000, 4, False),
        ("v1", "p1", "blue", 7000, 4, True),
        ("v1", "v2", "blue", 7001, 3, False),
        ("v2", "v1", "blue", 7000, 3, True),
        ("v3", "v1", "blue", 7000, 3, False),
        ("p1", "v3", "blue", 7001, 3, False),
        ("p2", "v4", "over", 7000, 4, False),
        ("v4", "v5", "over", 7001, 3, True),
        ("v5", "v4", "over", 7000, 3, False),
        ("v5", "p2", "over", 7000, 3, False),
        ("v3", "v4", "over", 7001, 3, False),
    )
)

FLOWS = tuple(
    Flow(number, sender, receiver, network, port)
    for number, (sender, receiver, network, port) in enumerate(
        (
            ("p1", "v1", "blue", 9000),
            ("v1", "p1", "blue", 9000),
            ("v1", "v2", "blue", 9001),
            ("v2", "v3", "blue", 9000),
            ("v3", "v4", "over", 9001),
            ("v4", "v5", "over", 9000),
            ("v5", "p2", "over", 9001),
            ("p2", "v4", "over", 9000),
        ),
        1,
    )
)
