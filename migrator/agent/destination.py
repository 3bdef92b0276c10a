"""The destination's end of a migration: carries out what its machine says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from datapath.provider import PortRef
from datapath.registry import KINDS
from datapath.state.kind import Op
from migrator import announce
from migrator._pb import migrator_pb2 as pb
from migrator.agent import orders
from migrator.agent.end import End, Surroundings
from migrator.agent.loading import Arrival
from migrator.agent.quiet import QUIET, URGENT
from migrator.agent.report import Report
from migrator.agent.switchover import each
from migrator.errors import Corrupt, MigrationError, PreflightFailed
from migrator.lifecycle import destination as machine
from migrator.lifecycle import destination_words as words
from migrator.lifecycle.destination_words import Phase
from migrator.lifecycle.machine import Action, Event, Role
from migrator.snapshot import decode_section

ANNOUNCE_S = (0.0, 0.05, 0.15)  # pauses before each announcement: 0, 50 and 200 ms after the ports have opened
PASSED_ON_S = 0.1  # what the network lost of it is waited for no longer
PASSED_ON_POLL_S = 0.001
ROUNDS_MAX = (1 << 32) - 1  # a report can tell of no more
DEVICES_S = 1.0  # not longer: a hypervisor may make them as late as it likes
DEVICES_POLL_S = 0.002
SOURCE_FIRST_S = 1.0  # less than the switch waits by itself, which keeps no order
LEASED = frozenset(Phase) - {Phase.STAGING, Phase.OPENING, Phase.OPEN, *words.OVER}


class ToSource(Protocol):
    """The way back to the source, while its stream is up."""

    def send(self, message: pb.FromDestination) -> None: ...


class DestinationEnd(End):
    """One VM on its way here. `order` is the coordinator's; `answer` is given why it is refused, "" when it is not."""

    role = Role.DESTINATION

    def __init__(
        self, around: Surroundings, order: pb.PrepareDestination, state: machine.State, answer: Callable[[str], None]
    ) -> None:
        report = Report(order.migration, order.vm, order.epoch, order.source, around.host)
        self.need = orders.need_of(order.need, around.driver.kinds())
        refs = [PortRef(order.vm, str(record["mac"]), order.epoch) for record in self.need.records]
        self.order = order
        self.arrival = Arrival(around.driver, refs, report)
        self._answer = answer
        self._source: ToSource | None = None
        self._passed_on: dict[str, int] = {}  # MAC -> frames that the source has redirected
        self._dropped: dict[PortRef, int] = {}  # frames that found a hold full, since the ports were staged
        self._asking: list[asyncio.Future[pb.MoveState]] = []
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
        return {
            Phase.STAGED: settings.staged_s,
            Phase.LOADING: None,
            Phase.WAITING: settings.last_changes_s,
            Phase.OPEN: settings.settle_s * 2,
        }.get(self.state.phase, settings.step_s)

    @property
    def over(self) -> bool:
        return self.state.phase in words.OVER

    @property
    def leased(self) -> bool:
        return self.state.phase in LEASED

    def _handlers(self) -> Mapping[type[Action], Callable[[Any], Coroutine[Any, Any, None]]]:
        return {
            words.Stage: self._stage,
            words.Accept: self._accept,
            words.Refuse: self._refuse,
            words.SendReady: self._send_ready,
            words.Commit: self._commit,
            words.SendCommitted: self._send_committed,
            words.SendFailed: self._send_failed,
            words.Open: self._open,
            words.SendOpened: self._send_opened,
            words.OpenBroadcast: self._open_broadcast,
            words.CloseAccounts: self._close_accounts,
            words.SendSettled: self._send_settled,
            words.Purge: self._purge,
            words.Answer: self._answer_source,
            words.Tell: self._tell,
        }

    # ---- what the source sends (called by the peer service, one message at a time) ----

    def attach(self, source: ToSource) -> None:
        self._source = source
        self.post(words.Begun())

    def detach(self, source: ToSource) -> None:
        if self._source is source:
            self._source = None
            self.post(words.PeerLost())

    def load(self, sealed: bytes) -> asyncio.Future[None]:
        """Begin to load a section, in the order in which they came. Ends with Error when it cannot be."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self.around.lane(self.vm), self._load, sealed)

    async def receive(self, message: pb.FromSource) -> None:
        """Apply a message that is no section; all sections before it are loaded. Raises Error if it cannot be."""
        which = message.WhichOneof("message")
        if which in {"round_end", "final"} and self.state.phase in {Phase.OPENING, Phase.OPEN, Phase.SETTLED}:
            return  # too late, and what came before it was not loaded either
        if which == "round_end":
            end = message.round_end
            if end.pausing:
                URGENT.begin(self.name)
            self.arrival.check(end.round, end.records, end.digest)
            await self._finish_copy()
            self.report.rounds = min(end.round + 1, ROUNDS_MAX)
            await self._wait_for_devices()
            done = pb.RoundDone(round=end.round, loaded=self.arrival.loaded, rejected=dict(self.report.not_moved))
            self._send(pb.FromDestination(round_done=done))
        elif which == "final":
            QUIET.begin(self.name)
            URGENT.begin(self.name)
            self.report.mark("final")
            self.arrival.check(message.final.round, message.final.records, message.final.digest)
            await self._finish_copy()
            if self.order.strict and self.report.not_moved:
                raise MigrationError(f"strict: not moved: {dict(self.report.not_moved)}")
            self.post(words.FinalReceived())
        elif which == "restart":
            await self.call(self._begin_again)
        elif which == "redirecting":
            self._passed_on = dict(message.passed_on)
            self.post(words.Redirecting())
        elif which == "settle_end":
            self.post(words.SettleEnd())
        elif which == "abort":
            self.post(words.SourceAborted(message.abort.reason))
        else:
            raise Corrupt(f"a message {which!r} is not expected here")

    async def _wait_for_devices(self) -> None:
        """The switch has them before the source hears that a round is loaded: it stops no guest before that.

        A guest that runs on a device which the switch has not seen sends frames to nobody.
        """
        deadline = time.monotonic() + DEVICES_S
        while self.state.phase is Phase.LOADING and time.monotonic() < deadline:
            if await self.call(self._has_devices):
                return
            await asyncio.sleep(DEVICES_POLL_S)

    def _has_devices(self) -> bool:
        return all(self.driver.port(ref).ifindex for ref in self.refs if self.order.devices.get(ref.mac))

    def _load(self, sealed: bytes) -> None:
        section = decode_section(sealed)
        settled = self.state.phase in {Phase.OPEN, Phase.SETTLED}
        if section.op is Op.FILL and not (settled and self.state.degraded):
            raise Corrupt("tables that nobody waits for")
        if section.op is Op.FILL and self.state.phase is not Phase.OPEN:
            return
        if section.op in (Op.LOAD, Op.DELETE) and self.state.phase not in {Phase.LOADING, Phase.WAITING}:
            return  # too late: the ports have opened with what there was
        if section.op is Op.ACCOUNT and not settled:
            raise Corrupt("accounting before the switchover")
        self.arrival.load(section)

    # ---- actions ----

    async def _stage(self, _: words.Stage) -> None:
        await self.call(self._stage_all)
        self.post(words.Staged())

    def _stage_all(self) -> None:
        reasons = self.driver.probe(self.need)
        if reasons:
            host = self.around.host
            raise PreflightFailed(f"host {host} cannot take the VM", hint="nothing has changed", reasons=reasons)
        for ref, record in zip(self.refs, self.need.records, strict=True):
            self.arrival.revisions[ref] = int(record.get("revision", 0))
            self.driver.stage(ref, record, self.order.devices.get(ref.mac, ""))
            self.driver.set_lease(ref, self.around.settings.lease_s)
            channel = orders.port_channel(self.order.channel, (one.mac for one in self.refs), ref.mac)
            self.driver.accept_redirect(ref, channel, self.order.source)

    def _begin_again(self) -> None:
        """The ports stay: the guest may run here by now, and its frames wait at them."""
        if self.state.phase in {Phase.LOADING, Phase.WAITING}:
            self.arrival.restart()

    async def _finish_copy(self) -> None:
        if self.arrival.copying_again and self.state.phase in {Phase.LOADING, Phase.WAITING}:
            await self.call(self.arrival.finish_copy)

    async def _accept(self, _: words.Accept) -> None:
        self._answer("")

    async def _refuse(self, action: words.Refuse) -> None:
        self._answer(action.reason)

    async def _send_ready(self, _: words.SendReady) -> None:
        self._send(pb.FromDestination(ready=pb.Empty()))
        if self.state.phase in {Phase.OPEN, Phase.SETTLED}:
            self._send(pb.FromDestination(opened=self._opened()))

    async def _commit(self, _: words.Commit) -> None:
        began = time.monotonic()
        await self.call(self._commit_all)
        self.report.lasted("commit", began)
        self.guests.unguard(self.vm, self.role, self.report.id)
        self.post(words.CommitDone())
        self.guests.committed(self.vm)

    def _commit_all(self) -> None:
        for ref in self.refs:
            self.driver.commit(ref)

    async def _send_committed(self, _: words.SendCommitted) -> None:
        arrival = self.arrival
        committed = pb.Committed(
            epoch=self.report.epoch, moved=dict(arrival.moved()), not_moved=dict(self.report.not_moved)
        )
        self._send(pb.FromDestination(committed=committed))

    async def _send_failed(self, action: words.SendFailed) -> None:
        self._send(pb.FromDestination(failed=pb.Problem(kind="MigrationError", message=action.reason)))

    async def _open(self, action: words.Open) -> None:
        if action.degraded:
            self.report.warn("the ports opened before all of the VM's state was here")
        self.report.mark("resumed")
        self.report.moved = self.arrival.moved()
        await self.call(self._open_all, action.degraded)
        self.report.span("open", "resumed")
        # Of what did not come rules may be a part: without a revision the coordinator says all of them again.
        self.report.revision = 0 if action.degraded else self.arrival.revision
        self.post(words.Opened())
        self.beside("source-first", self._wait_for_source)

    async def _wait_for_source(self) -> None:
        """What comes by itself waits for what the source held, and no longer: the source may be dead."""
        await asyncio.sleep(SOURCE_FIRST_S)
        if self.state.phase in {Phase.OPEN, Phase.SETTLED}:
            await self.call(self._broadcast_all)

    def _open_all(self, degraded: bool) -> None:
        def open_one(ref: PortRef) -> None:
            if degraded and not self.driver.port(ref).committed:
                self.driver.commit(ref)
            pumped = self.driver.open(ref, broadcast=degraded and self._source is None)
            self.report.frames["released"] += pumped.passed
            self._dropped[ref] = pumped.dropped

        each(self.refs, open_one)

    async def _announce(self) -> None:
        """Say on every wire where the VM is. What is lost of it, the places that the coordinator gives make up for."""
        said = [(ref, await self.call(self._announcements, ref)) for ref in self.refs]
        for pause in ANNOUNCE_S:
            await asyncio.sleep(pause)
            for ref, frames in said:
                await self.call(lambda r, f: self.driver.inject(r, f, judged=False), ref, frames)

    def _record(self, ref: PortRef) -> dict[str, Any]:
        return self.driver.port(ref).record

    def _announcements(self, ref: PortRef) -> list[bytes]:
        held = self.driver.kinds()
        kinds = [kind for kind in KINDS.values() if kind.announced and kind.name in held]
        tables = [(kind, table) for kind in kinds for table in self.driver.dump(ref, kind.name)]
        found = [record[kind.announced] for kind, table in tables for record in table.records or ()]
        return announce.frames(self._record(ref), list(dict.fromkeys(found)))

    async def _send_opened(self, _: words.SendOpened) -> None:
        self._send(pb.FromDestination(opened=self._opened()))
        self.beside("announce", self._announce)  # behind that word: the guest waits for what the source holds
        QUIET.end(self.name)
        URGENT.end(self.name)

    def _opened(self) -> pb.Opened:
        opened_ms = self.report.times_ms.get("open", 0.0)
        return pb.Opened(
            epoch=self.report.epoch,
            degraded=self.state.degraded,
            opened_ms=opened_ms,
            revision=self.report.revision,
            takes_late=self.state.degraded and self.state.phase is not Phase.SETTLED,
        )

    async def _open_broadcast(self, _: words.OpenBroadcast) -> None:
        """What the source passed on may still be on its way: another path than that of its word."""
        deadline = time.monotonic() + PASSED_ON_S
        while not await self.call(self._all_came) and time.monotonic() < deadline:
            await asyncio.sleep(PASSED_ON_POLL_S)
        await self.call(self._broadcast_all)

    def _all_came(self) -> bool:
        return all(self.driver.passed_on(ref)[1] >= self._passed_on.get(ref.mac, 0) for ref in self.refs)

    def _broadcast_all(self) -> None:
        def let_go(ref: PortRef) -> None:
            self._dropped[ref] = self.driver.set_broadcast(ref, True).dropped

        each(self.refs, let_go)
        self.report.frames["dropped_at_destination"] = sum(self._dropped.values())

    async def _close_accounts(self, _: words.CloseAccounts) -> None:
        await self.call(self._settled_all)

    def _settled_all(self) -> None:
        each(self.refs, self.driver.settled)

    async def _send_settled(self, _: words.SendSettled) -> None:
        self._send(pb.FromDestination(settled=pb.Empty()))

    async def _purge(self, _: words.Purge) -> None:
        await self.call(self._purge_all)
        self.guests.unguard(self.vm, self.role, self.report.id)
        QUIET.end(self.name)
        URGENT.end(self.name)

    def _purge_all(self) -> None:
        each(self.refs, self.driver.purge)

    async def _answer_source(self, _: words.Answer) -> None:
        """Not while the ports open: what the source redirects on that word would find them shut. It is said again."""
        if self.state.phase is Phase.OPENING:
            return
        asking, self._asking = self._asking, []
        for waiting in asking:
            if not waiting.done():
                waiting.set_result(self.move_state())

    async def _tell(self, action: words.Tell) -> None:
        lost = sum(self.report.not_moved.values())
        if action.what == "opened" and lost:
            self.tell("degraded", f"{lost} records were not moved")
        else:
            self.tell(action.what, action.reason)

    # ---- questions ----

    def move_state(self) -> pb.MoveState:
        opened = self.state.phase in {Phase.OPEN, Phase.SETTLED}
        return pb.MoveState(state=str(self.state.phase), committed=self.state.committed, opened=opened, known=True)

    async def ask(self) -> pb.MoveState:
        """The answer to the source's question, when it can be given."""
        waiting: asyncio.Future[pb.MoveState] = asyncio.get_running_loop().create_future()
        self._asking.append(waiting)
        self.post(words.Asked())
        self.not_elsewhere()
        return await waiting

    def not_elsewhere(self) -> None:
        """The guest is not at the source, say who can know: without a hypervisor it runs here by the commit."""
        if self.state.phase is Phase.COMMITTED:
            self.guests.committed(self.vm)

    def _send(self, message: pb.FromDestination) -> None:
        if self._source is not None:
            self._source.send(message)

    def _finish(self) -> None:
        QUIET.end(self.name)
        URGENT.end(self.name)
        super()._finish()
