"""What the source does to the ports of a VM in its switchover, all of them together. `Ports` runs in the VM's lane."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from datapath.errors import Error, PortNotFound, StaleEpoch
from datapath.provider import Driver, PortRef, PortState, Pumped
from migrator.agent.config import MigrationSection
from migrator.agent.frames import TakenFrames
from migrator.agent.guests import Remaining
from migrator.agent.orders import port_channel
from migrator.agent.report import Report

POLL_S = 0.0002
SWALLOWED = 2  # frames that a hypervisor takes from a queue that is not empty when it stops, at most
BLIND = "the guest's queue cannot be looked at (vhost-net, or no CAP_SYS_PTRACE): frames in it may be lost"
MEMORY_POLL_S = 0.005
T = TypeVar("T")


def each(things: Iterable[T], step: Callable[[T], object]) -> None:
    """Take a step with everything: what fails keeps nothing else from it. Raises the first error at the end."""
    errors = []
    for thing in things:
        try:
            step(thing)
        except Error as error:
            errors.append(error)
    if errors:
        raise errors[0]


async def wait_idle(
    idle: Callable[[], Awaitable[bool | None]], holding: Callable[[], bool], settings: MigrationSection, report: Report
) -> None:
    """Until the guest has left nothing unread for a moment; says so in the report where that cannot be had."""
    began = time.monotonic()
    empty_since: float | None = None
    while holding():
        empty, now = await idle(), time.monotonic()
        if empty is None:
            await asyncio.sleep(settings.idle_blind_s)
            return report.warn(BLIND)
        empty_since = (empty_since or now) if empty else None
        if empty_since is not None and now - empty_since >= settings.idle_s:
            return None
        if now - began >= settings.idle_deadline_s:
            report.frames["may_be_lost"] = SWALLOWED
            milliseconds = settings.idle_deadline_s * 1e3
            return report.warn(
                f"the guest did not empty its queue within {milliseconds:.0f} ms: frames in it may be lost"
            )
        await asyncio.sleep(POLL_S)
    return None


async def wait_fits(remaining: Callable[[], Awaitable[Remaining]], report: Report) -> None:
    """Until what is left of the guest's memory fits; the report has its hypervisor's counts. Raises GuestFailed."""
    began = time.monotonic()
    while not (left := await remaining()).converged:
        report.memory.update(left.memory)
        await asyncio.sleep(MEMORY_POLL_S)
    report.memory.update(left.memory)
    report.lasted("memory_wait", began)


class Ports:
    """The ports of one VM at the source."""

    def __init__(self, driver: Driver, refs: Sequence[PortRef], report: Report, kept: TakenFrames) -> None:
        self._driver = driver
        self._refs = list(refs)
        self._report = report
        self._kept = kept
        self._taken: dict[PortRef, list[bytes]] = {ref: [] for ref in refs}
        self._held: set[PortRef] = set()
        self._quiesced: set[PortRef] = set()

    def recall(self, *, left: bool) -> None:
        """After a restart: how far an earlier run had got. `left`: the guest runs at the destination.

        A switch writes down late that a port stands still: a host that crashes before has it active when it is back.
        """
        taken, uncertain = self._kept.recall()
        for ref in self._refs:
            self._taken[ref] = taken.get(ref.mac, [])
        if uncertain:
            self._report.frames["may_be_lost"] += uncertain
            self._report.warn(f"the agent died while it passed on {uncertain} frames: they may be lost")
            self._kept.forget()
        for ref in self._refs:
            try:
                status = self._driver.port(ref)
            except (PortNotFound, StaleEpoch):
                continue  # purged, and the earlier run died before it could forget that
            if left and status.state is PortState.ACTIVE:
                self._driver.hold(ref)
                self._driver.quiesce(ref)
                status = self._driver.port(ref)
            if status.gate.endswith("shut"):
                self._held.add(ref)
            if status.state is not PortState.ACTIVE:
                self._quiesced.add(ref)

    def mtu(self) -> int:
        """The largest MTU of the ports, in bytes."""
        return max(int(self._driver.port(ref).record["mtu"]) for ref in self._refs)

    def hold(self) -> None:
        for ref in self._refs:
            if ref not in self._held:
                self._driver.hold(ref)
                self._held.add(ref)

    def let_go(self) -> None:
        """Hold no more, of a guest that has not stopped: what was held goes to it first."""
        for ref in sorted(self._held - self._quiesced, key=lambda one: one.mac):
            self._count("returned", self._driver.resume(ref))
            self._held.discard(ref)

    @property
    def free(self) -> bool:
        """Nothing is held and no port quiesced."""
        return not (self._held or self._quiesced)

    def idle(self) -> bool | None:
        """Has the guest taken everything from all of its queues? None: it cannot be known."""
        found = [self._driver.idle(ref) for ref in self._refs]
        return None if None in found else all(found)

    def shut(self) -> None:
        """Hold and quiesce; what is so already stays so."""
        for ref in self._refs:
            if ref in self._quiesced:
                continue
            if ref not in self._held:
                self._driver.hold(ref)
                self._held.add(ref)
            self._driver.quiesce(ref)
            self._quiesced.add(ref)

    def take(self) -> None:
        """Take what the guest left unread: kept here, in order, for whoever runs the guest next."""
        before = sum(len(frames) for frames in self._taken.values())
        for ref in self._refs:
            self._taken[ref] += self._driver.take(ref)
        count = sum(len(frames) for frames in self._taken.values())
        self._report.frames["taken"] = count
        if count > before:
            self._kept.keep({ref.mac: frames for ref, frames in self._taken.items() if frames})

    def redirect(self, channel: int, host: str) -> None:
        self.shut()
        self.take()
        self._kept.pass_on()

        def redirect(ref: PortRef) -> None:
            judged, self._taken[ref] = self._taken[ref], []
            own = port_channel(channel, (one.mac for one in self._refs), ref.mac)
            self._count("redirected", self._driver.redirect(ref, own, host, judged))

        each(self._refs, redirect)
        self._kept.forget()

    def passed_on(self) -> dict[str, int]:
        """MAC -> frames that its redirect has passed on so far."""
        return {ref.mac: self._driver.passed_on(ref)[0] for ref in self._refs}

    def resume(self) -> None:
        """Active again: what the guest left unread goes first, then what was held."""
        self._kept.pass_on()
        steps = (self._return, self._unlease, self._driver.untrack)
        each(((step, ref) for step in steps for ref in self._refs), lambda one: one[0](one[1]))
        self._kept.forget()

    def _return(self, ref: PortRef) -> None:
        taken, self._taken[ref] = self._taken[ref], []
        try:
            if taken:
                self._driver.inject(ref, taken, judged=True)
        finally:
            if ref in self._held | self._quiesced:
                self._count("returned", self._driver.resume(ref))
            self._held.discard(ref)
            self._quiesced.discard(ref)

    def _unlease(self, ref: PortRef) -> None:
        self._driver.set_lease(ref, None)

    def _count(self, name: str, pumped: Pumped) -> None:
        self._report.frames[name] += pumped.passed
        self._report.frames["held"] += pumped.passed
        self._report.frames["dropped"] += pumped.dropped

    def purge(self, keep_redirect: bool) -> None:
        each(self._refs, lambda ref: self._driver.purge(ref, keep_redirect=keep_redirect))

    def redirect_idle_s(self) -> float:
        """Seconds since the last frame of any of the ports was redirected."""
        found = []
        for ref in self._refs:
            try:
                found.append(self._driver.redirect_idle_s(ref))
            except PortNotFound:
                continue  # already released
        return min(found, default=float("inf"))
