"""The migrations that this agent has in hand, and what the coordinator orders of them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from google.protobuf.message import DecodeError

from datapath.errors import Error, PortNotFound
from datapath.provider import Event, PortRef, PortState
from migrator._pb import migrator_pb2 as pb
from migrator.agent import orders
from migrator.agent.destination import DestinationEnd
from migrator.agent.end import End, Surroundings
from migrator.agent.guests import GuestEvent, found, whereabouts
from migrator.agent.source import SourceEnd
from migrator.agent.switchover import each
from migrator.errors import AlreadyMigrating, Corrupt, JournalFailed, MigrationNotFound, PreflightFailed
from migrator.lifecycle import destination as destination_machine
from migrator.lifecycle import destination_words as arriving
from migrator.lifecycle import source as source_machine
from migrator.lifecycle import source_words as leaving
from migrator.lifecycle.machine import Guest, Role, Verdict

PAST_MAX = 1024


class Ends:
    """`on_ended(vm, epoch)` is told of each port instance that has ended here."""

    def __init__(self, around: Surroundings, on_ended: Callable[[str, int], None]) -> None:
        self._around = around
        self._on_ended = on_ended
        self._ends: dict[tuple[str, Role], End] = {}
        self._past: OrderedDict[str, pb.MoveState] = OrderedDict()
        self._log = structlog.get_logger()

    def __iter__(self) -> Any:
        return iter(list(self._ends.values()))

    def of(self, vm: str) -> list[End]:
        """Ends of a VM, the newest first."""
        return sorted((end for end in self if end.vm == vm), key=lambda end: -end.report.epoch)

    def in_hand(self, vm: str) -> bool:
        return bool(self.of(vm))

    def instance(self, ref: PortRef) -> tuple[str, str]:
        """Migration and role that a port instance takes part in, "" for none."""
        for end in self.of(ref.vm):
            if ref in end.refs:
                return end.report.id, str(end.role)
        return "", ""

    def taking_part(self, ref: PortRef) -> bool:
        """Is the instance at either end of a migration that is not over?"""
        return any(ref in end.refs and not end.over for end in self.of(ref.vm))

    def changed(self, ref: PortRef, revision: int, again: Callable[[], None]) -> None:
        """The configuration of an instance was changed: see migrator.agent.host.Changed."""
        for end in self.of(ref.vm):
            if isinstance(end, DestinationEnd) and ref in end.refs:
                end.arrival.configured(ref, revision, again)

    def destination(self, migration: str) -> DestinationEnd | None:
        end = self._ends.get((migration, Role.DESTINATION))
        return end if isinstance(end, DestinationEnd) else None

    def past(self, migration: str) -> pb.MoveState | None:
        """How a migration that came here ended, while that is remembered."""
        return self._past.get(migration)

    async def found(self, vm: str, epoch: int) -> pb.MoveState:
        """What became of an instance that nothing is remembered of: only who never had its guest is not known."""
        statuses = await self._around.call(vm, self._around.driver.ports, vm)
        lived = {PortState.ACTIVE, PortState.QUIESCED, PortState.STUB}
        # A newer one in its place: it has been open here and moved on.
        opened = any(s.ref.epoch >= epoch and s.state in lived for s in statuses)
        return pb.MoveState(state="open" if opened else "unknown", committed=opened, opened=opened, known=opened)

    # ---- orders ----

    async def describe(self, vm: str) -> pb.Need:
        """Raises PortNotFound, AlreadyMigrating."""
        self._refuse_second(vm)
        statuses = await self._around.call(vm, self._around.driver.ports, vm)
        refs = sorted(s.ref for s in statuses if s.state is PortState.ACTIVE)
        if not refs:
            raise PortNotFound(f"VM {vm} has no active port on {self._around.host}", hint="is the VM on this host?")
        need = await self._around.call(vm, self._around.driver.describe, refs)
        return orders.need_message(need, refs)

    def _refuse_second(self, vm: str) -> None:
        for end in self.of(vm):
            if isinstance(end, SourceEnd) and end.state.phase not in leaving.LEFT:
                raise AlreadyMigrating(f"VM {vm} is being moved by migration {end.report.id}")

    async def guard(self, order: pb.PrepareDestination | pb.StartSource, role: Role) -> None:
        """Have the hypervisor wait for our word if the order is strict. Raises PreflightFailed when it cannot."""
        why = await self._around.guests.guard(order.vm, role, order.migration) if order.strict else ""
        if why:
            raise PreflightFailed(
                f"VM {order.vm} cannot be moved strictly: {why}",
                hint=f"on {self._around.host}: `migrator libvirt install --strict`, then restart libvirtd",
            )

    def prepare(self, order: pb.PrepareDestination, answer: Callable[[str], None]) -> None:
        """Stage the VM's ports; `answer` is called once with why they cannot be, or "". Raises Corrupt."""
        for older in self.of(order.vm):
            if older.report.id == order.migration:
                return answer("" if older.state.phase is arriving.Phase.STAGED else f"it is {older.state.phase}")
            if isinstance(older, SourceEnd) and older.report.epoch < order.epoch:
                # The VM comes back, so it left: whoever missed that it arrived there learns it now.
                older.post(Verdict(guest_at=Role.DESTINATION, committed=True, opened=True))
        state, actions = destination_machine.begin(strict=order.strict)
        end = DestinationEnd(self._around, order, state, answer)
        self._ends[order.migration, Role.DESTINATION] = end
        end.begin(actions)
        return None

    def start(self, order: pb.StartSource) -> None:
        """Raises AlreadyMigrating."""
        if (order.migration, Role.SOURCE) in self._ends:
            return
        self._refuse_second(order.vm)
        state, actions = source_machine.begin()
        end = SourceEnd(self._around, order, state)
        self._ends[order.migration, Role.SOURCE] = end
        end.begin(actions)

    def authorise(self, migration: str) -> bool:
        """False when nothing of that migration is here."""
        ends = self._named(migration)
        for end in ends:
            if end.role is Role.SOURCE:
                end.post(leaving.Authorised())
        return bool(ends)

    def abort(self, order: pb.Abort) -> bool:
        """False when nothing of that migration is here."""
        ends = self._named(order.migration)
        for end in ends:
            words: Any = leaving if end.role is Role.SOURCE else arriving
            end.post(words.AbortAsked(order.reason))
        return bool(ends)

    def verdict(self, order: pb.Verdict) -> bool:
        """False when nothing of that migration is here."""
        ends = self._named(order.migration)
        for end in ends:
            nowhere = order.gone and whereabouts(self._around.guests, end.vm) is Guest.GONE
            if nowhere and isinstance(end, SourceEnd):
                end.post(leaving.GuestGone(moved=False))  # it may have ended before anybody listened
            at = {end.report.source: Role.SOURCE, end.report.destination: Role.DESTINATION}.get(order.guest_at)
            end.post(Verdict(guest_at=at, committed=order.committed, opened=order.opened, gone=order.gone))
            if at is None and not order.gone and isinstance(end, DestinationEnd):
                end.not_elsewhere()
        return bool(ends)

    async def end_redirect(self, order: pb.EndRedirect) -> None:
        """End the redirect of an instance, also when no migration is remembered for it."""
        for end in self.of(order.vm):
            if end.role is Role.SOURCE and order.epoch in {ref.epoch for ref in end.refs}:
                return end.post(leaving.EndRedirect())
        statuses = await self._around.call(order.vm, self._around.driver.ports, order.vm)
        for status in statuses:
            if (status.ref.epoch, status.state) == (order.epoch, PortState.STUB):
                await self._around.call(order.vm, self._around.driver.purge, status.ref)
        return None

    def _named(self, migration: str) -> list[End]:
        return [end for (name, _), end in self._ends.items() if name == migration]

    # ---- what happens here ----

    def guest(self, event: GuestEvent) -> None:
        """The hypervisor's word concerns the newest instance here, and no other."""
        for end in self.of(event.vm)[:1]:
            if isinstance(end, SourceEnd):
                _tell_source(end, event)
            elif event.what == "running":
                end.report.mark("resumed", event.time)
                end.post(arriving.GuestRunning())
            elif event.what == "gone":
                end.post(arriving.GuestGone())

    def switch(self, event: Event) -> None:
        """Something the switch saw: the first frame of a guest says as much as its hypervisor."""
        if event.what != "opened" or event.ref is None:
            return
        for end in self.of(event.ref.vm):
            if end.role is Role.DESTINATION and event.ref in end.refs:
                end.report.mark("resumed")
                end.post(arriving.GuestRunning())

    def tell_again(self) -> None:
        for end in self:
            end.tell_again()
            end.heard()

    # ---- the agent's own life ----

    async def recall(self) -> None:
        """Take up what an earlier run had in hand. What each end does next follows from where its guest is."""
        for saved in self._around.store.ends():
            try:
                role = Role(saved["role"])
                end = await (self._recall_source(saved) if role is Role.SOURCE else self._recall_destination(saved))
            except (ValueError, TypeError, KeyError, DecodeError, Corrupt) as error:
                self._around.store.doubt_end(f"{saved['id']}.{saved['role']}", f"{type(error).__name__}: {error}")
                continue
            self._ends[saved["id"], role] = end
            with contextlib.suppress(Error):  # tried again at intervals
                await end.renew_lease()  # most of it may have passed
            self._log.info("taken up", migration=saved["id"], vm=saved["vm"], role=role, phase=str(end.state.phase))

    async def _recall_source(self, saved: dict[str, Any]) -> SourceEnd:
        fields = saved["state"]
        state = source_machine.State(
            **{**fields, "phase": leaving.Phase(fields["phase"]), "guest": Guest(fields["guest"])}
        )
        end = SourceEnd(self._around, pb.StartSource.FromString(bytes.fromhex(saved["order"])), state)
        await end.call(partial(end.ports.recall, left=state.phase in leaving.LEFT))
        # A guest without a hypervisor runs here unless the destination may have been told to commit.
        unsaid = Guest.PAUSED if state.final else Guest.RUNNING
        guest = found(self._around.guests, end.vm, unsaid=unsaid)
        await self._guard_again(end)
        end.begin(())
        end.post(leaving.Restarted(guest))
        return end

    async def _recall_destination(self, saved: dict[str, Any]) -> DestinationEnd:
        fields = saved["state"]
        state = destination_machine.State(**{**fields, "phase": arriving.Phase(fields["phase"])})
        order = pb.PrepareDestination.FromString(bytes.fromhex(saved["order"]))
        end = DestinationEnd(self._around, order, state, lambda _: None)
        statuses = {status.ref: status for status in await end.call(self._around.driver.ports, end.vm)}
        await self._guard_again(end)
        if state.phase in arriving.OPENED:  # its switch writes that down late: a host that crashed has it staged
            staged = [ref for ref in end.refs if ref in statuses and statuses[ref].state is PortState.STAGED]
            broadcast = state.phase is arriving.Phase.SETTLED
            await end.call(lambda: each(staged, partial(self._around.driver.open, broadcast=broadcast)))
        here = {ref: statuses[ref].record for ref in end.refs if ref in statuses}
        end.arrival.revisions.update({ref: int(record.get("revision", 0)) for ref, record in here.items()})
        committed = all(ref in statuses and statuses[ref].committed for ref in end.refs)
        if committed:
            self._unguard(end)
        opened = any(ref in statuses and statuses[ref].state is PortState.ACTIVE for ref in end.refs)
        said = self._around.guests.state(end.vm)
        if said is None and committed and not opened:
            # Nobody knows: the operator may have taken the guest back meanwhile. Who can say so is heard first.
            end.state = replace(state, phase=arriving.Phase.COMMITTED, guest=False)
        end.begin(())
        end.post(arriving.Restarted(guest=opened or said is Guest.RUNNING, committed=committed))
        return end

    async def _guard_again(self, end: SourceEnd | DestinationEnd) -> None:
        if end.order.strict and not end.over:
            await self._around.guests.guard(end.vm, end.role, end.report.id)

    def _unguard(self, end: End) -> None:
        self._around.guests.unguard(end.vm, end.role, end.report.id)

    def ended(self, end: End) -> None:
        """Forget an end that is over."""
        self._unguard(end)
        self._ends.pop((end.report.id, end.role), None)
        if isinstance(end, DestinationEnd):
            self._past[end.report.id] = end.move_state()
            while len(self._past) > PAST_MAX:
                self._past.popitem(last=False)
        if not self.in_hand(end.vm):
            self._around.close_lane(end.vm)
        try:
            self._note_ended(end)
        except JournalFailed as error:  # remembered as long as this run lasts
            self._log.warning("end not written down", migration=end.report.id, error=str(error))

    def _note_ended(self, end: End) -> None:
        if isinstance(end, DestinationEnd) and end.state.phase is arriving.Phase.ABORTED:
            self._on_ended(end.vm, end.report.epoch)
        if isinstance(end, SourceEnd) and end.state.phase is leaving.Phase.RELEASED:
            self._on_ended(end.vm, max(ref.epoch for ref in end.refs))

    def close(self) -> None:
        for end in self:
            end.close()

    def find_source(self, vm: str) -> SourceEnd:
        """Raises MigrationNotFound."""
        for end in self.of(vm):
            if isinstance(end, SourceEnd):
                return end
        raise MigrationNotFound(f"no migration of VM {vm} is in hand here")


def _tell_source(end: SourceEnd, event: GuestEvent) -> None:
    if event.what == "measured":
        end.report.memory.update(event.memory)
        end.tell_waiters()
        end.tell_now("running")
    elif event.what == "running":
        end.post(leaving.GuestResumed())
    elif event.what == "paused":
        if event.moving or end.state.phase is leaving.Phase.SUSPENDING:
            end.report.mark("paused", event.time)
        end.post(leaving.GuestPaused(moving=event.moving))
    elif event.what == "gone":
        end.post(leaving.GuestGone(moved=event.moving))
    elif event.what == "failed":
        end.post(leaving.Failed(f"the hypervisor could not move the guest: {event.reason}"))
