# SPDX-License-Identifier: GPL-2.0-only
"""System calls of a running daemon, as strace(1) sees them."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrator.lab.processes import Daemon, wait_until

LINE = re.compile(r"^(?P<thread>\d+) +(?P<at>\d+\.\d+) (?P<name>\w+)\((?P<arguments>.*)$", re.MULTILINE)
SHOWN = 200  # bytes of what is read and written


@dataclass(frozen=True)
class Call:
    """One system call when it was made. `at`: seconds since the epoch; `arguments` as strace prints them."""

    thread: int
    at: float
    name: str
    arguments: str

    def __str__(self) -> str:
        return f"{self.thread} {self.at:.6f} {self.name}({self.arguments[:120]}"


@contextlib.contextmanager
def traced(daemon: Daemon, output: Path) -> Iterator[None]:
    """Trace all threads of a daemon, and those that it starts, until the end of the block."""
    errors = output.with_suffix(".errors")
    command = ["strace", "-f", "-ttt", "-yy", "-s", str(SHOWN), "-o", str(output), "-p", str(daemon.pid)]
    with errors.open("wb") as stderr:
        tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        wait_until("strace is attached", lambda: _attached(tracer, errors))
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)


def _attached(tracer: subprocess.Popen[bytes], errors: Path) -> bool:
    assert tracer.poll() is None, errors.read_text()
    return " attached" in errors.read_text()


def calls(output: Path) -> list[Call]:
    """What was called, in order."""
    return [
        Call(int(m["thread"]), float(m["at"]), m["name"], m["arguments"]) for m in LINE.finditer(output.read_text())
    ]
