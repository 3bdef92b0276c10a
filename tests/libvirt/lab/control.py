# SPDX-License-Identifier: GPL-2.0-only
"""Orders to guestd over the guest's second serial port, and a worker's face on them.

The port is a unix socket on whichever host runs the guest. An order that a move came across is asked again at the
other host: guestd obeys each id once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrator.lab.errors import WorkerFailed
from migrator.lab.processes import PATIENT_S

Answer = dict[str, Any]
REPEAT_S = 1.0  # a line that came while nobody read the port is lost
POLL_S = 0.02


class Control:
    """One guest's serial port. `find()` is the path of its socket where the guest runs now, None while nowhere."""

    def __init__(self, name: str, find: Callable[[], Path | None]) -> None:
        self.name = name
        self.find = find
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._buffer = b""

    def call(self, op: str, *, timeout_s: float = PATIENT_S, **arguments: Any) -> Answer:
        """One order and its answer. Raises WorkerFailed."""
        with self._lock:
            answer = self._call(op, time.monotonic() + timeout_s, arguments)
        if answer is None:
            raise WorkerFailed(f"{self.name}: the guest did not answer {op} within {timeout_s} s")
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {op}: {answer['error']}")
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._buffer = None, b""

    def _call(self, op: str, deadline: float, arguments: dict[str, Any]) -> Answer | None:
        number = str(next(self._ids))
        words = " ".join([number, op, *(f"{key}={value}" for key, value in arguments.items())])
        while time.monotonic() < deadline:
            try:
                if self._connected():
                    answer = self._exchange(number, words.encode() + b"\n", deadline)
                    if answer is not None:
                        return answer
                else:
                    select.select([], [], [], POLL_S)
            except OSError:  # the QEMU that had the port has ended
                self.close()
        return None

    def _connected(self) -> bool:
        path = self.find() if self._socket is None else None
        if path is not None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(path))
        return self._socket is not None

    def _exchange(self, number: str, line: bytes, deadline: float) -> Answer | None:
        """Send an order, wait a while for its answer; None: it has to be repeated."""
        assert self._socket is not None
        self._socket.sendall(line)
        until = min(deadline, time.monotonic() + REPEAT_S)
        while True:
            while b"\n" in self._buffer:
                text, self._buffer = self._buffer.split(b"\n", 1)
                answer = _parse(text)
                if answer is not None and answer.pop("id", "") == number:
                    return answer
            ready, _, _ = select.select([self._socket], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                if self._stale():
                    self.close()
                return None
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError
            self._buffer += data

    def _stale(self) -> bool:
        """The guest runs elsewhere by now, while the old QEMU still holds the port."""
        assert self._socket is not None
        path = self.find()
        return path is not None and str(path) != self._socket.getpeername()


def _parse(text: bytes) -> Answer | None:
    """An answer; None for the rest of one that a move cut."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        return found if isinstance(found, dict) else None
    return None


class GuestWorker:
    """The orders of `migrator.lab.workers` tcp and probe, obeyed inside the guest. All workers of a guest are one."""

    def __init__(self, control: Control, module: str, name: str) -> None:
        self.control = control
        self.module = module
        self.name = name
        self._asked: list[tuple[str, dict[str, Any]]] = []

    def call(self, op: str, *, timeout_s: float = PATIENT_S, **arguments: Any) -> Answer:
        self.ask(op, **arguments)
        return self.answer(op, timeout_s)

    def ask(self, op: str, **arguments: Any) -> None:
        if op == "check":
            self.control.call("ask", size=arguments.get("size", 64))
        self._asked.append((op, arguments))

    def answer(self, what: str, timeout_s: float = PATIENT_S) -> Answer:
        op, arguments = self._asked.pop(0)
        assert op == what, f"{what} was not asked before {op}"
        patience = float(arguments.pop("timeout_s", timeout_s))
        if op == "check":
            return self._until(lambda: self.control.call("verdict"), lambda a: bool(a["over"]), patience)
        if op == "connect":
            return self._connect(arguments, patience)
        name = "udp_echo" if (self.module, op) == ("probe", "echo") else op
        return self.control.call(name, timeout_s=timeout_s, **{k: v for k, v in arguments.items() if v is not None})

    def close(self) -> None:
        """Nothing: guestd ends with its guest."""

    def _connect(self, arguments: dict[str, Any], patience: float) -> Answer:
        before = self.control.call("status")
        self.control.call("connect", **arguments)
        status = self._until(
            lambda: self.control.call("status"), lambda a: a["connected"] + a["failed"] == a["total"], patience
        )
        connected = status["connected"] - before["connected"]
        return {"connected": connected, "failed": int(arguments["count"]) - connected}

    @staticmethod
    def _until(ask: Callable[[], Answer], over: Callable[[Answer], bool], patience: float) -> Answer:
        end = time.monotonic() + patience
        answer = ask()
        while not over(answer) and time.monotonic() < end:
            select.select([], [], [], POLL_S)
            answer = ask()
        return answer
