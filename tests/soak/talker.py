# SPDX-License-Identifier: GPL-2.0-only
"""Worker of the soak, one in each machine: it serves, keeps connections open, sends numbers, and tries newcomers.

serve {tcp, echo, numbers}                       listen on these ports: TCP and UDP echo, numbered datagrams
open {group, address, port, count, timeout_s}    connections; their own ports, of those that came about
ask {}                                           a message on each connection of each group
verdicts {}                                      by group and own port: "whole", "silent", or why it is dead
flow {group, every_ms, size}                     messages by themselves
drop {group}                                     reset and forget the connections of a group
send, stop, sending                              numbers: see migrator.lab.workers.probe
window {flow, first, below}                      numbers of first..below that did not come; doubled, overtaken so far
try {tries}                                      newcomers [id, protocol, address, port, patience_s]: how each ended
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders, later
from migrator.lab.workers import serve
from migrator.lab.workers.newcomers import BOTH
from migrator.lab.workers.probe import Arrivals, Probe
from migrator.lab.workers.tcp import Tcp, family

AGAIN_S = 0.4  # a question by UDP is repeated so often
FIRST_ASKER, ASKERS = 21_000, 9_000  # source ports of questions, one after the other
GIVE_UP_MS = 60_000  # the serving end of a connection that was cut


@dataclass
class Newcomer:
    """A try under way: says its token and waits for it to come back."""

    name: int
    protocol: str
    socket: socket.socket
    deadline: float
    connected: bool = False
    back: bytes = b""
    outcome: str = ""

    @property
    def token(self) -> bytes:
        return b"soak%08d" % self.name


class Talker:
    def __init__(self, loop: Loop, orders: list[Orders]) -> None:
        self.loop, self.orders = loop, orders
        self.server = Tcp(loop, orders)
        self.probe = Probe(loop, orders)
        self.groups: dict[str, Tcp] = {}

    def operations(self) -> dict[str, Operation]:
        numbers = self.probe.operations()
        return {
            "serve": self.serve,
            "open": self.open,
            "ask": self.ask,
            "verdicts": lambda _: {name: _verdicts(tcp) for name, tcp in self.groups.items()},
            "flow": lambda order: self.groups[order["group"]].flow(order),
            "drop": self.drop,
            "window": self.window,
            "try": self.try_,
            **{name: numbers[name] for name in ("send", "stop", "sending")},
        }

    # ---- what stays ----

    def serve(self, order: Message) -> Message:
        for address in ("0.0.0.0", "::"):
            for port in order["tcp"]:
                self.server.listen({"address": address, "port": port})
                _impatient(self.server.listeners[-1])
            for port in order["echo"]:
                self.probe.echo({"address": address, "port": port})
        for port in order["numbers"]:
            self.probe.receive({"address": "0.0.0.0", "port": port})
        return {}

    def open(self, order: Message) -> Message:
        group = self.groups.setdefault(order["group"], Tcp(self.loop, self.orders))
        return group.connect(order)

    def ask(self, _: Message) -> Message:
        for tcp in self.groups.values():
            tcp.ask({"size": 200})
        return {}

    def drop(self, order: Message) -> Message:
        tcp = self.groups.pop(order["group"])
        tcp.flow_s = 0.0
        for stream in tcp.streams:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return tcp.close(order)

    def window(self, order: Message) -> Message:
        arrivals = self.probe.flows.get(order["flow"], Arrivals())
        first, below = order["first"], order["below"]
        seen = arrivals.seen[first:below]
        missing = [first + at for at, came in enumerate(seen.ljust(below - first, b"\0")) if not came]
        return {
            "missing": missing[:100],
            "count": len(missing),
            "newest": arrivals.newest,
            "doubled": arrivals.doubled,
            "overtaken": arrivals.overtaken,
        }

    # ---- newcomers ----

    def try_(self, order: Message) -> Message:
        tries = [self._begin(*item) for item in order["tries"]]
        self._wait(tries)
        return later

    def _wait(self, tries: list[Newcomer]) -> None:
        now = time.monotonic()
        for newcomer in tries:
            if not newcomer.outcome and now > newcomer.deadline:
                self._end(newcomer, "silent")
        if all(newcomer.outcome for newcomer in tries):
            self.orders[0].answer({str(newcomer.name): newcomer.outcome for newcomer in tries})
        else:
            self.loop.after(0.02, lambda: self._wait(tries))

    def _begin(self, name: int, protocol: str, address: str, port: int, patience_s: float) -> Newcomer:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        made = socket.socket(family(address), kind)
        made.setblocking(False)
        if protocol == "udp":  # a port that was used a moment ago would be of the same connection
            made.bind(("", FIRST_ASKER + name % ASKERS))
        newcomer = Newcomer(name, protocol, made, time.monotonic() + patience_s)
        status = made.connect_ex((address, port))
        if status not in (0, errno.EINPROGRESS):
            self._end(newcomer, os.strerror(status))
        elif protocol == "tcp":
            self.loop.watch(made.fileno(), lambda: self._connected(newcomer), BOTH)
        else:
            self.loop.watch(made.fileno(), lambda: self._answered(newcomer))
            self._say(newcomer)
        return newcomer

    def _say(self, newcomer: Newcomer) -> None:
        """And again, should it be a datagram."""
        if newcomer.outcome:
            return None
        try:
            newcomer.socket.send(newcomer.token)
        except OSError as error:
            return self._end(newcomer, str(error))
        if newcomer.protocol == "udp":
            self.loop.after(AGAIN_S, lambda: self._say(newcomer))
        return None

    def _connected(self, newcomer: Newcomer) -> None:
        status = newcomer.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            return self._end(newcomer, os.strerror(status))
        self.loop.watch(newcomer.socket.fileno(), lambda: self._answered(newcomer))
        return self._say(newcomer)

    def _answered(self, newcomer: Newcomer) -> None:
        try:
            data = newcomer.socket.recv(64)
        except OSError as error:
            return self._end(newcomer, str(error))
        newcomer.back += data
        if newcomer.back == newcomer.token:
            return self._end(newcomer, "answered")
        if not data or not newcomer.token.startswith(newcomer.back):
            return self._end(newcomer, f"wrong answer {newcomer.back!r}")
        return None

    def _end(self, newcomer: Newcomer, outcome: str) -> None:
        newcomer.outcome = outcome
        self.loop.forget(newcomer.socket.fileno())
        newcomer.socket.close()


def _verdicts(tcp: Tcp) -> Message:
    goals = {id(stream): goal for stream, goal in tcp.goals}
    return {
        str(stream.socket.getsockname()[1]): stream.dead
        or ("whole" if stream.verified >= goals.get(id(stream), 0) else "silent")
        for stream in tcp.streams
        if stream.connected
    }


def _impatient(listener: socket.socket) -> None:
    """What is taken from it ends by itself when nobody answers any more."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GIVE_UP_MS // 1000)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GIVE_UP_MS)


if __name__ == "__main__":
    sys.exit(serve(lambda loop, orders: Talker(loop, orders).operations(), niceness=-5))
