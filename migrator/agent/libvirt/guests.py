"""Implements GuestDriver with libvirt: where VMs run, when one that moves may be stopped, and how it is moved.

libvirt's and QEMU's events say where a guest runs (`hearing`); calls are made beside the loop (`connection`). Nothing
here waits for libvirt in the loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from migrator.agent.guests.word import BY_DEFAULT, GuestEvent, GuestFailed, MoveOptions, Remaining
from migrator.agent.libvirt import lockdriver, memory, moving
from migrator.agent.libvirt.connection import Connection, Libvirt
from migrator.agent.libvirt.domains import Happenings
from migrator.agent.libvirt.events import Move
from migrator.agent.libvirt.hearing import Found, Hearing
from migrator.agent.libvirt.locking import Marks, guard
from migrator.agent.libvirt.memory import Aim
from migrator.agent.libvirt.options import LibvirtOptions
from migrator.agent.libvirt.service import Service
from migrator.agent.side import AgentSide
from migrator.lifecycle.machine import Guest, Role

T = TypeVar("T")

SUSPEND_S = 5.0
CANCEL_S = 10.0
CANCEL_POLL_S = 0.02
JOB_POLL_S = 0.25
MEASURE_S = 0.03


@dataclass
class _Leaving:
    """A move from here. `tuned`: what was found out when it began; `cancelled`: by us, so its failure is no news."""

    tuned: moving.Tuned
    cancelled: bool = False
    measures: Mapping[str, float] = field(default_factory=dict)
    asked: float = 0.0  # when the answer came
    asking: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None


class LibvirtGuests:
    """`[guests] driver = "libvirt"`; options as in LibvirtOptions. `domains` tells of what happens to VMs."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = LibvirtOptions.of(options)
        self.marks = Marks(self.options.hook_socket.parent / "strict")
        self._on_event: Callable[[GuestEvent], None] = lambda _: None
        self._hearing = Hearing(self._say, self._look_where)
        self.connection = Connection(self.options.uri, opened=self._hearing.listen, up=self._up, down=self._down)
        self._leaving: dict[str, _Leaving] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._service: Service | None = None
        self._log = structlog.get_logger()

    @property
    def domains(self) -> Happenings:
        """What happens to the VMs of this host, for whoever keeps their ports."""
        return self._hearing.happenings

    # ---- life ----

    async def start(self, on_event: Callable[[GuestEvent], None]) -> None:
        """Returns when the truth of all VMs is known, or libvirtd was not reached in time."""
        self._on_event = on_event
        if not await self.connection.start(self.options.connect_s):
            self._log.warning("libvirt is not reached: where guests run is not known", uri=self.options.uri)

    async def attach(self, side: AgentSide) -> None:
        self._service = Service(self, side)
        await self._service.start()

    async def stop(self) -> None:
        self._on_event = lambda _: None
        if self._service is not None:
            await self._service.stop()
        for task in set(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.connection.stop()

    def _up(self, listed: list[Found]) -> None:
        self._hearing.compare(listed)

    def _down(self, reason: str) -> None:
        self._log.warning("libvirt is lost: what guests do is not heard", reason=reason)

    # ---- where guests run ----

    @property
    def speaks(self) -> bool:
        return self.connection.up

    def state(self, vm: str) -> Guest | None:
        track = self._hearing.tracks.get(vm)
        return None if track is None else track.guest

    def states(self) -> Mapping[str, Guest]:
        return {vm: track.guest for vm, track in self._hearing.tracks.items() if track.guest is not Guest.GONE}

    def _say(self, event: GuestEvent) -> None:
        over = event.what in {"gone", "failed"}
        left = self._leaving.pop(event.vm, None) if over else None
        if left is not None and left.watch not in {None, asyncio.current_task()}:
            left.watch.cancel()
        if event.what != "failed" or left is None or not left.cancelled:
            self._on_event(event)

    def _look_where(self, vm: str) -> None:
        self._go(self._find_out(vm))

    async def _find_out(self, vm: str) -> None:
        """QEMU sends memory somewhere: to another host, or into a file (save, snapshot)?"""
        if await self.leaving(vm):
            self._hearing.leaves(vm)

    # ---- moves ----

    async def leaving(self, vm: str) -> bool:
        return await self._leaves(vm, unknown=False)

    async def _leaves(self, vm: str, *, unknown: bool) -> bool:
        """`unknown` where libvirt does not say."""
        try:
            return await self._domain(vm, lambda domain: memory.leaving(domain.jobStats()))
        except GuestFailed as error:
            self._log.info("not known whether the VM leaves", vm=vm, error=str(error))
            return unknown

    async def accompany(self, vm: str) -> None:
        if not await self.leaving(vm):
            raise GuestFailed(
                f"libvirt does not move VM {vm} to another host", hint="it may have been aborted: virsh domjobinfo"
            )
        await self._begin(vm)
        self._leaving[vm].watch = self._go(self._watch(vm))

    async def _begin(self, vm: str) -> None:
        self._leaving[vm] = _Leaving(await self._domain(vm, lambda domain: moving.tune(domain, self.options.aim)))
        self._hearing.leaves(vm)

    async def _watch(self, vm: str) -> None:
        """A move can end where it began before QEMU had a part in it: no event tells of that."""
        while self._hearing.track(vm).move is Move.OUT:
            await asyncio.sleep(JOB_POLL_S)
            if not await self._leaves(vm, unknown=True):
                await asyncio.sleep(JOB_POLL_S)  # events of a good end come about now
                self._hearing.left_off(vm, "it ended without QEMU's part of it")
                return

    async def migrate(self, vm: str, to: str, options: MoveOptions = BY_DEFAULT) -> None:
        await self._begin(vm)
        self._leaving[vm].watch = self._go(self._migrate(vm, to, options))

    async def _migrate(self, vm: str, to: str, options: MoveOptions) -> None:
        def work(conn: Libvirt) -> None:
            moving.migrate(conn.lookupByUUIDString(vm), self.options, to, options)

        try:
            await self.connection.call_alone(work)
        except GuestFailed as error:
            self._hearing.left_off(vm, error.message)

    async def remaining(self, vm: str, downtime_ms: int) -> Remaining:
        aim, track = self._aim(vm, downtime_ms), self._hearing.track(vm)
        if track.guest is Guest.PAUSED:
            return Remaining(0, converged=True)  # it cannot be stopped any more than it is
        known = self._leaving.get(vm)
        if known is None:
            return memory.remaining(aim, await self._measures(vm))
        if known.asking is None and time.monotonic() >= known.asked + MEASURE_S:
            known.asking = self._go(self._ask(vm, known))
        # QEMU's word of a pass is not kept waiting by a question that libvirt is slow to answer.
        return memory.remaining(aim, known.measures, passes=track.passes)

    def _aim(self, vm: str, order_ms: int) -> Aim:
        known = self._leaving.get(vm)
        tuned = moving.Tuned() if known is None else known.tuned
        return tuned.aim(self.options.aim, order_ms)

    async def _ask(self, vm: str, known: _Leaving) -> None:
        """What QEMU counts; each question costs its main loop some time.

        No answer is no reason to end the move: QEMU may stop the guest by itself then.
        """
        try:
            known.measures = await self._measures(vm)
        except GuestFailed as error:
            self._log.info("not known how much memory is left", vm=vm, error=str(error))
        known.asking, known.asked = None, time.monotonic()

    async def _measures(self, vm: str) -> Mapping[str, float]:
        return await self._domain(vm, lambda domain: memory.measures(domain.jobStats()))

    async def suspend(self, vm: str) -> None:
        if self._hearing.track(vm).guest is Guest.PAUSED:
            raise GuestFailed(f"VM {vm} is paused already", hint="its move goes on by itself")
        await self._domain(vm, lambda domain: domain.suspend(), within_s=SUSPEND_S)

    async def resume(self, vm: str) -> None:
        await self._domain(vm, lambda domain: domain.resume(), within_s=SUSPEND_S)

    async def cancel(self, vm: str, *, certain: bool) -> bool:
        """Libvirt starts a guest again that was stopped for the move; if it could not, `certain` lets us do it."""
        if await self.leaving(vm):
            if vm in self._leaving:
                self._leaving[vm].cancelled = True
            await self._quietly(vm, lambda domain: domain.abortJob())
        deadline = time.monotonic() + CANCEL_S
        while (left := await self._still(vm)) is not None and time.monotonic() < deadline:
            if left.over and (left.running or not (certain and left.stopped)):
                return left.running
            if left.over:
                await self._quietly(vm, lambda domain: domain.resume())
            await asyncio.sleep(CANCEL_POLL_S)
        return False

    async def _still(self, vm: str) -> moving.Still | None:
        """How a VM is that may not move any more; None when it is not here, or libvirt does not say."""
        try:
            return await self._domain(vm, moving.still)
        except GuestFailed:
            return None

    def committed(self, vm: str) -> None:
        del vm  # its hypervisor says when it runs here

    async def guard(self, vm: str, role: Role, migration: str) -> str:
        return await asyncio.to_thread(guard, self.marks, vm, role, migration, lockdriver.missing)

    def unguard(self, vm: str, role: Role, migration: str) -> None:
        self.marks.take(vm, role, migration)

    def stopped(self, vm: str) -> None:
        """libvirtd has stopped its vCPUs and waits for us: what QEMU's event says a moment later is said now."""
        self._hearing.stopped(vm)

    # ---- calls ----

    async def _domain(self, vm: str, function: Callable[[Any], T], *, within_s: float = 10.0) -> T:
        """Call `function` with the domain, in a thread. Raises GuestFailed."""
        try:
            return await self.connection.call(lambda conn: function(conn.lookupByUUIDString(vm)), within_s=within_s)
        except GuestFailed as error:
            raise GuestFailed(f"VM {vm}: {error.message}", hint=error.hint) from error

    async def _quietly(self, vm: str, function: Callable[[Any], object]) -> None:
        try:
            await self._domain(vm, function)
        except GuestFailed as error:
            self._log.info("libvirt refused", vm=vm, error=str(error))

    def _go(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._gone)
        return task

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("broken", task=task.get_name(), exc_info=task.exception())
