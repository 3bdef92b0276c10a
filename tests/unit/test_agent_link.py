"""What an agent says while the coordinator reads nothing: bounded, and nothing that matters is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.link import Link
from migrator.agent.outgoing import Outgoing

WORDS = ["converged", "held", "paused", "committed", "opened", "degraded", "settled"]
LARGE = "x" * 50_000


def progress(migration: str, event: str, entries: int = 0, reason: str = "") -> pb.FromAgent:
    report = pb.Migration(entries=entries, reason=reason)
    return pb.FromAgent(progress=pb.Progress(migration=migration, role="source", event=event, report=report))


def drained(outgoing: Outgoing) -> list[pb.FromAgent]:
    async def all_of_them() -> list[pb.FromAgent]:
        return [await outgoing.get() for _ in range(len(outgoing))]

    return asyncio.run(all_of_them())


def test_every_event_of_every_migration_is_kept_with_its_newest_report() -> None:
    outgoing = Outgoing()
    for number in range(1_000):
        for migration in ("one", "two"):
            outgoing.put(progress(migration, "running", number))
    for word in WORDS:
        for migration in ("one", "two"):
            outgoing.put(progress(migration, word, 7))
    said = [(m.progress.migration, m.progress.event, m.progress.report.entries) for m in drained(outgoing)]
    for migration in ("one", "two"):
        mine = [(event, entries) for name, event, entries in said if name == migration]
        assert mine == [("running", 999), *((word, 7) for word in WORDS)]


def test_the_last_word_of_a_guest_of_places_of_a_redirect_counts() -> None:
    outgoing = Outgoing()
    for number in range(100):
        outgoing.put(
            pb.FromAgent(guest=pb.GuestEvent(vm=f"vm{number % 2}", state="paused" if number < 98 else "running"))
        )
        outgoing.put(pb.FromAgent(places=pb.PlacesKnown(revision=number)))
        outgoing.put(pb.FromAgent(redirect_idle=pb.RedirectIdle(vm="vm0", epoch=1 + number % 2, idle_s=number)))
    messages = drained(outgoing)
    assert len(messages) == 5
    assert {m.guest.state for m in messages if m.HasField("guest")} == {"running"}
    assert [m.places.revision for m in messages if m.HasField("places")] == [99]
    assert {m.redirect_idle.idle_s for m in messages if m.HasField("redirect_idle")} == {98, 99}


def test_replies_are_all_kept_and_too_many_end_the_stream() -> None:
    outgoing = Outgoing(limit=10)
    for number in range(10):
        outgoing.put(pb.FromAgent(reply=pb.Reply(request=number)))
    assert not outgoing.full.is_set()
    outgoing.put(pb.FromAgent(reply=pb.Reply(request=10)))
    assert outgoing.full.is_set()
    assert [m.reply.request for m in drained(outgoing)] == list(range(10))


class Deaf(rpc.CoordinatorServicer):
    """Reads the Hello, greets, and reads on only when told to."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.heard: list[pb.FromAgent] = []
        self.attached = 0

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[pb.ToAgent]:  # noqa: N802, ARG002
        assert (await anext(aiter(requests))).HasField("hello")
        self.attached += 1
        yield pb.ToAgent(sync=pb.Sync())
        await self.reads.wait()
        async for message in requests:
            self.heard.append(message)


class Attached:
    """A link to a coordinator that is deaf at first. `meanwhile` is said while a hello is made."""

    def __init__(self, meanwhile: pb.FromAgent | None = None) -> None:
        self.meanwhile = meanwhile

    async def __aenter__(self) -> Attached:
        self.deaf = Deaf()
        self.server = grpc.aio.server()
        rpc.add_CoordinatorServicer_to_server(self.deaf, self.server)  # type: ignore[no-untyped-call]
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.times = 0

        async def hello() -> pb.Hello:
            if self.meanwhile is not None:
                self.link.send(self.meanwhile)
            return pb.Hello(host="a")

        async def take(message: pb.ToAgent) -> None:
            assert message.HasField("sync")

        self.link = Link(f"127.0.0.1:{port}", hello, take, self.count)
        self.task = asyncio.create_task(self.link.run())
        await self.until(lambda: self.link.connected)
        return self

    def count(self) -> None:
        self.times += 1

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.deaf.reads.set()
        await self.server.stop(0.1)


def test_a_coordinator_that_reads_nothing_for_long_has_missed_nothing() -> None:
    async def scenario() -> None:
        async with Attached() as it:
            outgoing: Any = it.link._outgoing
            for number in range(3_000):
                it.link.send(progress("one", "running", number, LARGE))
                await asyncio.sleep(0)  # what the transport takes it may have
            assert len(outgoing) <= 1
            for word in WORDS:
                it.link.send(progress("one", word, 3_000))
            assert len(outgoing) <= 1 + len(WORDS)
            it.deaf.reads.set()
            await it.until(lambda: it.deaf.heard and it.deaf.heard[-1].progress.event == "settled")
            assert [m.progress.event for m in it.deaf.heard if m.progress.event != "running"] == WORDS
            assert it.times == 1

    asyncio.run(scenario())


def test_what_is_said_beside_a_hello_goes_behind_it() -> None:
    gone = pb.FromAgent(guest=pb.GuestEvent(vm="vm0", state="gone"))

    async def scenario() -> None:
        async with Attached(meanwhile=gone) as it:
            it.deaf.reads.set()
            await it.until(lambda: it.deaf.heard)
            assert it.deaf.heard == [gone]

    asyncio.run(scenario())


def test_a_coordinator_that_never_reads_is_cut_off_and_attached_to_again(monkeypatch: Any) -> None:
    monkeypatch.setattr("migrator.agent.outgoing.Outgoing.__init__.__defaults__", (100,))

    async def scenario() -> None:
        async with Attached() as it:
            with structlog.testing.capture_logs() as logs:
                for number in range(200):
                    it.link.send(pb.FromAgent(reply=pb.Reply(request=number, guest=LARGE)))
                await it.until(lambda: it.times == 2)
            assert [log["log_level"] for log in logs if "reads nothing" in log["event"]] == ["warning"]
            it.deaf.reads.set()
            it.link.send(progress("one", "settled"))
            await it.until(lambda: [m for m in it.deaf.heard if m.progress.event == "settled"])
            assert not it.task.done()

    asyncio.run(scenario())
