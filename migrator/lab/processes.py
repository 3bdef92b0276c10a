# SPDX-License-Identifier: GPL-2.0-only
"""Processes of a lab: daemons with a log file, and workers that answer JSON lines on their standard input."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from migrator.lab import netns
from migrator.lab.errors import LabError, WorkerFailed

PATIENT_S = 60.0
"""For what need only happen at all: a loaded machine takes many times as long as one that is not."""


class Daemon:
    """A long-running process in a namespace, its output in a file."""

    def __init__(self, name: str, namespace: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.namespace = namespace
        self.command = list(command)
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                netns.inside(self.namespace, self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, timeout_s: float = 10.0) -> int | None:
        """Ask it to end, insist after `timeout_s`; its exit status, None when it never ran."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


class Worker:
    """A process of `migrator.lab.workers` or a vNIC: one JSON line asks, one answers, end of input ends it."""

    def __init__(self, name: str, namespace: str, module: str, arguments: Any, log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                netns.inside(namespace, [sys.executable, "-m", module, json.dumps(arguments)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._buffer = b""

    def call(self, op: str, *, timeout_s: float = PATIENT_S, **arguments: Any) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self.ask(op, **arguments)
        return self.answer(op, timeout_s)

    def ask(self, op: str, **arguments: Any) -> None:
        """Ask without waiting; `answer` fetches what it says, in the order asked."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"{self.name} is gone: {self.tail()}") from None

    def answer(self, what: str, timeout_s: float = PATIENT_S) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerFailed(f"{self.name}: no answer to {what} within {timeout_s} s: {self.tail()}")
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            if not data:
                raise WorkerFailed(f"{self.name} ended during {what}: {self.tail()}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(f"{self.name}: {what}: {reply['error']}")
        return reply

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.close()

    def dismiss(self) -> None:
        """Tell it to end, and do not wait: several end at once, though the kernel takes its time with their sockets."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self, timeout_s: float = 5.0) -> None:
        """End it and let go of its pipes."""
        assert self.process.stdout is not None
        self.dismiss()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout_s)
        self.process.stdout.close()

    def tail(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_text(errors="replace")[-2000:]
        return ""


def wait_until(
    what: str,
    condition: Callable[[], Any],
    timeout_s: float = PATIENT_S,
    interval_s: float = 0.02,
    explain: Callable[[], Any] | None = None,
) -> Any:
    """Poll until `condition()` is true and return it; after the deadline LabError, with what `explain()` says."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {timeout_s} s" + (f": {explain()}" if explain else ""))
        time.sleep(interval_s)
