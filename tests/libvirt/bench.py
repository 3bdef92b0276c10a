# SPDX-License-Identifier: GPL-2.0-only
"""A cluster with one guest under traffic that many tests use in turn; one that a test has left broken is made anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from migrator.lab.machines import Port, add_peer
from migrator.lab.processes import wait_until
from tests.netns.standing import StandingCluster

from .hooked import NETWORKS, OPEN, OUT, Traffic, install, metadata, reports
from .lab import GuestMachine, LibvirtCluster, add_guest, migrate
from .strictly import StrictCluster, guarded

GUEST = Port("52:54:00:00:00:10", "blue", ("10.1.0.1",))
SETTLED_S = 120.0
PEER = Port("52:54:00:00:00:20", "blue", ("10.1.0.2",))


class Killable(StandingCluster, LibvirtCluster):
    """A libvirt cluster whose daemons can be made to stand still."""


@dataclass(frozen=True)
class Bench:
    """One guest, at h1 when it is made, its peer at h3, and what goes on between them."""

    cluster: StandingCluster
    guest: GuestMachine
    traffic: Traffic

    def states(self, host: str) -> list[str]:
        """Of the guest's ports there."""
        return [port.instance.state for port in self.cluster.ports(host) if port.instance.vm == self.guest.uuid]

    def left(self) -> dict[str, object]:
        """What must not be when all its moves have ended: ports where it does not run, moves, marks of strict ones."""
        place = self.guest.place()
        states = {name: self.states(name) for name in self.cluster.machine_names}
        found = {
            "place": "" if place else "it runs nowhere",
            "ports": {name: at for name, at in states.items() if at != (["active"] if name == place else [])},
            "moves": [(r.phase, r.outcome, r.reason) for r in reports(self.cluster, self.guest) if not r.done],
            "marks": [mark for mark in marks(self.cluster) if self.guest.uuid in mark],
        }
        return {what: value for what, value in found.items() if value}

    def settled(self) -> None:
        """All its moves have ended, and it has ports where it runs and nowhere else."""
        wait_until("all is settled", lambda: not self.left(), SETTLED_S, explain=self.left)

    def go_home(self) -> None:
        """To h1, by the move that has to work after whatever went wrong before."""
        self.settled()
        if self.guest.place() != "h1":
            migrate(self.guest, "h1")
            self.traffic.check()
            self.settled()
            assert reports(self.cluster, self.guest)[-1].outcome == "complete"


def marks(cluster: StandingCluster) -> list[str]:
    return cluster.marks() if isinstance(cluster, StrictCluster) else []


@contextlib.contextmanager
def killable(traffic: type[Traffic] = Traffic, **attributes: str) -> Iterator[Bench]:
    """With libvirt's hook. `attributes`: of the guest's metadata."""
    options = {"redirect_idle_s": 1.0, "settle_s": 10.0}
    with Killable(networks=NETWORKS, guests={"driver": "libvirt"}, migration_options=options) as cluster:
        install(cluster)
        cluster.apply(policies=[OUT, OPEN])
        yield _bench(cluster, traffic, 50, attributes)


@contextlib.contextmanager
def strict() -> Iterator[Bench]:
    """With hook and lock driver. The agent stops the guest in QEMU's first pass over its memory."""
    with guarded() as cluster:
        yield _bench(cluster, Traffic, 20, {"strict": "yes", "max_passes": "1"})


def _bench(cluster: LibvirtCluster, traffic: type[Traffic], connections: int, attributes: dict[str, str]) -> Bench:
    guest = add_guest(cluster, "vm1", "h1", [GUEST], metadata=metadata(GUEST, **attributes))
    guest.booted()
    peer = add_peer(cluster, "p1", "h3", PEER, policy="open")
    cluster.declare(peer)
    assert isinstance(cluster, StandingCluster)
    return Bench(cluster, guest, traffic(guest, peer, connections=connections))


Made = TypeVar("Made")


class Kept(Generic[Made]):
    """What `make` makes, kept until somebody says that it is broken: a failure then costs no other test."""

    def __init__(self, make: Callable[[], AbstractContextManager[Made]]) -> None:
        self._make = make
        self._stack = contextlib.ExitStack()
        self._made: Made | None = None

    def get(self) -> Made:
        if self._made is None:
            self._made = self._stack.enter_context(self._make())
        return self._made

    def drop(self) -> None:
        self._made = None
        self._stack.close()
