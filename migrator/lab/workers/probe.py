# SPDX-License-Identifier: GPL-2.0-only
"""Worker: numbered datagrams, one way or with answers; what was lost, doubled or overtaken.

    echo {address, port}                                    answer every datagram
    receive {address, port}                                 count what comes, by flow
    send {flow, address, port, every_ms, protocol}          numbers to an address; protocol "udp" (default) or "icmp"
    stop {flow}                                             no more; how many were sent
    sending {flow}                                          how many were sent so far
    report {below}                                          of all flows received (or answered), up to a number
    timeline {flow}                                         when each number was sent, which have no answer
    silence {flow}                                          the longest since last asked: ms, and when it ended

A number is answered when its answer is seen; the network between is all that can lose it: sockets are large.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders
from migrator.lab.workers import serve
from migrator.lab.workers.frames import checksum
from migrator.lab.workers.tcp import family

FORMAT = struct.Struct("!4sIQ")  # magic, flow, number
MAGIC = b"mgNB"
BUFFER = 32 << 20
LATE_S = 0.1  # more than that of a schedule is not caught up with
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32


@dataclass
class Arrivals:
    """What came of one flow. `seen` has a byte for each number."""

    seen: bytearray = field(default_factory=bytearray)
    newest: int = -1
    doubled: int = 0
    overtaken: int = 0
    last: float = 0.0  # time.monotonic() of the newest arrival
    silence: tuple[float, float] = (0.0, 0.0)  # seconds without any, and time.time() when that ended

    def note(self, number: int) -> None:
        now = time.monotonic()
        if self.last and now - self.last > self.silence[0]:
            self.silence = (now - self.last, time.time())
        self.last = now
        if number >= len(self.seen):
            self.seen.extend(bytes(max(1024, number + 1 - len(self.seen))))
        self.doubled += self.seen[number]
        self.overtaken += number < self.newest and not self.seen[number]
        self.seen[number] = 1
        self.newest = max(self.newest, number)

    def report(self, below: int | None = None) -> Message:
        newest = self.newest if below is None else min(self.newest, below - 1)
        missing = [n for n in range(newest + 1) if not self.seen[n]]
        return {
            "received": newest + 1 - len(missing),
            "newest": newest,
            "missing": missing[:200],
            "missing_count": len(missing),
            "doubled": self.doubled,
            "overtaken": self.overtaken,
        }


@dataclass
class Sender:
    socket: socket.socket
    to: tuple[str, int]
    every_s: float
    protocol: str
    sent: int = 0
    failed: int = 0
    next: float = 0.0
    running: bool = True
    times: list[float] = field(default_factory=list)


class Probe:
    def __init__(self, loop: Loop, _: list[Orders]) -> None:
        self.loop = loop
        self.flows: dict[int, Arrivals] = {}
        self.senders: dict[int, Sender] = {}
        self.sockets: list[socket.socket] = []

    def operations(self) -> dict[str, Operation]:
        return {
            "echo": self.echo,
            "receive": self.receive,
            "send": self.send,
            "stop": self.stop,
            "sending": lambda order: {"sent": self.senders[order["flow"]].sent},
            "report": self.report,
            "timeline": self.timeline,
            "silence": self.silence,
        }

    def echo(self, order: Message) -> Message:
        bound = self._bound(order)
        self.loop.watch(bound.fileno(), lambda: self._echo(bound))
        return {}

    def receive(self, order: Message) -> Message:
        bound = self._bound(order)
        self.loop.watch(bound.fileno(), lambda: self._receive(bound, 0))
        return {}

    def send(self, order: Message) -> Message:
        protocol = order.get("protocol", "udp")
        sender = Sender(
            self._socket(order["address"], protocol),
            (order["address"], order.get("port", 0)),
            order["every_ms"] / 1e3,
            protocol,
            next=time.monotonic(),
        )
        if "source_port" in order:
            sender.socket.bind(("::" if ":" in order["address"] else "0.0.0.0", order["source_port"]))
        self.senders[order["flow"]] = sender
        skip = 0 if protocol == "udp" else 8 if ":" in order["address"] else 28  # ICMP and, for IPv4, IP header
        self.loop.watch(sender.socket.fileno(), lambda: self._receive(sender.socket, skip))
        self._tick(order["flow"], sender)
        return {}

    def stop(self, order: Message) -> Message:
        sender = self.senders[order["flow"]]
        sender.running = False
        return {"sent": sender.sent, "failed": sender.failed}

    def report(self, order: Message) -> Message:
        return {"flows": {str(flow): arrivals.report(order.get("below")) for flow, arrivals in self.flows.items()}}

    def timeline(self, order: Message) -> Message:
        sender, arrivals = self.senders[order["flow"]], self.flows.get(order["flow"], Arrivals())
        missing = [n for n in range(sender.sent) if n >= len(arrivals.seen) or not arrivals.seen[n]]
        return {"sent": sender.times, "missing": missing}

    def silence(self, order: Message) -> Message:
        arrivals = self.flows[order["flow"]]
        (seconds, ended), arrivals.silence = arrivals.silence, (0.0, 0.0)
        return {"ms": seconds * 1e3, "ended": ended}

    def _tick(self, flow: int, sender: Sender) -> None:
        """Numbers on a fixed schedule: a late tick sends what is due, but no more than of a moment.

        After a second without the CPU it would be more than a device's backlog takes, and orders would wait for it.
        """
        now = time.monotonic()
        sender.next = max(sender.next, now - LATE_S)
        while sender.running and sender.next <= now:
            try:
                sender.socket.sendto(self._datagram(flow, sender), sender.to)
            except OSError:
                sender.failed += 1
            sender.times.append(now)
            sender.sent += 1
            sender.next += sender.every_s
        if sender.running:
            self.loop.at(sender.next, lambda: self._tick(flow, sender))

    def _datagram(self, flow: int, sender: Sender) -> bytes:
        body = FORMAT.pack(MAGIC, flow, sender.sent)
        if sender.protocol == "udp":
            return body
        six = ":" in sender.to[0]
        head = struct.pack("!BBHHH", 128 if six else 8, 0, 0, (os.getpid() + flow) & 0xFFFF, sender.sent & 0xFFFF)
        return head[:2] + (b"\0\0" if six else struct.pack("!H", checksum(head + body))) + head[4:] + body

    def _receive(self, bound: socket.socket, skip: int) -> None:
        for _ in range(64):
            try:
                data = bound.recv(2048)
            except OSError:  # nothing more, or an ICMP error that tells of an earlier one
                return
            if len(data) < skip + FORMAT.size or (skip and data[skip - 8] not in (0, 129)):
                continue
            magic, flow, number = FORMAT.unpack_from(data, skip)
            if magic == MAGIC:
                self.flows.setdefault(flow, Arrivals()).note(number)

    def _echo(self, bound: socket.socket) -> None:
        for _ in range(64):
            try:
                data, sender = bound.recvfrom(2048)
                bound.sendto(data, sender)
            except OSError:
                return

    def _bound(self, order: Message) -> socket.socket:
        bound = self._socket(order["address"], "udp")
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((order["address"], order["port"]))
        return bound

    def _socket(self, address: str, protocol: str) -> socket.socket:
        kind, number = (
            (socket.SOCK_DGRAM, 0)
            if protocol == "udp"
            else (socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if ":" in address else socket.IPPROTO_ICMP)
        )
        made = socket.socket(family(address), kind, number)
        made.setblocking(False)
        for buffer in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
            made.setsockopt(socket.SOL_SOCKET, buffer, BUFFER)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.sockets.append(made)
        return made


if __name__ == "__main__":
    sys.exit(serve(lambda loop, orders: Probe(loop, orders).operations(), niceness=-5))
