# SPDX-License-Identifier: GPL-2.0-only
"""Worker: frames by hand on one device, and a capture of it.

send {frames}                                    hex frames, as they are
blast {template, count, pps, addresses, …}       UDP datagrams of distinct flows (see `Blast`)
blasting                                         how many were sent, whether it is over
capture {}                                       begin to keep frames that come in or go out
captured {contains, clear}                       what was kept: [time, "in" | "out", hex], of those that contain hex
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders
from migrator.lab.workers import frames, serve

ALL = 0x0003
SO_RCVBUFFORCE = 33
OUTGOING = 4


@dataclass
class Blast:
    """Flows `first`.. `first + count`: each has its own pair of ports, from `source` to `destination`."""

    source: str
    destination: str
    source_mac: str
    destination_mac: str
    count: int
    pps: float
    first: int = 0
    port_base: int = 10000  # of the destination
    sent: int = 0
    began: float = 0.0

    def ports(self, number: int) -> tuple[int, int]:
        """A flow's ports: source port below, destination port above 10,000 flows each."""
        return 20000 + number % 10000, self.port_base + number // 10000

    def frame(self, number: int) -> bytes:
        sport, dport = self.ports(number)
        data = struct.pack("!4sI", b"mgBG", number)
        packet = frames.ip(
            self.source, self.destination, frames.UDP, frames.udp(self.source, self.destination, sport, dport, data)
        )
        return frames.ethernet(self.source_mac, self.destination_mac, packet)


class Raw:
    def __init__(self, loop: Loop, device: str) -> None:
        self.loop = loop
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.bind((device, 0))
        self.device = device
        self.tap: socket.socket | None = None
        self.kept: list[tuple[float, str, bytes]] = []
        self.current: Blast | None = None

    def operations(self) -> dict[str, Operation]:
        return {
            "send": self.send,
            "blast": self.blast,
            "blasting": lambda _: self.blasting(),
            "capture": self.capture,
            "captured": self.captured,
        }

    def send(self, order: Message) -> Message:
        for frame in order["frames"]:
            self.socket.send(bytes.fromhex(frame))
        return {"sent": len(order["frames"])}

    def blast(self, order: Message) -> Message:
        self.current = Blast(**order)
        self.current.began = time.monotonic()
        self._burst(self.current)
        return {}

    def blasting(self) -> Message:
        now = self.current
        return {"sent": now.sent if now else 0, "over": now is None or now.sent >= now.count}

    def _burst(self, now: Blast) -> None:
        due = min(now.count, int((time.monotonic() - now.began) * now.pps) + 1)
        for number in range(now.first + now.sent, now.first + min(due, now.sent + 500)):
            try:
                self.socket.send(now.frame(number))
            except OSError:  # the device's queue is full: the same again a little later
                break
            now.sent += 1
        if now.sent < now.count:
            self.loop.after(0.001, lambda: self._burst(now))

    def capture(self, _: Message) -> Message:
        if self.tap is None:
            self.tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self.tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            self.tap.setblocking(False)
            self.tap.bind((self.device, ALL))
            self.loop.watch(self.tap.fileno(), self._keep)
        self.kept.clear()
        return {}

    def _keep(self) -> None:
        assert self.tap is not None
        for _ in range(256):
            try:
                frame, address = self.tap.recvfrom(65600)
            except BlockingIOError:
                return None
            except OSError:  # the device goes away; what was captured stays
                return self.loop.forget(self.tap.fileno())
            self.kept.append((time.monotonic(), "out" if address[2] == OUTGOING else "in", frame))
        return None

    def captured(self, order: Message) -> Message:
        self._keep()
        wanted = bytes.fromhex(order.get("contains", ""))
        found = [[when, way, frame.hex()] for when, way, frame in self.kept if wanted in frame]
        if order.get("clear"):
            self.kept.clear()
        return {"frames": found}


def main(arguments: list[str]) -> int:
    setup: dict[str, Any] = json.loads(arguments[1])

    def operations(loop: Loop, _: list[Orders]) -> dict[str, Operation]:
        return Raw(loop, setup["device"]).operations()

    return serve(operations)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
