# SPDX-License-Identifier: GPL-2.0-only
"""A guest with a hundred thousand tracked connections of its own, and new ones from outside while it moves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from migrator.lab import oracle
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until
from migrator.lab.workers import frames
from migrator.lab.workers.probe import FORMAT, MAGIC

from .hooked import SERVICE, ended, hooked, metadata
from .lab import GuestMachine, LibvirtCluster, add_guest, migrate

pytestmark = pytest.mark.slow
SOURCES, PORTS = 1000, 100  # one connection of each source port of the guest to each port of the peer
FIRST_SOURCE, FIRST_PORT = 20_000, 10_000
PROBED, STRANGERS = 1000, 50
KNOWN, UNKNOWN = 77, 78  # numbers of flows: answers to connections, and to none
NEWCOMERS_PER_S = 20
POLICY = {
    "name": "crowd",
    "rules": [
        {"direction": "from", "priority": 1, "protocol": "any", "action": "allow"},
        {"direction": "to", "priority": 1, "protocol": "tcp", "ports": [str(SERVICE)], "action": "allow"},
    ],
}
GUEST = Port("52:54:00:00:00:10", "blue", ("10.1.0.1",))
PEER = Port("52:54:00:00:00:20", "blue", ("10.1.0.2",))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    with hooked() as made:
        made.apply(policies=[POLICY])
        yield made


@pytest.fixture(scope="module")
def guest(cluster: LibvirtCluster) -> GuestMachine:
    roomy = metadata(GUEST, policy="crowd", max_passes="1").replace("<port ", "<port connections-max='262144' ")
    patient = roomy.replace("</port>", "<timeout name='udp' ms='600000'/></port>")
    made = add_guest(cluster, "vm1", "h1", [GUEST], metadata=patient)
    made.booted()
    return made


@pytest.fixture(scope="module")
def peer(cluster: LibvirtCluster) -> Machine:
    made = add_peer(cluster, "p1", "h3", PEER, policy="open", connections_max=1 << 18)
    cluster.declare(made)
    return made


def test_a_hundred_thousand_connections(cluster: LibvirtCluster, guest: GuestMachine, peer: Machine) -> None:
    """The same keys and ids at both ends, answers to 1,000 taken at random let in by their state and by nothing
    else, and every newcomer served."""
    begin_all(cluster, guest, peer)
    guest.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
    newcomers = peer.worker("newcomers")
    newcomers.call("begin", address=guest.address, port=SERVICE, per_s=NEWCOMERS_PER_S)
    wait_until("newcomers are served", lambda: newcomers.call("status")["done"] >= NEWCOMERS_PER_S)
    before = crowd(cluster, "h1", guest)
    assert len(before) == SOURCES * PORTS
    migrate(guest, "h2")
    report = ended(cluster, guest, 1)
    come = newcomers.call("finish", limit_s=20.0)
    print({**report.times_ms}, {**report.moved}, report.leading, come["begun"], "newcomers")
    assert report.outcome == "complete" and not report.not_moved, report
    assert report.moved["conntrack"] >= SOURCES * PORTS
    assert np.array_equal(before, crowd(cluster, "h2", guest))
    assert not come["failed"], (come["failed"][:20], guest.console()[-1500:])
    answers(guest, peer)


def begin_all(cluster: LibvirtCluster, guest: GuestMachine, peer: Machine) -> None:
    outside, inside = peer.worker("probe"), guest.worker("probe")
    for number in range(PORTS):  # a port that nobody listens to would answer by an error
        outside.call("receive", address="0.0.0.0", port=FIRST_PORT + number)
    all_of_it = {"port": FIRST_PORT, "ports": PORTS, "source_port": FIRST_SOURCE, "sources": SOURCES}

    def begun() -> bool:
        """What was lost before the peer's MAC was known is sent once more with all the others."""
        if not inside.call("sprayed")["over"]:
            return False
        there = tracked(cluster, "h1", guest) >= SOURCES * PORTS
        if not there:
            inside.call("spray", address=peer.address, **all_of_it)
        return there

    wait_until("all are tracked", begun, 120.0, 0.5, explain=lambda: tracked(cluster, "h1", guest))


def tracked(cluster: LibvirtCluster, host: str, guest: GuestMachine) -> int:
    return sum(port.connections for port in cluster.ports(host) if port.instance.vm == guest.uuid)


def crowd(cluster: LibvirtCluster, host: str, guest: GuestMachine) -> NDArray[Any]:
    """Keys and ids of the hundred thousand."""
    table = oracle.columns(cluster, host, guest)
    wanted = (table["rport"] >= FIRST_PORT) & (table["rport"] < FIRST_PORT + PORTS)
    return oracle.keys({name: values[wanted] for name, values in table.items()})


def answers(guest: GuestMachine, peer: Machine) -> None:
    """Those to connections that never were are sent first, to sockets that would take them."""
    chosen = random.Random(7).sample(range(SOURCES * PORTS), PROBED)
    strangers = [answer(UNKNOWN, n, FIRST_SOURCE + n, FIRST_PORT + PORTS) for n in range(STRANGERS)]
    known = [
        answer(KNOWN, n, FIRST_SOURCE + which // PORTS, FIRST_PORT + which % PORTS) for n, which in enumerate(chosen)
    ]
    peer.worker("raw").call("send", frames=[frame.hex() for frame in (*strangers, *known)])
    probe = guest.worker("probe")

    def came() -> int:
        return int(probe.call("report")["flows"].get(str(KNOWN), {}).get("received", 0))

    wait_until("answers arrive", lambda: came() >= PROBED, explain=lambda: (came(), guest.console()[-1500:]))
    assert probe.call("report")["flows"].keys() == {str(KNOWN)}


def answer(flow: int, number: int, to: int, source: int) -> bytes:
    """A numbered datagram to a port of the guest from a port of the peer."""
    there, here = PEER.addresses[0], GUEST.addresses[0]
    body = frames.udp(there, here, source, to, FORMAT.pack(MAGIC, flow, number))
    return frames.ethernet(PEER.mac, GUEST.mac, frames.ip(there, here, frames.UDP, body))
