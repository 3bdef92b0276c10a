"""A coordinator whose disk is full for a while: what nobody says a second time is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator import execution
from migrator.coordinator.journal import Batch
from migrator.errors import JournalFailed
from tests.unit.scripted import Agent, Bench


class FullDisk:
    """Takes the place of a journal's `write`."""

    def __init__(self, bench: Bench) -> None:
        self._write, self.full, self.refused = bench.journal.write, False, asyncio.Event()
        bench.journal.write = self.write  # type: ignore[method-assign]

    def write(self, batch: Batch, *, durable: bool) -> Any:
        if self.full:
            self.refused.set()
            raise JournalFailed("no space left on device")
        return self._write(batch, durable=durable)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, scenario: Any) -> None:
    monkeypatch.setattr(execution, "RETRY_S", 0.05)

    async def main() -> None:
        async with Bench(folder) as bench:
            await scenario(bench, FullDisk(bench))

    asyncio.run(main())


async def until(found: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not found():
            await asyncio.sleep(0.01)


def test_the_last_acknowledgement_of_a_place_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the source's redirect would never end."""

    async def scenario(bench: Bench, disk: FullDisk) -> None:
        a, b = await bench.two_hosts()
        third = Agent("h3")
        third.acknowledges = False
        await bench.attach(third)
        report = await bench.begin_migration()
        await a.hear("authorise")
        b.progress("committed", a.migration)
        b.progress("opened", a.migration)
        assert (await bench.finished(report.id)).outcome == "complete"
        a.say(redirect_idle=pb.RedirectIdle(vm=report.vm, epoch=1, idle_s=60.0))
        running = bench.cluster.migrations._execution.running
        await until(lambda: all(run.machine.redirect_idle for run in running.values()))
        await third.hear("places")
        disk.full = True
        third.say(places=pb.PlacesKnown(revision=third.last("places").revision))
        async with asyncio.timeout(10.0):
            await disk.refused.wait()
        disk.full = False
        await a.hear("end_redirect")
        await until(lambda: not running)

    run(tmp_path, monkeypatch, scenario)


def test_an_answer_to_an_order_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the migration would stand until its deadline."""

    async def scenario(bench: Bench, disk: FullDisk) -> None:
        a, b = await bench.two_hosts()
        b.silent = {"prepare"}
        await bench.begin_migration()
        await b.hear("prepare")
        request = next(m.request for m in b.heard if m.WhichOneof("message") == "prepare")
        disk.full = True
        b.say(reply=pb.Reply(request=request))
        async with asyncio.timeout(10.0):
            await disk.refused.wait()
        disk.full = False
        await a.hear("start")

    run(tmp_path, monkeypatch, scenario)
