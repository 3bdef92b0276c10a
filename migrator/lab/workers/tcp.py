# SPDX-License-Identifier: GPL-2.0-only
"""Worker: many TCP connections that carry predictable bytes to an echo server and compare what comes back.

listen {address, port}                        serve echoes
connect {address, port, count, timeout_s}     open connections; answers when all are or time is over
flow {every_ms, size}                         each connection sends so much so often, when its last echo is back
check {size, timeout_s}                       one message on each; answers how many came back whole
status                                        alive, lost, bytes verified, seconds since each last echo (the oldest)
close                                         all of them, in order
"""

from __future__ import annotations

import errno
import select
import socket
import sys
import time
from dataclasses import dataclass

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders, later
from migrator.lab.workers import pattern, serve

READ = select.EPOLLIN
BOTH = select.EPOLLIN | select.EPOLLOUT


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@dataclass
class Stream:
    """One connection of a client: what it sent, and how far the echo agreed."""

    number: int
    socket: socket.socket
    connected: bool = False
    dead: str = ""
    sent: int = 0
    wanted: int = 0
    verified: int = 0
    asked: float = 0.0  # when it was last told to send

    def push(self) -> None:
        """Send what is wanted, as far as the socket takes it."""
        while self.sent < self.wanted:
            part = pattern.expected(self.number, self.sent, min(self.wanted - self.sent, 1 << 16))
            try:
                self.sent += self.socket.send(part)
            except BlockingIOError:
                return
            except OSError as error:
                self.dead = str(error)
                return

    def pull(self) -> None:
        """Compare what came back, byte for byte."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self.dead = str(error)
            return
        if not data:
            self.dead = "closed by the other side"
        elif data != pattern.expected(self.number, self.verified, len(data)):
            self.dead = f"wrong bytes after {self.verified}"
        else:
            self.verified += len(data)


class Tcp:
    """Server and client in one; the loop calls, orders come in."""

    def __init__(self, loop: Loop, orders: list[Orders]) -> None:
        self.loop = loop
        self.orders = orders
        self.listeners: list[socket.socket] = []
        self.echoing: dict[int, tuple[socket.socket, bytearray]] = {}
        self.streams: list[Stream] = []
        self.flow_s = 0.0
        self.flow_size = 0
        self.goals: list[tuple[Stream, int]] = []

    def operations(self) -> dict[str, Operation]:
        return {
            "listen": self.listen,
            "connect": self.connect,
            "flow": self.flow,
            "check": self.check,
            "ask": self.ask,
            "verdict": lambda _: self._verdict(self.goals),
            "status": lambda _: self.status(),
            "close": self.close,
        }

    # ---- server ----

    def listen(self, order: Message) -> Message:
        listener = socket.socket(family(order["address"]), socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setblocking(False)
        listener.bind((order["address"], order["port"]))
        listener.listen(4096)
        self.listeners.append(listener)
        self.loop.watch(listener.fileno(), lambda: self._accept(listener))
        return {}

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # reset before it was taken
            return
        client.setblocking(False)
        self.echoing[client.fileno()] = (client, bytearray())
        self.loop.watch(client.fileno(), lambda: self._echo(client))

    def _echo(self, client: socket.socket) -> None:
        waiting = self.echoing[client.fileno()][1]
        try:
            if len(waiting) < 1 << 20:
                data = client.recv(1 << 16)
                if not data:
                    return self._hang_up(client)
                waiting += data
        except BlockingIOError:
            pass
        except OSError:
            return self._hang_up(client)
        try:
            del waiting[: client.send(waiting)]
        except BlockingIOError:
            pass
        except OSError:
            return self._hang_up(client)
        self.loop.watch(client.fileno(), lambda: self._echo(client), BOTH if waiting else READ)
        return None

    def _hang_up(self, client: socket.socket) -> None:
        self.loop.forget(client.fileno())
        del self.echoing[client.fileno()]
        client.close()

    # ---- client ----

    def connect(self, order: Message) -> Message:
        first = len(self.streams)
        for number in range(first, first + order["count"]):
            client = socket.socket(family(order["address"]), socket.SOCK_STREAM)
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Stream(number, client)
            status = client.connect_ex((order["address"], order["port"]))
            if status not in (0, errno.EINPROGRESS):
                stream.dead = errno.errorcode.get(status, str(status))
            self.streams.append(stream)
            self.loop.watch(client.fileno(), lambda s=stream: self._serve(s), BOTH)  # type: ignore[misc]
        new = self.streams[first:]
        self._answer_when(
            lambda: all(s.connected or s.dead for s in new),
            order.get("timeout_s", 20),
            lambda: {"connected": sum(s.connected for s in new), "failed": sum(not s.connected for s in new)},
        )
        return later

    def _serve(self, stream: Stream) -> None:
        if not stream.connected:
            status = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            stream.connected = status == 0
            stream.dead = errno.errorcode.get(status, str(status)) if status else ""
        else:
            stream.pull()
            stream.push()
        if stream.dead:
            self.loop.forget(stream.socket.fileno())
        else:
            self.loop.watch(
                stream.socket.fileno(), lambda: self._serve(stream), BOTH if stream.sent < stream.wanted else READ
            )

    def flow(self, order: Message) -> Message:
        """A connection sends its next message only when the last is back: what is lost shows as silence."""
        beginning = not self.flow_s
        self.flow_s, self.flow_size = order["every_ms"] / 1e3, order["size"]
        if beginning and self.flow_s:
            self._flow_slice(0)
        return {}

    def _flow_slice(self, part: int) -> None:
        """A tenth of the connections every tenth of the interval: an even load."""
        if not self.flow_s:
            return
        for stream in self.streams[part::10]:
            if stream.connected and not stream.dead and stream.verified == stream.wanted:
                self._want(stream, self.flow_size)
        self.loop.after(self.flow_s / 10, lambda: self._flow_slice((part + 1) % 10))

    def ask(self, order: Message) -> Message:
        living = [stream for stream in self.streams if stream.connected]
        for stream in living:
            if not stream.dead:
                self._want(stream, order.get("size", 64))
        self.goals = [(stream, stream.wanted) for stream in living]
        return {}

    def check(self, order: Message) -> Message:
        self.ask(order)
        goals = self.goals
        self._answer_when(
            lambda: self._verdict(goals)["over"], order.get("timeout_s", 20), lambda: self._verdict(goals)
        )
        return later

    def _verdict(self, goals: list[tuple[Stream, int]]) -> Message:
        silent = [s for s, goal in goals if not s.dead and s.verified < goal]
        lost = [s for s, goal in goals if s.dead] + silent
        reasons = sorted({s.dead or "silent" for s in lost})
        return {
            "total": len(goals),
            "alive": len(goals) - len(lost),
            "lost": len(lost),
            "reasons": reasons[:5],
            "bytes": sum(s.verified for s, _ in goals),
            "over": not silent,
        }

    def status(self) -> Message:
        """`answering`: connections that have nothing under way, or have not waited for it for a second yet."""
        now = time.monotonic()
        alive = [s for s in self.streams if s.connected and not s.dead]
        return {
            "total": len(self.streams),
            "alive": len(alive),
            "serving": len(self.echoing),
            "answering": sum(s.verified == s.wanted or now - s.asked < 1.0 for s in alive),
            "bytes": sum(s.verified for s in self.streams),
        }

    def close(self, _: Message) -> Message:
        for stream in self.streams:
            self.loop.forget(stream.socket.fileno())
            stream.socket.close()
        self.streams.clear()
        return {}

    def _want(self, stream: Stream, size: int) -> None:
        stream.wanted += size
        stream.asked = time.monotonic()
        stream.push()
        if stream.sent < stream.wanted and not stream.dead:
            self.loop.watch(stream.socket.fileno(), lambda: self._serve(stream), BOTH)

    def _answer_when(self, condition, timeout_s: float, reply) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + timeout_s

        def look() -> None:
            if condition() or time.monotonic() > deadline:
                self.orders[0].answer(reply())
            else:
                self.loop.after(0.01, look)

        look()


if __name__ == "__main__":
    sys.exit(serve(lambda loop, orders: Tcp(loop, orders).operations()))
