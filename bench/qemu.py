# SPDX-License-Identifier: GPL-2.0-only
"""Whole migrations of a real QEMU guest, with this service and without: the difference is what it costs.

The same libvirt, guest and client's call (peer to peer, live) on two pairs of hosts: on one with hook, agents and a
port of this switch under default-drop, on the other with a bridge and nothing else, no filter either. The moves of the
two guests take turns. Each has connections with checked bytes and a datagram each 10 ms each way. The guests are
emulated (TCG, no KVM), so what QEMU does takes longer than on a real host, and so does nothing of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bench.figures import Figure, Figures, Unverified, alternately, verify
from bench.plot import Bars
from migrator.lab.machines import Port, add_outsider, add_peer
from migrator.lab.processes import wait_until
from tests.libvirt.counted import CountedTraffic
from tests.libvirt.hooked import ended, hooked, metadata, reports
from tests.libvirt.lab import GuestMachine, LibvirtLab, Wiring, add_guest, migrate
from tests.libvirt.lab.image import image
from tools import guest_kernel

CONNECTIONS = 20
EVERY_MS = 10.0
HOSTS = ("h2", "h1")
OURS, BARE = "with this service", "bridge, without"
GUEST, PEER = Port("52:54:00:00:00:10", "blue", ("10.1.0.1",)), Port("52:54:00:00:00:20", "blue", ("10.1.0.2",))
BARE_GUEST, BARE_PEER = Port("52:54:00:00:00:10", "", ("10.1.0.1",)), Port("02:00:00:00:00:20", "", ("10.1.2.1",))


@dataclass(frozen=True)
class Lap:
    """One move. ms: until the client's call returned, QEMU's own count of the guest's standstill, and the longest time
    in which the peer heard nothing. Datagrams lost to and from the guest."""

    total: float
    downtime: float
    silence: float
    lost: int
    led: bool


@dataclass
class Rig:
    """A guest that moves to and fro. `after` waits until the move is over and tells whether an agent led it."""

    guest: GuestMachine
    traffic: CountedTraffic
    after: Callable[[int], bool]
    moves: int = 0

    def lap(self) -> Lap:
        to = HOSTS[self.moves % 2]
        self.moves += 1
        self.traffic.silence()
        began = time.monotonic()
        qemu = migrate(self.guest, to)
        total = time.monotonic() - began
        led = self.after(self.moves)
        verify("the guest's place", self.guest.place(), to)
        checked = self.traffic.tcp.call("check", size=2000, timeout_s=30)
        verify("connections, lost", (checked["total"], checked["lost"]), (CONNECTIONS, 0))
        lost = self.traffic.lost()
        verify("datagrams doubled", [doubled for _, doubled in lost.values()], [0, 0])
        silence = self.traffic.silence()["ms"]
        return Lap(1e3 * total, float(qemu.downtime_ms), silence, sum(gone for gone, _ in lost.values()), led)


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    try:
        image()
    except guest_kernel.Unavailable as error:
        raise Unverified(f"there is no guest to boot: {error}") from error
    with ours() as with_us, bare() as without:
        laps = alternately(2 if quick else 8, {OURS: with_us.lap, BARE: without.lap})
    led = sum(lap.led for lap in laps[OURS])
    figures.notes.append(
        f"the agent stopped the guest in {led} of {len(laps[OURS])} moves, QEMU by itself in the others"
    )
    chart = Bars("One move of an emulated guest", "ms")
    figures.chart("move", chart)
    for what, values in {
        "until the client's call returns": {name: [lap.total for lap in some] for name, some in laps.items()},
        "QEMU's downtime": {name: [lap.downtime for lap in some] for name, some in laps.items()},
        "peer hears nothing": {name: [lap.silence for lap in some] for name, some in laps.items()},
    }.items():
        rows = {name: figures.add(f"{what}, {name}", "ms", series) for name, series in values.items()}
        for name, row in rows.items():
            chart.add(what, name, row)
        figures.add(f"{what}, added", "ms", _differences(rows[OURS], rows[BARE]))
    for name, some in laps.items():
        figures.add(f"datagrams lost a move, {name}", "lost", [float(lap.lost) for lap in some])
    return figures


def _differences(one: Figure, other: Figure) -> list[float]:
    """Pair by pair: both were measured in turns."""
    return [mine - bare for mine, bare in zip(one.values, other.values, strict=True)]


@contextmanager
def ours() -> Iterator[Rig]:
    """As an operator has it: the hook installed, the port in the domain's metadata."""
    with hooked() as cluster:
        guest = add_guest(cluster, "vm1", "h1", [GUEST], metadata=metadata(GUEST, max_passes="1"))
        guest.booted()
        peer = add_peer(cluster, "p1", "h3", PEER, policy="open")
        cluster.declare(peer)

        def after(count: int) -> bool:
            report = ended(cluster, guest, count)
            verify("how the move ended", (report.outcome, list(report.not_moved)), ("complete", []))
            verify("moves so far", len(reports(cluster, guest)), count)
            return bool(report.leading)

        yield Rig(guest, CountedTraffic(guest, peer, connections=CONNECTIONS, every_ms=EVERY_MS), after)


@contextmanager
def bare() -> Iterator[Rig]:
    with ExitStack() as stack:
        lab = stack.enter_context(LibvirtLab())
        bridge = lab.bridge()
        guest = add_guest(lab, "vm1", "h1", [BARE_GUEST], Wiring("bridge", bridge=bridge))
        guest.booted()
        peer = add_outsider(lab, "peer", BARE_PEER)

        def after(count: int) -> bool:
            wait_until("the guest runs there", lambda: guest.place() == HOSTS[(count - 1) % 2], 20.0)
            return False

        yield Rig(guest, CountedTraffic(guest, peer, connections=CONNECTIONS, every_ms=EVERY_MS), after)
