"""Worker of the switchover's benchmark: numbered datagrams at a steady rate, of one flow and of ever new ones, and
which of them arrive. One process in one namespace, told what to do by JSON lines (`migrator.lab.workers`).

    send {source_mac, destination_mac, source, destination, steady, new}
                       from now on, a second: `steady` datagrams of one flow, and `new` ones that each begin a flow
    stop               no more: how many were sent
    when {numbers}     when each was sent, in seconds of CLOCK_MONOTONIC, to a tick
    count              begin to count what comes in
    counted            how many came, how many different ones, and how many the counter itself had no room for
    missing {sent}     which of so many have not come: the first and the last of each run of them
"""

from __future__ import annotations

import bisect
import json
import math
import socket
import struct
import sys
import time
from dataclasses import dataclass

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders
from migrator.lab.workers import frames, serve
from migrator.lab.workers.raw import ALL, SO_RCVBUFFORCE

MAGIC = b"mgBN"
STEADY_PORTS = (19_999, 9_999)
NEW_FIRST, SOURCE_PORTS = 20_000, 40_000
UDP_AT, NUMBER_AT = 34, 46  # in the frame
TICK_S = 0.001
NUMBERS_MAX = 1 << 24
BUFFER = 64 << 20
SOL_PACKET, PACKET_STATISTICS, PACKET_IGNORE_OUTGOING = 263, 6, 23  # linux/if_packet.h


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
        self.ticks: list[tuple[int, float]] = []  # the first number of each, and when it began
        self.tap: socket.socket | None = None
        self.seen = bytearray(NUMBERS_MAX >> 3)
        self.came = self.different = self.no_room = 0

    def operations(self) -> dict[str, Operation]:
        return {
            "send": self.send,
            "stop": lambda _: self.stop(),
            "count": lambda _: self.count(),
            "when": self.when,
            "counted": lambda _: self.counted(),
            "missing": self.missing,
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
        self.ticks.append((self.number, now))
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
        self.streams = []
        return {"sent": self.number}

    def when(self, order: Message) -> Message:
        return {"times": [self.ticks[bisect.bisect(self.ticks, (n, math.inf)) - 1][1] for n in order["numbers"]]}

    def count(self) -> Message:
        self.tap = tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        tap.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        tap.setblocking(False)
        tap.bind((self.device, ALL))
        self.loop.watch(tap.fileno(), lambda: self._take(tap))
        return {}

    def counted(self) -> Message:
        if self.tap is not None:  # the kernel begins anew each time it is asked
            self.no_room += struct.unpack("II", self.tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]
        return {"came": self.came, "different": self.different, "no_room": self.no_room}

    def missing(self, order: Message) -> Message:
        gone = (n for n in range(order["sent"]) if not self.seen[n >> 3] & 1 << (n & 7))
        runs: list[list[int]] = []
        for number in gone:
            if runs and runs[-1][1] == number - 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        return {"runs": runs}

    def _take(self, tap: socket.socket) -> None:
        for _ in range(256):
            try:
                frame = tap.recv(128)
            except BlockingIOError:
                return
            if frame[NUMBER_AT - 4 : NUMBER_AT] != MAGIC:
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
