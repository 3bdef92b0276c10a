"""The source's rounds over the stream: a dump, then what changed, until little does, then kept so."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from migrator._pb import migrator_pb2 as pb
from migrator.agent.config import MigrationSection
from migrator.agent.copying import Batch, Copier, RoundTotal
from migrator.agent.report import Report

REPORT_S = 0.2
HURRY_S = 0.02  # frames for the guest wait meanwhile
SHRINKS = 0.8
"""Rounds shrink while each has less than this share of the one before."""

Call = Callable[..., Awaitable[Any]]
Write = Callable[[pb.FromSource], Awaitable[None]]


class Rounds:
    """`call` runs a function in the VM's lane, `write` gives a message to the stream.

    `small` hears of each small round, `progress` of how far it is, now and then.
    """

    def __init__(
        self,
        copier: Copier,
        report: Report,
        settings: MigrationSection,
        *,
        call: Call,
        write: Write,
        small: Callable[[], None],
        progress: Callable[[], None],
    ) -> None:
        self._copier = copier
        self._report = report
        self._settings = settings
        self._call = call
        self._write = write
        self._small = small
        self._progress = progress
        self._loaded = 0  # rounds that the destination has loaded
        self._loaded_more = asyncio.Event()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._hurried = asyncio.Event()
        self._in_order = asyncio.Lock()  # what is read from the driver is sent before anything is that is read later
        self._relief: asyncio.Task[bool] | None = None
        self._began = self._told = 0.0
        self.near = asyncio.Event()
        """All has been copied, and little was left after that; not any more when the copy has begun again."""
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until `halt`. Is never cancelled, for what was read from the driver and not sent would be missing."""
        self._began = time.monotonic()
        await self._call(self._copier.begin)
        self._report.lasted("track", self._began)
        while not self._stop.is_set():
            await self._dump()
            await self._drain()

    async def _dump(self) -> None:
        while not self._stop.is_set():
            async with self._in_order:
                if self._stop.is_set():
                    return None
                batch: Batch = await self._call(self._copier.chunk)
                await self.send(batch)
            if batch.complete:
                self._report.times_ms.setdefault("dump", (time.monotonic() - self._began) * 1e3)
                return await self._end_round()
            self._tell()
        return None

    def _tell(self) -> None:
        """Bring the report up to date and send it now and then: the guest's memory may take long behind the tables."""
        self.count()
        if time.monotonic() - self._told > REPORT_S:
            self._told = time.monotonic()
            self._progress()

    async def _drain(self) -> None:
        """Returns to stop, or when everything has to be dumped again."""
        before, hurried = 0, False
        while not self._stop.is_set():
            batch = await self._changes()
            if not self._copier.dumped:
                return self._report.warn("more changed during the copy than could be noted: it was begun again")
            if batch.records or hurried:
                await self._end_round(pausing=hurried)
            self._tell()
            shrinks = not before or batch.records < SHRINKS * before
            before = batch.records
            if not self._is_small(batch.records, shrinks=shrinks):
                continue
            self._report.times_ms.setdefault("converged", (time.monotonic() - self._began) * 1e3)
            self.near.set()
            self._small()
            if hurried:
                self._hurried.set()
            await _within(self._hurry, self._settings.drain_interval_s)
            hurried = self._hurry.is_set()
            self._hurry.clear()
        return None

    async def _changes(self) -> Batch:
        """Send what has changed since this was asked last, or that the copy begins again."""
        async with self._in_order:
            if self._stop.is_set():
                return Batch(complete=True)  # the last drain of all has it
            batch: Batch = await self._call(self._copier.drain)
            if batch.restart:
                self.near.clear()
            await self.send(batch)
        return batch

    def _is_small(self, records: int, *, shrinks: bool) -> bool:
        """What changes while a round is sent is the next one: of a busy guest they stop shrinking where both are equal.

        Such a round is as small as it gets. More than `steady_round` records would keep the guest standing for long.
        """
        return records <= (self._settings.small_round if shrinks else self._settings.steady_round)

    async def _end_round(self, *, pausing: bool = False) -> None:
        """Send the round's totals and wait until the destination has loaded it all.

        Not any more once the copy has to stop: what is sent from then on belongs to the last round. `pausing`: this is
        the last round before the guest is stopped, so the destination prepares for what follows at once.
        """
        async with self._in_order:
            if self._stop.is_set():
                return
            total = self._copier.end_round()
            end = pb.RoundEnd(round=total.round, records=total.records, digest=total.digest, pausing=pausing)
            await self._write(pb.FromSource(round_end=end))
        while self._loaded <= total.round and not self._stop.is_set():
            self._loaded_more.clear()
            await self._loaded_more.wait()

    async def send(self, batch: Batch) -> None:
        """Give a batch to the stream."""
        if batch.restart:
            await self._write(pb.FromSource(restart=pb.Empty()))
        for section in batch.sections:
            await self._write(pb.FromSource(section=section))

    async def send_rest(self) -> None:
        """All that is not sent yet, of ports whose tables do not change any more."""
        rest = self._copier.rest()
        while (batch := await self._call(next, rest, None)) is not None:
            await self.send(batch)

    async def send_final(self) -> None:
        """The last round is complete."""
        total: RoundTotal = self._copier.end_round()
        self.count()
        final = pb.Final(round=total.round, records=total.records, digest=total.digest)
        await self._write(pb.FromSource(final=final))

    def loaded(self, done: pb.RoundDone) -> None:
        """The destination has loaded a round."""
        self._loaded = done.round + 1
        self._report.not_moved.update(done.rejected)
        self._loaded_more.set()

    async def hurry(self) -> None:
        """Drain now: the guest is about to stop. Returns when the destination has loaded that, or HURRY_S later."""
        self._hurried.clear()
        self._hurry.set()
        await _within(self._hurried, HURRY_S)

    async def relieve(self) -> bool:
        """Take what has changed from the driver, whether or not the destination has loaded what it was sent before.

        What is noted from here on has all the room that there is. False: it had not been enough, and the copy has begun
        again. Is never cancelled itself, as `run`.
        """
        if not self._stop.is_set():
            self._relief = asyncio.create_task(self._relieve())
            self._relief.add_done_callback(_seen)
            return await asyncio.shield(self._relief)
        return True

    async def _relieve(self) -> bool:
        await self._changes()
        if not self._copier.dumped:
            self._hurry.set()
        return self._copier.dumped

    def halt(self) -> None:
        """End after what is being sent."""
        self._stop.set()
        self._loaded_more.set()
        self._hurry.set()

    async def halted(self) -> None:
        """Halt and wait for it; a stream that stands still ends the wait, too."""
        self.halt()
        under_way = {task for task in (self.task, self._relief) if task is not None and not task.done()}
        if under_way:
            await asyncio.wait(under_way, timeout=self._settings.step_s)

    def count(self) -> None:
        """Bring the report up to date."""
        self._report.rounds = self._copier.round
        self._report.entries = self._copier.records
        self._report.bytes = self._copier.bytes
        self._report.rate = self._copier.records / max(time.monotonic() - self._began, 1e-3) if self._began else 0.0


def _seen(done: asyncio.Task[bool]) -> None:
    """Whoever asked for it may have been stopped: then nobody else looks at how it ended."""
    if not done.cancelled():
        done.exception()


async def _within(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
