"""Migrations as operators order them and agents tell of them: what is asked, what is heard, what is refused."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress

import structlog
from google.protobuf import json_format

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator import orders
from migrator.coordinator.change import Moving, epoch_counter
from migrator.coordinator.execution import Execution
from migrator.coordinator.fanout import Fanout
from migrator.coordinator.orders import preflight
from migrator.coordinator.places import Acknowledgements
from migrator.coordinator.roster import Roster
from migrator.coordinator.running import Agreed, Running, merge, new_report
from migrator.coordinator.settings import Deadlines
from migrator.coordinator.store import Store
from migrator.coordinator.whereabouts import refuse_contradiction, whereabouts
from migrator.errors import AlreadyMigrating, IllegalTransition, MigrationNotFound, PeerLost
from migrator.lifecycle import coordinator as machine
from migrator.lifecycle.machine import Role

CHANNEL_MAX = (1 << 24) - 1

log = structlog.get_logger()


def free_channel(ports: int, live: Iterable[Running]) -> int:
    """First of `ports` successive channels, one a port, at random and apart from those of live migrations."""
    taken = [range(run.agreed.channel, run.agreed.channel + max(len(run.epochs), 1)) for run in live]
    while True:
        first = secrets.randbelow(CHANNEL_MAX - ports) + 1
        if not any(first < other.stop and other.start < first + ports for other in taken):
            return first


class Migrations:
    """All migrations of the cluster. One of a VM at a time; any number of different VMs."""

    def __init__(
        self, store: Store, roster: Roster, fanout: Fanout, places: Acknowledgements, deadlines: Deadlines
    ) -> None:
        self._store, self._roster, self._deadlines = store, roster, deadlines
        self._execution = Execution(store, roster, fanout, places, deadlines)

    def restart(self) -> None:
        """Finish or undo what the journal has; called once, before agents attach."""
        self._execution.restart()

    def stop(self) -> None:
        """Let go of timers and of questions to agents; what is in hand stays in the journal as it is."""
        self._execution.stop()

    # ---- what the operator asks ----

    def migrating(self) -> Moving:
        """VMs whose ports may be at either end now."""
        return {run.agreed.vm: run.agreed.destination for run in self._execution.running.values() if run.blocks}

    def moving(self, vm: str) -> Agreed | None:
        """What was agreed on for the migration that has the VM's ports at either end now."""
        run = self._blocking(vm)
        return run.agreed if run is not None else None

    def reports(self) -> list[pb.Migration]:
        return list(self._store.catalog.objects["migration"].values())

    async def migrate(self, request: pb.MigrateRequest) -> str:
        """Begin a migration; returns its id.

        Raises MigrationNotFound (VM), PreflightFailed, AlreadyMigrating.
        """
        vm = self._store.catalog.vm_named(request.vm)
        if vm is None:
            raise MigrationNotFound(f"no port is declared for VM {request.vm!r}", hint="`migrator port list` shows all")
        await self._wait_for_undoing(vm)
        preflight(self._store.catalog, self._roster, vm, request)
        agreed = self._agree(vm, request)
        state, actions = machine.begin(dry_run=request.dry_run)
        epochs = {port.mac: self._store.catalog.epoch(port) for port in self._store.catalog.ports_of(vm)}
        run = Running(agreed, state, new_report(agreed), epochs)
        log.info("migration begins", migration=run.id, vm=vm, source=agreed.source, destination=agreed.destination)
        self._execution.begin(run, actions)
        return run.id

    async def _wait_for_undoing(self, vm: str) -> None:
        """A migration whose outcome is told may still be undoing its traces; any other is in the way."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._deadlines.undo_s
        while (run := self._blocking(vm)) is not None:
            if not run.machine.finished or clock() >= deadline:
                raise AlreadyMigrating(
                    f"VM {vm} is being moved to {run.agreed.destination} by migration {run.id}",
                    hint=f"`migrator migration show {run.id}`",
                )
            with suppress(TimeoutError):
                await asyncio.wait_for(run.news.wait(), deadline - clock())

    def _blocking(self, vm: str) -> Running | None:
        return next((run for run in self._execution.running.values() if run.agreed.vm == vm and run.blocks), None)

    def _agree(self, vm: str, request: pb.MigrateRequest) -> Agreed:
        return Agreed(
            id=str(uuid.uuid4()),
            vm=vm,
            source=self._store.catalog.host_of(vm),
            destination=request.to,
            epoch=self._store.journal.counter(epoch_counter(vm)) + 1,
            channel=free_channel(len(self._store.catalog.ports_of(vm)), self._execution.running.values()),
            token=secrets.token_hex(16),
            strict=request.strict,
            without_state=request.without_state,
            ordered_elsewhere=request.ordered_elsewhere,
            timeout_s=request.timeout_s or self._deadlines.pre_copy_s,
            downtime_ms=request.downtime_ms,
            move=json_format.MessageToDict(request.move, preserving_proto_field_name=True),
        )

    def abort(self, migration: str, reason: str = "") -> pb.Migration:
        """Ask for the end of a migration. Raises MigrationNotFound, IllegalTransition (too late)."""
        run = self._find(migration)
        if run.machine.phase in machine.MOVED:
            raise IllegalTransition(f"migration {run.id} has moved the VM already", hint="migrate it back")
        self._execution.feed(run, machine.AbortAsked(reason or "aborted by the operator"))
        return run.report

    async def resolve(self, migration: str, guest_at: str) -> pb.Migration:
        """The operator says where the guest is, and no hypervisor says otherwise.

        Raises MigrationNotFound, IllegalTransition.
        """
        run = self._find(migration)
        role = run.agreed.role(guest_at)
        if role is None:
            hosts = f"{run.agreed.source} or {run.agreed.destination}"
            raise IllegalTransition(f"migration {run.id} is not with host {guest_at}", hint=f"--guest-at {hosts}")
        self._refuse_decided(run)
        refuse_contradiction(run, guest_at, await whereabouts(self._roster, run))
        self._refuse_decided(run)  # it may have come to an end meanwhile
        self._execution.feed(run, machine.Resolved(role))
        return run.report

    def _refuse_decided(self, run: Running) -> None:
        if run.machine.phase not in machine.UNDECIDED:
            raise IllegalTransition(
                f"migration {run.id} is {run.machine.phase.reported}: nothing is in doubt",
                hint="`migrator migration list`",
            )

    async def follow(self, migration: str) -> AsyncIterator[pb.Migration]:
        """The report whenever it changes (the newest only), until it is done. Raises MigrationNotFound."""
        while (run := self._execution.running.get(migration)) is not None:
            news, sent = run.news, orders.copy(run.report)
            yield sent
            if sent.done:
                return
            if self._execution.stopped:
                raise PeerLost(
                    f"the coordinator stops; migration {migration} goes on", hint="`migrator migration show`"
                )
            await news.wait()
        report = self._store.catalog.objects["migration"].get(migration)
        if report is None:
            raise MigrationNotFound(f"no migration {migration!r}", hint="`migrator migration list` shows those kept")
        yield orders.copy(report)

    # ---- what agents say ----

    def attached(self, hello: pb.Hello) -> None:
        """An agent is here (again): what it says of its ports may be news, then it is told what it missed."""
        for run in list(self._execution.running.values()):
            role = run.agreed.role(hello.host)
            if role is None:
                continue
            for word in orders.missed(run, role, hello):
                self._execution.feed(run, machine.Said(role, word))
            self._execution.feed(run, machine.Back(role))
            self._execution.doubts.consider(run)

    def guest(self, host: str, news: pb.GuestEvent) -> None:
        """What a hypervisor said. One that has a VM no more gave it to the other host, or it has ended."""
        for run in list(self._execution.running.values()):
            if run.agreed.vm == news.vm and run.agreed.role(host) and news.state == "gone":
                self._execution.doubts.look(run)

    def progress(self, host: str, news: pb.Progress) -> None:
        run = self._execution.running.get(news.migration)
        role = run.agreed.role(host) if run else None
        if run is None or role is None:
            log.info(
                "progress of a migration that is not in hand", migration=news.migration, host=host, said=news.event
            )
            return
        merge(run.report, news.report)
        if role is Role.DESTINATION:
            run.opened_with = max(run.opened_with, news.report.revision)
        reason = news.problem.message or news.report.reason
        if news.event in machine.WORDS:
            log.info("agent says", migration=run.id, host=host, said=news.event, reason=reason)
            self._execution.feed(run, machine.Said(role, news.event, reason))
        self._execution.report_soon(run)

    def redirect_idle(self, host: str, news: pb.RedirectIdle) -> None:
        """A redirect passes nothing any more; it ends when all hosts know the new place."""
        for run in list(self._execution.running.values()):
            if run.agreed.source == host and run.agreed.vm == news.vm and news.epoch in run.epochs.values():
                self._execution.feed(run, machine.RedirectIdle())
                return
        places = self._store.catalog.places_of(news.vm)
        if not any(place.host == host and place.epoch == news.epoch for place in places):
            self._roster.send(host, end_redirect=pb.EndRedirect(vm=news.vm, epoch=news.epoch))

    # ---- changes of the configuration during a migration ----

    def instances_of(self, vm: str) -> list[tuple[str, int]]:
        """Hosts and epochs of instances beside the one where the VM is: staged ones, which changes go to as well."""
        return [
            (run.agreed.destination, run.agreed.epoch)
            for run in self._execution.running.values()
            if run.agreed.vm == vm and run.blocks and run.machine.phase in orders.STAGED
        ]

    def _find(self, migration: str) -> Running:
        run = self._execution.running.get(migration)
        if run is None:
            if migration in self._store.catalog.objects["migration"]:
                raise IllegalTransition(
                    f"migration {migration} has ended", hint=f"`migrator migration show {migration}`"
                )
            raise MigrationNotFound(f"no migration {migration!r}", hint="`migrator migration list` shows all")
        return run
