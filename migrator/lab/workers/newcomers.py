# SPDX-License-Identifier: GPL-2.0-only
"""Worker: new TCP connections at a steady rate to an echo server, each followed by itself to its end.

begin {address, port, per_s}     connections from now on: SYN, a few bytes, the same bytes back, closed
status                           how many were begun, have succeeded and have failed
finish {limit_s}                 no more; when all have ended: how many were begun, [number, reason] of those that
                                 failed, seconds that the slowest took, the local port of each
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import time
from dataclasses import dataclass, field

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders, later
from migrator.lab.workers import serve
from migrator.lab.workers.tcp import family

BOTH = select.EPOLLIN | select.EPOLLOUT
TICK_S = 0.001
BURST = 50  # at most so many at once after a tick that came late


@dataclass
class Newcomer:
    """One connection on its way. `step`: what it waits for."""

    number: int
    socket: socket.socket
    began: float
    step: str = "no answer to its SYN"
    back: bytes = b""

    @property
    def data(self) -> bytes:
        return b"mgNC%08d" % self.number


@dataclass
class Crowd:
    address: str
    port: int
    per_s: float
    started: float = field(default_factory=time.monotonic)
    begun: int = 0
    done: int = 0
    slowest_s: float = 0.0
    failed: list[tuple[int, str]] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    open: dict[int, Newcomer] = field(default_factory=dict)  # descriptor -> connection
    coming: bool = True


class Newcomers:
    def __init__(self, loop: Loop, orders: list[Orders]) -> None:
        self.loop = loop
        self.orders = orders
        self.crowd: Crowd

    def operations(self) -> dict[str, Operation]:
        return {"begin": self.begin, "status": lambda _: self.status(), "finish": self.finish}

    def begin(self, order: Message) -> Message:
        self.crowd = Crowd(order["address"], order["port"], order["per_s"])
        self._tick()
        return {}

    def status(self) -> Message:
        return {"begun": self.crowd.begun, "done": self.crowd.done, "failed": len(self.crowd.failed)}

    def finish(self, order: Message) -> Message:
        self.crowd.coming = False
        self._wait_for_all(time.monotonic() + order["limit_s"])
        return later

    def _wait_for_all(self, deadline: float) -> None:
        if self.crowd.open and time.monotonic() < deadline:
            return self.loop.after(0.01, lambda: self._wait_for_all(deadline))
        for newcomer in list(self.crowd.open.values()):
            self._end(newcomer, newcomer.step)
        crowd = self.crowd
        return self.orders[0].answer(
            {
                "begun": crowd.begun,
                "done": crowd.done,
                "failed": crowd.failed,
                "slowest_s": crowd.slowest_s,
                "ports": crowd.ports,
            }
        )

    def _tick(self) -> None:
        crowd = self.crowd
        if not crowd.coming:
            return
        due = int((time.monotonic() - crowd.started) * crowd.per_s) + 1
        for _ in range(min(BURST, due - crowd.begun)):
            self._open(crowd)
        self.loop.after(TICK_S, self._tick)

    def _open(self, crowd: Crowd) -> None:
        made = socket.socket(family(crowd.address), socket.SOCK_STREAM)
        made.setblocking(False)
        newcomer = Newcomer(crowd.begun, made, time.monotonic())
        crowd.begun += 1
        crowd.open[made.fileno()] = newcomer
        status = made.connect_ex((crowd.address, crowd.port))
        crowd.ports.append(made.getsockname()[1])
        self.loop.watch(made.fileno(), lambda: self._connected(newcomer), BOTH)
        if status not in (0, errno.EINPROGRESS):
            self._end(newcomer, os.strerror(status))

    def _connected(self, newcomer: Newcomer) -> None:
        status = newcomer.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            return self._end(newcomer, os.strerror(status))
        newcomer.step = "no echo"
        newcomer.socket.send(newcomer.data)
        return self.loop.watch(newcomer.socket.fileno(), lambda: self._echoed(newcomer))

    def _echoed(self, newcomer: Newcomer) -> None:
        try:
            data = newcomer.socket.recv(64)
        except OSError as error:
            return self._end(newcomer, str(error))
        newcomer.back += data
        if newcomer.back == newcomer.data:
            return self._end(newcomer)
        if not data or not newcomer.data.startswith(newcomer.back):
            return self._end(newcomer, f"wrong echo {newcomer.back!r}")
        return None

    def _end(self, newcomer: Newcomer, reason: str = "") -> None:
        crowd = self.crowd
        descriptor = newcomer.socket.fileno()
        self.loop.forget(descriptor)
        del crowd.open[descriptor]
        newcomer.socket.close()
        crowd.slowest_s = max(crowd.slowest_s, time.monotonic() - newcomer.began)
        if reason:
            crowd.failed.append((newcomer.number, reason))
        else:
            crowd.done += 1


if __name__ == "__main__":
    sys.exit(serve(lambda loop, orders: Newcomers(loop, orders).operations()))
