"""The hypervisor's drivers: a process on a unix socket, and none at all."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from migrator.agent.guests import GuestEvent, GuestFailed, Remaining, guest_driver, whereabouts
from migrator.agent.guests.none import NoGuests
from migrator.agent.guests.process import ProcessGuests
from migrator.errors import ConfigInvalid
from migrator.lifecycle.machine import Guest

VM = "6f0c4d2e-7a55-4c0e-9d5e-3f2b8a1c0d01"


class Process:
    """A VM's process: answers requests from `replies`, sends what a test tells it."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.asked: list[dict[str, Any]] = []
        self.replies: dict[str, dict[str, Any]] = {}
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.say({"event": "hello", "vm": VM, "state": self.state, "nics": []})
        while line := await reader.readline():
            request = json.loads(line)
            self.asked.append(request)
            self.say({"id": request["id"], **self.replies.get(request["op"], {})})
        writer.close()

    def say(self, message: dict[str, Any]) -> None:
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\n")


@asynccontextmanager
async def talking(
    directory: Path, state: str = "running"
) -> AsyncIterator[tuple[ProcessGuests, Process, list[GuestEvent]]]:
    process, events = Process(state), list[GuestEvent]()
    server = await asyncio.start_unix_server(process.serve, directory / f"{VM}.sock")
    guests = ProcessGuests({"directory": str(directory)})
    await guests.start(events.append)
    try:
        yield guests, process, events
    finally:
        await guests.stop()
        server.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a short name: a socket's path has 107 characters at most, and its own name is a uuid."""
    with tempfile.TemporaryDirectory(prefix="guests-") as made:
        yield Path(made)


async def until(condition: Any) -> None:
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("word", "guest"),
    [("running", Guest.RUNNING), ("paused", Guest.PAUSED), ("incoming", Guest.GONE), ("absent", Guest.GONE)],
)
def test_the_greeting_says_where_the_guest_is(directory: Path, word: str, guest: Guest) -> None:
    async def scenario() -> None:
        async with talking(directory, word) as (guests, _, _):
            assert guests.state(VM) is guest
            assert guests.state("another") is None
            assert (whereabouts(guests, VM), whereabouts(guests, "another")) == (guest, Guest.GONE)
            assert guests.states() == ({} if guest is Guest.GONE else {VM: guest})

    asyncio.run(scenario())


def test_events_come_in_order_and_change_the_state(directory: Path) -> None:
    async def scenario() -> None:
        async with talking(directory) as (guests, process, events):
            process.say({"event": "paused", "reason": "user", "time": 1.5})
            process.say({"event": "resumed", "reason": "user", "time": 2.5})
            process.say({"event": "paused", "reason": "migrated", "time": 3.5})
            process.say({"event": "stopped", "reason": "migrated", "time": 4.5})
            await until(lambda: len(events) == 4)
            assert events == [
                GuestEvent(VM, "paused", moving=False, reason="user", time=1.5),
                GuestEvent(VM, "running", moving=False, reason="user", time=2.5),
                GuestEvent(VM, "paused", moving=True, reason="migrated", time=3.5),
                GuestEvent(VM, "gone", moving=True, reason="migrated", time=4.5),
            ]
            assert guests.state(VM) is Guest.GONE

    asyncio.run(scenario())


def test_requests_are_answered(directory: Path) -> None:
    async def scenario() -> None:
        async with talking(directory) as (guests, process, _):
            process.replies["remaining"] = {"bytes": 4096, "converged": True}
            await guests.migrate(VM, "h2")
            assert await guests.remaining(VM, 300) == Remaining(4096, True)
            await guests.suspend(VM)
            await guests.resume(VM)
            assert [request["op"] for request in process.asked] == ["migrate", "remaining", "suspend", "resume"]
            assert process.asked[0]["to"] == "h2"
            assert process.asked[1]["downtime_ms"] == 300

    asyncio.run(scenario())


def test_a_refusal_is_an_error_that_says_why(directory: Path) -> None:
    async def scenario() -> None:
        async with talking(directory) as (guests, process, _):
            process.replies["suspend"] = {"error": "the VM does not run"}
            with pytest.raises(GuestFailed, match="the VM does not run"):
                await guests.suspend(VM)
            with pytest.raises(GuestFailed, match="has no process here"):
                await guests.suspend("another")

    asyncio.run(scenario())


def test_a_cancel_tells_whether_the_guest_runs_here(directory: Path) -> None:
    async def scenario() -> None:
        async with talking(directory) as (guests, process, _):
            process.replies["cancel"] = {"error": "the VM does not move"}
            assert await guests.cancel(VM, certain=False)
            process.say({"event": "paused", "reason": "migrated"})
            await until(lambda: guests.state(VM) is Guest.PAUSED)
            assert not await guests.cancel(VM, certain=True)

    asyncio.run(scenario())


def test_a_process_that_ends_is_gone_and_looked_for_again(directory: Path) -> None:
    async def scenario() -> None:
        async with talking(directory) as (guests, process, _):
            assert process.writer is not None
            process.state = "paused"
            process.writer.close()
            await until(lambda: guests.state(VM) is Guest.PAUSED)

    asyncio.run(scenario())


def test_without_a_hypervisor_orders_are_the_guests_moves() -> None:
    async def scenario() -> None:
        events: list[GuestEvent] = []
        guests = NoGuests({})
        await guests.start(events.append)
        assert (await guests.remaining(VM, 300)).converged
        await guests.suspend(VM)
        guests.committed(VM)
        assert [(event.what, event.moving) for event in events] == [("paused", True), ("running", True)]
        assert await guests.cancel(VM, certain=True)
        assert not await guests.cancel(VM, certain=False), "the destination may run it already"
        assert guests.state(VM) is None and whereabouts(guests, VM) is None

    asyncio.run(scenario())


def test_drivers_are_known_by_name(directory: Path) -> None:
    assert isinstance(guest_driver("process", {"directory": directory}), ProcessGuests)
    with pytest.raises(ConfigInvalid, match="no driver 'xen'"):
        guest_driver("xen", {})
    with pytest.raises(ConfigInvalid, match=r"guests\.directory"):
        guest_driver("process", {})
