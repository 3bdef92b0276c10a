# SPDX-License-Identifier: GPL-2.0-only
"""The agent's libvirt driver in a process of its own, as in an agent: orders and answers as JSON lines.

    python -m tests.libvirt.driven '{"uri": "qemu+unix:///system?socket=…"}'

A test's own process follows libvirt by another event loop, and libvirt takes only one a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import structlog

from datapath.errors import Error
from migrator.agent.libvirt.guests import LibvirtGuests
from migrator.agent.switchover import MEMORY_POLL_S
from migrator.errors import error_name
from migrator.lab.processes import PATIENT_S, wait_until

Words = list[dict[str, Any]]


class Driven:
    """The other side of the lines. `events` are GuestEvents, `happenings` DomainEvents, as dictionaries."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: Words = []
        self.happenings: Words = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            with self._news:
                if "id" in message:
                    self._answers[message["id"]] = message
                else:
                    {"event": self.events, "happening": self.happenings}[message.pop("sort")].append(message)
                self._news.notify_all()

    def ask(self, op: str, **arguments: Any) -> int:
        assert self.process.stdin is not None
        self._number += 1
        self.process.stdin.write(json.dumps({"id": self._number, "op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._number

    def answer(self, number: int, timeout_s: float = PATIENT_S) -> Any:
        """What the driver returned. Raises AssertionError for what it raised."""
        with self._news:
            assert self._news.wait_for(lambda: number in self._answers, timeout_s), "the driver does not answer"
            answer = self._answers.pop(number)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def call(self, op: str, **arguments: Any) -> Any:
        return self.answer(self.ask(op, **arguments))

    def refusal(self, op: str, **arguments: Any) -> str:
        """Why the driver refuses it."""
        number = self.ask(op, **arguments)
        with self._news:
            assert self._news.wait_for(lambda: number in self._answers, PATIENT_S), "the driver does not answer"
            return str(self._answers.pop(number).get("error", ""))

    def words(self, vm: str) -> list[tuple[str, bool, str]]:
        """What was told of a VM: what, moving, reason."""
        return [(e["what"], e["moving"], e["reason"]) for e in list(self.events) if e["vm"] == vm]

    def until(self, what: str, found: Callable[[], Any], timeout_s: float = PATIENT_S) -> Any:
        return wait_until(what, found, timeout_s, explain=lambda: json.dumps(self.events[-10:]))


@contextlib.contextmanager
def driven(options: Mapping[str, Any]) -> Iterator[Driven]:
    """A driver that is started; it has ended afterwards."""
    command = [sys.executable, "-m", __name__, json.dumps(dict(options))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            made = Driven(process)
            made.until("the driver has started", lambda: made.happenings or process.poll() is not None)
            yield made
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def _obey(guests: LibvirtGuests, order: dict[str, Any]) -> None:
    number, op = order.pop("id"), order.pop("op")
    try:
        if op == "state":
            value: Any = guests.state(order["vm"])
        elif op == "speaks":
            value = guests.speaks
        elif op == "lead":
            value = await _lead(guests, order["vm"])
        else:
            value = await getattr(guests, op)(**order)
    except Error as error:
        return _say({"id": number, "error": f"{error_name(error)}: {error}", "hint": error.hint})
    _say({"id": number, "value": asdict(value) if op == "remaining" else value})
    return None


async def _lead(guests: LibvirtGuests, vm: str) -> None:
    """As the source of a migration does."""
    while not (await guests.remaining(vm, 1)).converged:
        await asyncio.sleep(MEMORY_POLL_S)
    await guests.suspend(vm)


async def _main(options: Mapping[str, Any]) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    guests = LibvirtGuests(options)
    guests.domains.listen(lambda event: _say({"sort": "happening", **asdict(event)}))
    await guests.start(lambda event: _say({"sort": "event", **asdict(event)}))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    orders = set()
    while line := await reader.readline():
        orders.add(asyncio.create_task(_obey(guests, json.loads(line))))
    await guests.stop()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
