"""VMs that are processes with a unix socket each: `DIRECTORY/<vm uuid>.sock`, one JSON object a line.

The process greets with `{"event": "hello", "vm", "state", "nics"}`. Requests `suspend`, `migrate`, `remaining`,
`cancel` carry an `id` that the reply echoes; events are `paused`, `resumed`, `stopped`, `migration-failed` with a
`reason` and the `time` (CLOCK_MONOTONIC, seconds).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from migrator.agent.guests.word import BY_DEFAULT, GuestEvent, GuestFailed, MoveOptions, Remaining
from migrator.agent.side import AgentSide
from migrator.errors import ConfigInvalid
from migrator.lifecycle.machine import Guest, Role

_STATES = {"running": Guest.RUNNING, "paused": Guest.PAUSED}
_EVENTS = {"paused": "paused", "resumed": "running", "stopped": "gone", "migration-failed": "failed"}
_AFTER = {"paused": Guest.PAUSED, "running": Guest.RUNNING, "gone": Guest.GONE}
_MOVING = {"migrated", "failed", "cancelled"}
REPLY_S = 5.0
DOWNTIME_MS = 300  # wanted, where nobody says
SCAN_S = 0.1


class _Link:
    """One VM's socket."""

    def __init__(self, path: Path, on_event: Callable[[GuestEvent], None]) -> None:
        self.vm = path.stem
        self.state = Guest.GONE
        self._path = path
        self._on_event = on_event
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        """Read until the process closes the socket."""
        try:
            reader, self._writer = await asyncio.open_unix_connection(str(self._path))
            while line := await reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError):
            pass  # a process that is gone; its socket is looked for again
        finally:
            self._close()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" not in message:
            waiting = self._waiting.pop(int(message.get("id") or 0), None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
            return
        if message["event"] == "hello":
            self.state = _STATES.get(str(message.get("state")), Guest.GONE)
            return
        what = _EVENTS.get(str(message["event"]))
        if what is None:
            return
        self.state = _AFTER.get(what, self.state)
        reason = str(message.get("reason", ""))
        when = float(message.get("time", 0.0))
        self._on_event(GuestEvent(self.vm, what, moving=reason in _MOVING, reason=reason, time=when))

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        if self._writer is None:
            raise GuestFailed(f"VM {self.vm}: its process does not answer", hint=f"is {self._path} served?")
        number = next(self._numbers)
        waiting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self._writer.write(json.dumps({"id": number, "op": op, **arguments}).encode() + b"\n")
            reply = await asyncio.wait_for(waiting, REPLY_S)
        except (OSError, TimeoutError) as error:
            raise GuestFailed(f"VM {self.vm}: {op} was not answered in {REPLY_S:.0f} s") from error
        finally:
            self._waiting.pop(number, None)
        if reply.get("error"):
            raise GuestFailed(f"VM {self.vm}: {op}: {reply['error']}")
        return reply

    def _close(self) -> None:
        self.state = Guest.GONE
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result({"error": "the process closed its socket"})


class ProcessGuests:
    """Implements GuestDriver. Option `directory`: where the sockets appear."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        if "directory" not in options:
            raise ConfigInvalid("guests.directory is missing", hint="the directory of the VMs' sockets")
        self._directory = Path(str(options["directory"]))
        self._links: dict[str, tuple[_Link, asyncio.Task[None]]] = {}
        self._scanner: asyncio.Task[None] | None = None
        self._on_event: Callable[[GuestEvent], None] = lambda _: None

    async def start(self, on_event: Callable[[GuestEvent], None]) -> None:
        self._on_event = on_event
        self._look()
        self._scanner = asyncio.create_task(self._scan())
        await self._greeted()

    async def _greeted(self) -> None:
        """Wait a moment for the greetings of those who are there: their states decide what a restarted agent does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while any(link.state is Guest.GONE and not task.done() for link, task in self._links.values()):
                    await asyncio.sleep(0.005)

    async def _scan(self) -> None:
        while True:
            await asyncio.sleep(SCAN_S)
            self._look()

    def _look(self) -> None:
        """Connect to sockets that are new, or whose process is."""
        for vm in [vm for vm, (_, task) in self._links.items() if task.done()]:
            del self._links[vm]
        for path in self._directory.glob("*.sock"):
            if path.stem not in self._links:
                link = _Link(path, self._on_event)
                self._links[link.vm] = (link, asyncio.create_task(link.run()))

    async def attach(self, side: AgentSide) -> None:
        del side  # has nothing to ask

    async def stop(self) -> None:
        tasks = [task for _, task in self._links.values()]
        if self._scanner is not None:
            tasks.append(self._scanner)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._links.clear()

    @property
    def speaks(self) -> bool:
        return self._directory.is_dir()

    def state(self, vm: str) -> Guest | None:
        return self._links[vm][0].state if vm in self._links else None

    def states(self) -> Mapping[str, Guest]:
        return {vm: link.state for vm, (link, _) in self._links.items() if link.state is not Guest.GONE}

    def _link(self, vm: str) -> _Link:
        if vm not in self._links:
            raise GuestFailed(f"VM {vm} has no process here", hint=f"expected its socket in {self._directory}")
        return self._links[vm][0]

    async def migrate(self, vm: str, to: str, options: MoveOptions = BY_DEFAULT) -> None:
        del options  # a process moves in one way
        await self._link(vm).ask("migrate", to=to)

    async def leaving(self, vm: str) -> bool:
        del vm  # it has no word for it
        return True

    async def accompany(self, vm: str) -> None:
        del vm

    async def remaining(self, vm: str, downtime_ms: int) -> Remaining:
        reply = await self._link(vm).ask("remaining", downtime_ms=downtime_ms or DOWNTIME_MS)
        return Remaining(int(reply.get("bytes", 0)), bool(reply.get("converged")))

    async def suspend(self, vm: str) -> None:
        await self._link(vm).ask("suspend")

    async def resume(self, vm: str) -> None:
        await self._link(vm).ask("resume")

    async def cancel(self, vm: str, *, certain: bool) -> bool:
        del certain  # the process knows where its guest runs
        link = self._link(vm)
        with contextlib.suppress(GuestFailed):  # a move that has ended cannot be cancelled: its state tells
            await link.ask("cancel")
        return link.state is Guest.RUNNING

    def committed(self, vm: str) -> None:
        del vm

    async def guard(self, vm: str, role: Role, migration: str) -> str:
        del vm, role, migration  # the process asks nobody before it starts its guest
        return ""

    def unguard(self, vm: str, role: Role, migration: str) -> None:
        del vm, role, migration
