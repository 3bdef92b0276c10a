"""VMs on their way to this host by libvirt's own doing, as its hook tells of them.

The source goes on running while a hook waits here, so this is where there is time: `begin` answers when the ports are
staged and the source has started to copy, `copied` when the first full copy is here and rounds have become small, and
either fails when the source is lost: its guest has not begun to move. What follows needs no hook: the two agents and
libvirt's events finish it.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.agent.side import AgentSide
from migrator.errors import AlreadyMigrating, DeadlineExceeded, PeerLost, PreflightFailed
from migrator.lifecycle.destination_words import Phase

COPIED = frozenset({"authorised", "switchover", "committed", "open", "settled", "done"})
STAGED = COPIED | {"pre-copy"}
"""Phases of a report: the destination is staged and the source copies; the first copy has converged."""
WAITING = frozenset({Phase.STAGING, Phase.STAGED, Phase.LOADING, Phase.COMMITTING, Phase.COMMITTED, Phase.FENCED})
"""Phases of the destination's end in which the guest has not come yet."""

ENDING_S = 10.0
ENDING_POLL_S = 0.1
LOST_POLL_S = 0.2
BEGUN_S = 10.0
"""From the order to the source to its first word here; its probes of the path are over before."""


class Arrival:
    """One migration, followed until it is over."""

    def __init__(self, side: AgentSide, vm: str, *, strict: bool) -> None:
        self.vm = vm
        self._strict = strict
        self.began = time.monotonic()
        self.report = pb.Migration()
        self.error: Error | None = None
        self.over = False
        self._side = side
        self._news = asyncio.Event()
        self._log = structlog.get_logger()

    async def follow(self) -> None:
        """Until the migration is over or the coordinator is lost."""
        try:
            async for report in self._side.bring(self.vm, strict=self._strict):
                self.report = report
                self._tell()
        except Error as error:
            self.error = error
        finally:
            self.over = True
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    @property
    def failed(self) -> bool:
        return self.report.outcome in {"aborted", "refused"} or (self.over and not self.report.phase)

    @property
    def undone(self) -> bool:
        """It failed, and not only whoever told of it."""
        return self.failed and not isinstance(self.error, PeerLost)

    def has(self, phases: frozenset[str]) -> bool:
        return not self.failed and self.report.phase in phases

    async def until(self, phases: frozenset[str], seconds: float) -> bool:
        """Wait until it is in one of `phases`, no longer than `seconds` and not when it is over; is it then?"""
        deadline = time.monotonic() + seconds
        while not (self.has(phases) or self.over or self.failed) and (left := deadline - time.monotonic()) > 0:
            news = self._news
            try:
                await asyncio.wait_for(news.wait(), left)
            except TimeoutError:
                break
        return self.has(phases)

    def refusal(self) -> Error:
        """Why it failed."""
        if self.error is not None:
            return self.error
        reasons = [self.report.reason or f"the migration is {self.report.outcome or self.report.phase}"]
        return PreflightFailed(
            f"VM {self.vm}: the network state cannot follow from {self.report.source or 'its host'}",
            hint=f"`migrator migration show {self.report.id}`" if self.report.id else "",
            reasons=reasons,
        )


class Arrivals:
    """Those in hand. `begin_s`: for staging and the first contact; `copy_s`: for the first full copy."""

    def __init__(self, side: AgentSide, *, begin_s: float, copy_s: float) -> None:
        self._side = side
        self._begin_s, self._copy_s = begin_s, copy_s
        self._arrivals: dict[str, Arrival] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    def in_hand(self, vm: str) -> bool:
        """Is a migration of the VM to this host under way, whose guest has not come yet?"""
        phase = self._side.arriving(vm)
        if phase:
            return phase in WAITING
        arrival = self._arrivals.get(vm)  # not staged yet
        return arrival is not None and not arrival.over and arrival.report.phase in {"", "preparing"}

    async def begin(self, vm: str, *, strict: bool = False) -> None:
        """Have the state follow; returns when the source copies. Raises what the order of a migration raises.

        A migration that is in hand already is joined. One that is still ending (the last one of this VM, or the last
        attempt) is waited for.
        """
        until = time.monotonic() + ENDING_S
        while True:
            joined = self._side.arriving(vm) in WAITING
            arrival = self._follow(vm, strict=strict)
            if await arrival.until(STAGED, self._begin_s):
                return
            ending = isinstance(arrival.error, AlreadyMigrating) or (joined and arrival.failed)
            if not ending or time.monotonic() >= until:
                break
            await asyncio.sleep(ENDING_POLL_S)
        await self._not_staged(vm, arrival)

    async def _not_staged(self, vm: str, arrival: Arrival) -> None:
        if isinstance(arrival.error, PeerLost) and self._side.arriving(vm) in WAITING - {Phase.STAGING}:
            self._log.warning("the coordinator was lost when a VM began to come", vm=vm)
        elif arrival.over or arrival.failed:
            raise arrival.refusal()
        else:
            await self.call_off(vm, "it was not staged in time")
            raise DeadlineExceeded(
                f"VM {vm}: its ports are not staged after {self._begin_s:g} s", hint="`migrator migration list`"
            )

    async def copied(self, vm: str) -> str:
        """Wait for the first full copy; returns a warning when it took too long, else "". Raises when it failed."""
        arrival = self._arrivals.get(vm)
        if arrival is None or arrival.over:
            arrival = self._follow(vm)  # this agent was started after the migration had begun
        began = time.monotonic()
        await self._begun(arrival)
        if await self._copied_or_lost(arrival):
            self._log.info("first copy", vm=vm, waited_ms=round((time.monotonic() - began) * 1e3, 1))
            return ""
        if self._side.arriving(vm) == Phase.FENCED:  # the guest has not begun to move: going on would cost connections
            raise PeerLost(
                f"VM {vm}: the agent of {arrival.report.source or 'its host'} was lost during the first copy",
                hint="the VM goes on where it is; migrate again when that agent is back",
            )
        if arrival.undone:
            raise arrival.refusal()
        if arrival.over:
            return "the coordinator was lost: not known whether the first copy is complete"
        return f"the first copy of the network state was not complete after {self._copy_s:g} s; the guest goes on"

    async def _begun(self, arrival: Arrival) -> None:
        """Wait until the source has said something. Raises PeerLost: it may never have been told to."""
        deadline = time.monotonic() + BEGUN_S
        while self._side.arriving(arrival.vm) == Phase.STAGED and not arrival.undone:
            if time.monotonic() >= deadline:
                raise PeerLost(
                    f"VM {arrival.vm}: the agent of {arrival.report.source or 'its host'} has not begun to copy",
                    hint="the VM goes on where it is; are that agent and the coordinator running?",
                )
            await asyncio.sleep(LOST_POLL_S)

    async def _copied_or_lost(self, arrival: Arrival) -> bool:
        """Wait for the first copy, no longer than `copy_s` and not when nothing more will come; is it here?"""
        deadline = time.monotonic() + self._copy_s
        while not arrival.has(COPIED) and (left := deadline - time.monotonic()) > 0:
            if arrival.over or arrival.failed or self._side.arriving(arrival.vm) == Phase.FENCED:
                break
            await arrival.until(COPIED, min(left, LOST_POLL_S))
        return arrival.has(COPIED)

    async def call_off(self, vm: str, reason: str) -> None:
        """The guest will not come: end the migration now. The source's word counts all the same."""
        self._arrivals.pop(vm, None)
        try:
            await self._side.call_off(vm, reason)
        except Error as error:
            self._log.warning("not called off: the source ends it", vm=vm, error=str(error))

    def _follow(self, vm: str, *, strict: bool = False) -> Arrival:
        arrival = self._arrivals.get(vm)
        if arrival is not None and not arrival.over and not arrival.failed:
            return arrival
        arrival = self._arrivals[vm] = Arrival(self._side, vm, strict=strict)
        task = asyncio.create_task(self._followed(arrival))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return arrival

    async def _followed(self, arrival: Arrival) -> None:
        await arrival.follow()
        report = arrival.report
        self._log.info(
            "arrival", vm=arrival.vm, migration=report.id, outcome=report.outcome, error=str(arrival.error or "")
        )
        if self._arrivals.get(arrival.vm) is arrival:
            del self._arrivals[arrival.vm]

    async def stop(self) -> None:
        """Stop following; the migrations go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
