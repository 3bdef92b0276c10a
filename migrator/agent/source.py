"""The source's end of a migration: carries out what its machine says."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import partial
from typing import Any

from datapath.errors import Error
from datapath.provider import PortRef
from migrator._pb import migrator_pb2 as pb
from migrator.agent.copying import Batch, Copier
from migrator.agent.end import End, Surroundings
from migrator.agent.guests import GuestFailed
from migrator.agent.orders import move_options
from migrator.agent.quiet import QUIET, URGENT
from migrator.agent.report import Report
from migrator.agent.rounds import Rounds
from migrator.agent.source_times import LEASED, deadline_s
from migrator.agent.stream import PeerStream, ask
from migrator.agent.switchover import Ports, wait_fits, wait_idle
from migrator.errors import MigrationError, PeerLost
from migrator.lifecycle import source as machine
from migrator.lifecycle import source_words as words
from migrator.lifecycle.machine import Action, Event, Guest, Role
from migrator.lifecycle.source_words import Phase

ETHERNET, PROBE_FIRST_S = 14, 0.2
RESUME_TRIES = 3
ABORT_S = MEASURED_S = 1.0


class SourceEnd(End):
    """One VM on its way from here. `order` is the coordinator's StartSource."""

    role = Role.SOURCE

    def __init__(self, around: Surroundings, order: pb.StartSource, state: machine.State) -> None:
        report = Report(order.migration, order.vm, order.epoch, around.host, order.destination)
        refs = [PortRef(order.vm, mac, epoch) for mac, epoch in sorted(order.epochs.items())]
        self.order = order
        taken = around.store.taken(f"{order.migration}.{self.role}")
        self.ports = Ports(around.driver, refs, report, taken)
        self.copier = Copier(around.driver, refs, with_state=not order.without_state)
        self.stream: PeerStream | None = None
        self.rounds = Rounds(
            self.copier,
            report,
            around.settings,
            call=self.call,
            write=self._write,
            small=self._small_round,
            progress=lambda: self.tell_now("running"),
        )
        self._moving_guest = False
        self._waking: asyncio.Task[None] | None = None
        super().__init__(around, report, refs, state)

    def _step(self, event: Event) -> tuple[Any, tuple[Action, ...]]:
        return machine.step(self.state, event)

    def _failure(self, reason: str) -> Event:
        return words.Failed(reason)

    def _timeout(self) -> Event:
        return words.Timeout(self.state.phase)

    def _facts(self) -> dict[str, Any]:
        return {"order": self.order.SerializeToString().hex()}

    def _deadline_s(self) -> float | None:
        settings = self.around.settings
        return deadline_s(self.state.phase, settings, self.order.timeout_s or settings.timeout_s)

    @property
    def over(self) -> bool:
        return self.state.phase in words.OVER and (self._waking is None or self._waking.done())

    @property
    def leased(self) -> bool:
        return self.state.phase in LEASED

    def _handlers(self) -> Mapping[type[Action], Callable[[Any], Coroutine[Any, Any, None]]]:
        return {
            words.Probe: self._probe,
            words.Connect: self._connect,
            words.Copy: self._copy,
            words.Watch: self._watch,
            words.Hold: self._hold,
            words.LetGo: self._let_go,
            words.Suspend: self._suspend,
            words.Wake: self._wake,
            words.Shut: self._shut,
            words.Drain: self._drain,
            words.SendFinal: self._send_final,
            words.Ask: self._ask,
            words.Cancel: self._cancel,
            words.Resume: self._resume,
            words.SendAbort: self._send_abort,
            words.Redirect: self._redirect,
            words.Settle: self._settle,
            words.Purge: self._purge,
            words.Tell: self._tell,
        }

    # ---- until the switchover ----

    async def _probe(self, _: words.Probe) -> None:
        self.beside("step", self._probe_path)

    async def _probe_path(self) -> None:
        """Several times: the first frame may be lost to an address that has to be resolved first."""
        size = ETHERNET + await self.call(self.ports.mtu)
        host, channel = self.order.destination, self.order.channel
        began, wait = time.monotonic(), PROBE_FIRST_S
        while (left := began + self.around.settings.probe_s - time.monotonic()) > 0:
            # Not in the lane: the far end may be slow, and the ports go on meanwhile.
            if await asyncio.to_thread(self.driver.probe_path, channel, host, size, min(wait, left)):
                self.report.lasted("probe", began)
                return self.post(words.Probed())
            wait *= 2
        raise MigrationError(
            f"no frame of {size} bytes comes back from {host}",
            hint="the underlay must carry full-size frames with 50 bytes of VXLAN around them, over IPv6 70 and uncut",
        )

    async def _connect(self, _: words.Connect) -> None:
        self.beside("connect", self._connect_until_there)

    async def _connect_until_there(self) -> None:
        settled = self.state.phase is Phase.SETTLING
        pause = 0.1
        while True:
            if self.stream is not None:
                await self.stream.close()
            self.stream = PeerStream(self.order, self._heard, self._lost, self.around.transport)
            begin = pb.Begin(migration=self.report.id, vm=self.vm, epoch=self.report.epoch, token=self.order.token)
            try:
                return await self.stream.open(begin, self.around.settings.connect_s)
            except PeerLost as error:
                if not settled:
                    return self.post(words.PeerLost(str(error)))
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, 5.0)

    def _lost(self, reason: str) -> None:
        self.post(words.PeerLost(reason))

    def _heard(self, message: pb.FromDestination) -> None:
        which = message.WhichOneof("message")
        if which == "ready":
            self.post(words.Ready())
        elif which == "round_done":
            self.rounds.loaded(message.round_done)
        elif which == "committed":
            self.report.commit(message.committed)
            self.post(words.PeerCommitted())
        elif which == "opened":
            if message.opened.degraded and self.flaw is None:
                self.tell("degraded", "the destination opened before all of the VM's state was there")
            self.report.mark("opened")
            self.post(words.PeerOpened(lacks=message.opened.takes_late and not self.order.without_state))
        elif which == "settled":
            self.post(words.PeerSettled())
        elif which == "failed":
            self.post(words.PeerFailed(message.failed.message))

    async def _copy(self, _: words.Copy) -> None:
        await self.call(self.ports.idle)  # opens its queue: a guest that stops by itself takes the device away
        if self.order.ordered_elsewhere:
            await self.guests.accompany(self.vm)
        else:
            await self.guests.migrate(self.vm, self.order.destination, move_options(self.order.move))
            self._moving_guest = True
        self.rounds.task = self.beside("copy", self.rounds.run)

    def _small_round(self) -> None:
        if self.state.phase is Phase.COPYING:
            self.post(words.Converged())

    async def _write(self, message: pb.FromSource) -> None:
        if self.stream is None:
            raise PeerLost("no stream to the destination")
        await self.stream.send(message)

    async def _watch(self, _: words.Watch) -> None:
        self.beside("watch", self._watch_memory)

    async def _watch_memory(self) -> None:
        try:
            fits = partial(wait_fits, partial(self.guests.remaining, self.vm, self.order.downtime_ms), self.report)
            await fits()
            while not self.rounds.near.is_set():  # meanwhile the guest writes to its memory
                await self.rounds.near.wait()
                await fits()
        except GuestFailed:
            if self.state.phase is Phase.WATCHING:
                raise
            return  # it stopped by itself meanwhile
        self.post(words.GuestFits())

    # ---- the switchover ----

    async def _hold(self, _: words.Hold) -> None:
        QUIET.begin(self.name)
        URGENT.begin(self.name)
        self.report.leading = True
        self.report.mark("held")
        self.beside("hold", self._hold_and_idle)

    async def _hold_and_idle(self) -> None:
        await self.call(self._for_a_lease, self.ports.hold)
        self.report.span("hold", "held")
        began = time.monotonic()
        # What has changed until now goes while the guest still runs: it would stand for it.
        await asyncio.gather(self._until_idle(), self.rounds.hurry())
        there = await self.rounds.relieve()
        self.report.lasted("idle_wait", began)
        self.post(words.Held() if there else words.Outrun())

    async def _let_go(self, _: words.LetGo) -> None:
        self.report.leading = False
        await self.call(self.ports.let_go)
        QUIET.end(self.name)
        URGENT.end(self.name)

    async def _until_idle(self) -> None:
        idle = partial(self.call, self.ports.idle)
        await wait_idle(idle, lambda: self.state.phase is Phase.HOLDING, self.around.settings, self.report)

    async def _suspend(self, _: words.Suspend) -> None:
        self.beside("suspend", self._suspend_guest)

    async def _suspend_guest(self) -> None:
        began = time.monotonic()
        try:
            await self.guests.suspend(self.vm)
        except GuestFailed:
            if self.state.phase is not Phase.SUSPENDING:
                return  # it stopped by itself meanwhile
            if self.guests.state(self.vm) is not Guest.PAUSED:
                raise
            self.post(words.GuestPaused(moving=True))  # it had been stopped before, and is moved so
        self.report.lasted("suspend", began)

    async def _wake(self, _: words.Wake) -> None:
        await self.guests.resume(self.vm)

    async def _shut(self, _: words.Shut) -> None:
        await self.call(self._for_a_lease, self.ports.shut)

    def _binding(self, before: machine.State) -> bool:
        """Whoever has sent `final` and does not remember would be certain that the destination has not committed."""
        return self.state.final and not before.final

    async def _drain(self, action: words.Drain) -> None:
        """Beside the actions: a destination that reads nothing must not keep a guest that comes back waiting."""
        earlier = self._beside.pop("drain", None)

        async def work() -> None:
            if earlier is not None:
                await earlier
            await self._drain_all(action)

        self.beside("drain", work)

    async def _drain_all(self, action: words.Drain) -> None:
        QUIET.begin(self.name)
        URGENT.begin(self.name)
        if action.follow:
            self.report.leading = False
            self.report.frames["may_be_lost"] = 2 * len(self.refs)  # each NIC's hypervisor may swallow two
            self.report.warn("the guest stopped by itself: one or two frames may be lost")
        self.stop_beside("watch")
        self.rounds.halt()
        first = await self.call(self._shut_and_drain)
        await self.rounds.halted()  # what it was sending goes before
        for batch in first:
            await self.rounds.send(batch)
        if not first or first[-1].restart:
            await self.rounds.send_rest()
        if action.follow:
            await self.call(self.ports.take)
        self.post(words.Drained())

    def _for_a_lease(self, hold: Callable[[], None]) -> None:
        """A hold of an agent that dies at once must end as well, whatever the phase is."""
        hold()
        self._set_lease()

    def _shut_and_drain(self) -> list[Batch]:
        """In the lane, in one go: it is what the guest waits for. Nothing when the first dump is not complete."""
        began = time.monotonic()
        self._for_a_lease(self.ports.shut)
        self.report.lasted("quiesce", began)
        began = time.monotonic()
        batches = [self.copier.drain()] if self.copier.dumped else []
        self.report.lasted("drain", began)
        return batches

    async def _send_final(self, _: words.SendFinal) -> None:
        self.beside("final", self._send_last)

    async def _send_last(self) -> None:
        self.report.mark("final")
        self.report.span("final", "paused", "final")
        await self.rounds.send_final()

    async def _redirect(self, _: words.Redirect) -> None:
        self.stop_beside("step", "connect", "watch", "hold", "ask", "drain", "final")
        self.report.mark("opened")
        self.rounds.halt()
        await self.call(self.ports.redirect, self.order.channel, self.order.destination)
        self.report.span("held_delivered", "opened")
        self.report.span("downtime", "paused", "opened")
        QUIET.end(self.name)
        URGENT.end(self.name)
        await self.rounds.halted()
        self.post(words.Redirected())

    async def _settle(self, action: words.Settle) -> None:
        self.beside("settle", lambda: self._send_accounts(late=action.late))

    async def _send_accounts(self, *, late: bool) -> None:
        began = time.monotonic()
        try:
            passed_on = await self.call(self.ports.passed_on)
            await self._write(pb.FromSource(redirecting=pb.Empty(), passed_on=passed_on))
            if late:
                await self._send_sections(self.copier.late())
            if not self.order.without_state:
                await self._send_sections(self.copier.settle())
            await self.until(lambda: self.report.measured, MEASURED_S)
            await self._write(pb.FromSource(settle_end=pb.Empty()))
        except PeerLost as error:
            self.post(words.PeerLost(str(error)))
        self.report.lasted("settle", began)

    async def _send_sections(self, tables: Iterator[list[bytes]]) -> None:
        while (sections := await self.call(next, tables, None)) is not None:
            for section in sections:
                await self._write(pb.FromSource(section=section))

    async def _purge(self, action: words.Purge) -> None:
        self.stop_beside("connect", "settle")
        await self.call(self.ports.purge, action.keep_redirect)
        if self.stream is not None:
            await self.stream.close()

    # ---- back ----

    async def _ask(self, _: words.Ask) -> None:
        self.beside("ask", self._ask_until_answered)

    async def _ask_until_answered(self) -> None:
        query = pb.MoveQuery(migration=self.report.id, vm=self.vm, epoch=self.report.epoch)
        pause = 0.05
        while True:
            try:
                said = await ask(self.order, query, self.around.settings.step_s, self.around.transport)
            except MigrationError as error:
                self.log.info("no answer", error=str(error))
            else:
                return self.post(words.PeerSaid(committed=said.committed, opened=said.opened))
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, 2.0)

    async def _cancel(self, action: words.Cancel) -> None:
        """Beside the actions: the guest may run here long before its hypervisor answers."""
        self.beside("cancel", lambda: self._cancel_move(certain=action.certain))

    async def _cancel_move(self, *, certain: bool) -> None:
        runs = await self.guests.cancel(self.vm, certain=certain)
        self.post(words.GuestResumed() if runs else words.CancelFailed())

    async def _resume(self, _: words.Resume) -> None:
        self.stop_beside("step", "connect", "watch", "hold", "ask", "drain", "final", "cancel")
        self.rounds.halt()
        began = time.monotonic()
        await self._resume_ports()
        self.report.lasted("resume", began)
        self.tell_waiters()
        QUIET.end(self.name)
        URGENT.end(self.name)
        await self.rounds.halted()
        if self.state.suspended:
            self._waking = self.beside("wake", self._wake_after_all)
            self._waking.add_done_callback(lambda _: self.heard())
        elif self._moving_guest and self.state.guest is Guest.RUNNING:
            await self.guests.cancel(self.vm, certain=False)

    async def _wake_after_all(self) -> None:
        """Our own stop of the guest may have come after it was seen to run here: nobody but us will start it."""
        if "suspend" in self._beside:
            await asyncio.wait({self._beside["suspend"]})
        if self.state.guest is Guest.RUNNING:
            await self.guests.cancel(self.vm, certain=True)

    async def _resume_ports(self) -> None:
        for left in reversed(range(RESUME_TRIES)):
            try:
                await self.call(self.ports.resume)
                return
            except Error as error:
                if not left:
                    raise
                self.log.warning("not all ports are active, tried again", error=str(error))

    async def _send_abort(self, action: words.SendAbort) -> None:
        if self.stream is None:
            return
        with contextlib.suppress(PeerLost, TimeoutError):  # the coordinator tells it then
            async with asyncio.timeout(ABORT_S):
                await self._write(pb.FromSource(abort=pb.Abort(migration=self.report.id, reason=action.reason)))
        self.stop_beside("connect")
        await self.stream.finish()

    async def _tell(self, action: words.Tell) -> None:
        self.tell(action.what, action.reason)
