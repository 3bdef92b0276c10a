# SPDX-License-Identifier: GPL-2.0-only
"""One epoll loop of descriptors, timers and orders on standard input: the frame of the vNIC and of every worker."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from datapath.errors import Error
from migrator.lab.lines import LineReader, Message

Operation = Callable[[Message], Message]


class Loop:
    """Level-triggered epoll with timers. Handlers are called with nothing and must not block."""

    def __init__(self) -> None:
        self.ended = False
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[int, Callable[[], None]]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def watch(self, descriptor: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Call `handler` while the descriptor is ready; again with other events or handler replaces."""
        before = self._handlers.get(descriptor)
        if before is None:
            self._epoll.register(descriptor, events)
        elif before[0] != events:
            self._epoll.modify(descriptor, events)
        self._handlers[descriptor] = (events, handler)

    def forget(self, descriptor: int) -> None:
        """Stop watching; before the descriptor is closed."""
        if self._handlers.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` once, later."""
        self.at(time.monotonic() + seconds, action)

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Call `action` once, at a time of CLOCK_MONOTONIC."""
        heapq.heappush(self._timers, (when, next(self._order), action))

    def run(self) -> None:
        """Until `ended`."""
        while not self.ended:
            for descriptor, _ in self._epoll.poll(self._timeout()):
                handler = self._handlers.get(descriptor)
                if handler:
                    handler[1]()
            now = time.monotonic()  # a timer that sets another one must not keep descriptors waiting
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()

    def _timeout(self) -> float:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else 1.0


class Orders:
    """JSON lines on standard input, each answered by one on standard output. The end of the input ends the loop."""

    def __init__(self, loop: Loop, operations: Mapping[str, Operation]) -> None:
        self.loop = loop
        self.operations = operations
        self.reader = LineReader(0)
        os.set_blocking(0, False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the lab's keyboard is not for its workers
        loop.watch(0, self._read)

    def answer(self, reply: Message) -> None:
        """Write an answer; an operation that returned `later` owes one."""
        data = memoryview(json.dumps(reply).encode() + b"\n")
        while data:
            data = data[os.write(1, data) :]

    def _read(self) -> None:
        for order in self.reader.read():
            reply = self._obey(order)
            if reply is not later:
                self.answer(reply)
        self.loop.ended = self.loop.ended or self.reader.ended

    def _obey(self, order: Message) -> Message:
        try:
            return self.operations[order.pop("op")](order)
        except (KeyError, TypeError, ValueError, OSError, Error) as error:
            return {"error": f"{type(error).__name__}: {error}"}


later: dict[str, Any] = {}  # returned by an operation that answers when it is done
