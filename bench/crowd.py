"""Worker of the switchover's benchmark: numbered datagrams at a steady rate, of one flow and of ever new ones, and
which of them arrive. One process in one namespace, told what to do by JSON lines (`migrator.lab.workers`).

    send {source_mac, destination_mac, source, destination, steady, new}
                       from now on, a second: `steady` datagrams of one flow, and `new` ones that each begin a flow
    stop               no more: how many were sent, how many of them began a flow
    count              begin to count what comes in
    counted            how many came, and how many different ones
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from dataclasses import dataclass

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders
from migrator.lab.workers import frames, serve
from migrator.lab.workers.raw import ALL, OUTGOING, SO_RCVBUFFORCE

MAGIC = b"mgBN"
STEADY_PORTS = (19_999, 9_999)
NEW_FIRST, SOURCE_PORTS = 20_000, 40_000
UDP_AT, NUMBER_AT = 34, 46  # in the frame
TICK_S = 0.001
NUMBERS_MAX = 1 << 24
BUFFER = 64 << 20


@dataclass
class Stream:
    """`rate` datagrams a second since `began`, of which `sent` have gone."""

    rate: float
    began: float
    sent: int = 0

    def due(self, now: float) -> int:
        return int((now - self.began) * self.rate) - self.sent


class Crowd:
    def __init__(self, loop: Loop, device: str) -> None:
        self.loop, self.device = loop, device
        self.out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.out.bind((device, 0))
        self.frame = bytearray()
        self.streams: list[Stream] = []
        self.number = 0
        self.seen = bytearray(NUMBERS_MAX >> 3)
        self.came = self.different = 0

    def operations(self) -> dict[str, Operation]:
        return {
            "send": self.send,
            "stop": lambda _: self.stop(),
            "count": lambda _: self.count(),
            "counted": lambda _: {"came": self.came, "different": self.different},
        }

    def send(self, order: Message) -> Message:
        source, destination = order["source"], order["destination"]
        body = frames.udp(source, destination, 0, 0, MAGIC + bytes(4))
        packet = frames.ip(source, destination, frames.UDP, body[:6] + bytes(2) + body[8:])  # no checksum (RFC 768)
        self.frame = bytearray(frames.ethernet(order["source_mac"], order["destination_mac"], packet))
        now = time.monotonic()
        self.streams = [Stream(order["steady"], now), Stream(order["new"], now)]
        self._tick()
        return {}

    def _tick(self) -> None:
        if not self.streams:
            return
        steady, new = self.streams
        now = time.monotonic()
        for _ in range(steady.due(now)):
            self._one(steady, *STEADY_PORTS)
        for _ in range(new.due(now)):
            flow = new.sent
            self._one(new, NEW_FIRST + flow % SOURCE_PORTS, NEW_FIRST + flow // SOURCE_PORTS)
        self.loop.after(TICK_S, self._tick)

    def _one(self, stream: Stream, sport: int, dport: int) -> None:
        struct.pack_into("!HH", self.frame, UDP_AT, sport, dport)
        struct.pack_into("!I", self.frame, NUMBER_AT, self.number)
        self.out.send(self.frame)  # waits while the device's queue is full: nothing is dropped here
        self.number += 1
        stream.sent += 1

    def stop(self) -> Message:
        began = self.streams[1].sent if self.streams else 0
        self.streams = []
        return {"sent": self.number, "new": began}

    def count(self) -> Message:
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        tap.setblocking(False)
        tap.bind((self.device, ALL))
        self.loop.watch(tap.fileno(), lambda: self._take(tap))
        return {}

    def _take(self, tap: socket.socket) -> None:
        for _ in range(256):
            try:
                frame, address = tap.recvfrom(128)
            except BlockingIOError:
                return
            if address[2] == OUTGOING or frame[NUMBER_AT - 4 : NUMBER_AT] != MAGIC:
                continue
            number = int.from_bytes(frame[NUMBER_AT : NUMBER_AT + 4], "big")
            self.came += 1
            bit = 1 << (number & 7)
            self.different += not self.seen[number >> 3] & bit
            self.seen[number >> 3] |= bit


def main(arguments: list[str]) -> int:
    device = json.loads(arguments[1])["device"]

    def operations(loop: Loop, _: list[Orders]) -> dict[str, Operation]:
        return Crowd(loop, device).operations()

    return serve(operations)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
