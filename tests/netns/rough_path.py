# SPDX-License-Identifier: GPL-2.0-only
"""A path that loses, doubles and reorders frames of either direction, for kernels that have no netem."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from migrator.lab import netns
from migrator.lab.machines import Machine

_ALL, _OUTGOING = 3, 4
FAR_DEVICE, NEAR_DEVICE = "eth0", "path0"
LOST, DOUBLED, LATE = 0.01, 0.01, 0.2
LATE_S = 0.008


@dataclass
class Relay:
    """Passes frames between two devices of a namespace. Ends with the `with`."""

    namespace: Path
    devices: tuple[str, str]
    seed: int
    lost: int = 0
    doubled: int = 0
    late: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Relay:
        with netns.entered(self.namespace):
            self._sockets = [_raw(device) for device in self.devices]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for one in self._sockets:
            one.close()

    def _run(self) -> None:
        dice, order = random.Random(self.seed), itertools.count()
        waiting: list[tuple[float, int, socket.socket, bytes]] = []
        while not self._stop.is_set():
            left = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else 0.05
            for source in select.select(self._sockets, [], [], left)[0]:
                target = self._sockets[source is self._sockets[0]]
                for frame in _received(source):
                    for moment in self._moments(dice):
                        heapq.heappush(waiting, (moment, next(order), target, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(waiting)
                with contextlib.suppress(BlockingIOError):
                    target.send(frame)

    def _moments(self, dice: random.Random) -> list[float]:
        """When a frame goes on: never, once or twice."""
        now, chance = time.monotonic(), dice.random()
        if chance < LOST:
            self.lost += 1
            return []
        moments = [now]
        if dice.random() < LATE:
            self.late += 1
            moments = [now + dice.random() * LATE_S]
        if chance > 1 - DOUBLED:
            self.doubled += 1
            moments.append(now + dice.random() * LATE_S)
        return moments


@contextlib.contextmanager
def rough_path(peer: Machine, seed: int) -> Iterator[tuple[Relay, str]]:
    """With the name of the namespace where the peer's address is now."""
    lab, here, far = peer.lab, peer.lab.name(peer.name), f"{peer.name}far"
    namespace = lab.namespace(far)
    lab.wire(peer.name, NEAR_DEVICE, far, FAR_DEVICE)
    netns.ip("addr", "flush", "dev", FAR_DEVICE, namespace=here)
    for device in (FAR_DEVICE, NEAR_DEVICE):
        netns.set_sysctl(here, f"net/ipv6/conf/{device}/disable_ipv6", 1)
    netns.ip("link", "set", NEAR_DEVICE, "up", namespace=here)
    netns.ip("link", "set", FAR_DEVICE, "address", peer.ports[0].mac, "up", namespace=namespace)
    netns.ip("addr", "add", f"{peer.address}/16", "dev", FAR_DEVICE, namespace=namespace)
    single(namespace)
    with Relay(netns.path(here), (FAR_DEVICE, NEAR_DEVICE), seed) as relay:
        yield relay, namespace


def single(namespace: str, device: str = FAR_DEVICE) -> None:
    """No frame is larger than the MTU, each has its checksum."""
    off = ["ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off", "tx", "off"]
    subprocess.run(netns.inside(namespace, off), check=True, capture_output=True)
    netns.ip("link", "set", device, "gso_max_segs", "1", namespace=namespace)


def _raw(device: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
    made.setblocking(False)
    made.bind((device, _ALL))
    return made


def _received(source: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    for _ in range(64):
        try:
            frame, address = source.recvfrom(65600)
        except BlockingIOError:
            break
        if address[2] != _OUTGOING:
            found.append(frame)
    return found
