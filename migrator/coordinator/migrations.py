"""Carries out the coordinator's machine for every migration: journal first, then act.

A step's new state, its report and, when the VM has moved, its new places are one durable write; only then are the
step's orders given. So what is found in the journal at start is never behind what an agent was told.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Iterable
from functools import partial

import structlog
from prometheus_client import Counter, Gauge, Histogram

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator import orders
from migrator.coordinator.catalog import moved_writes
from migrator.coordinator.change import epoch_counter
from migrator.coordinator.journal import Batch, MigrationRow, Write
from migrator.coordinator.orders import preflight
from migrator.coordinator.places import Acknowledgements
from migrator.coordinator.roster import Roster
from migrator.coordinator.running import Agreed, Running, close, decode, merge, new_report
from migrator.coordinator.settings import Deadlines
from migrator.coordinator.store import Store
from migrator.errors import AlreadyMigrating, IllegalTransition, MigrationNotFound, PeerLost, PreflightFailed
from migrator.lifecycle import coordinator as machine
from migrator.lifecycle.machine import Action, Event, Role

REPORTS_KEPT = 1_000
REPORT_INTERVAL_S = 0.1
CHANNEL_MAX = (1 << 24) - 1
DOWNTIME_MS = 300  # QEMU's own default

RUNNING = Gauge("migrator_migrations_running", "Migrations whose outcome is open")
ENDED = Counter("migrator_migrations_total", "Migrations that ended", ["outcome"])
DURATION = Histogram(
    "migrator_migration_seconds", "From the order to the outcome", buckets=(1, 3, 10, 30, 100, 300, 1000)
)

log = structlog.get_logger()
Phase = machine.Phase


class Migrations:
    """All migrations of the cluster. One of a VM at a time; any number of different VMs."""

    def __init__(self, store: Store, roster: Roster, places: Acknowledgements, deadlines: Deadlines) -> None:
        self._store, self._roster, self._places, self._deadlines = store, roster, places, deadlines
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._finished = [r.id for r in sorted(self.reports(), key=lambda r: r.finished_at) if r.done]

    # ---- what the operator asks ----

    def migrating(self) -> frozenset[str]:
        """VMs whose ports may be at either end now."""
        return frozenset(run.agreed.vm for run in self._running.values() if run.blocks)

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
        preflight(self._store.catalog, self._roster, vm, request.to)
        agreed = self._agree(vm, request)
        state, actions = machine.begin(dry_run=request.dry_run)
        epochs = {port.mac: self._store.catalog.epoch(port) for port in self._store.catalog.ports_of(vm)}
        run = Running(agreed, state, new_report(agreed), epochs)
        self._commit(run, counters={epoch_counter(vm): agreed.epoch})
        self._running[run.id] = run
        RUNNING.inc()
        log.info("migration begins", migration=run.id, vm=vm, source=agreed.source, destination=agreed.destination)
        self._after_step(run, state, actions)
        return run.id

    async def _wait_for_undoing(self, vm: str) -> None:
        """A migration whose outcome is told may still be undoing its traces; any other is in the way."""
        for run in [run for run in self._running.values() if run.agreed.vm == vm]:
            try:
                async with asyncio.timeout(self._deadlines.undo_s):
                    while run.blocks and run.machine.finished:
                        await run.news.wait()
            except TimeoutError:
                pass
            if run.blocks:
                raise AlreadyMigrating(
                    f"VM {vm} is being moved to {run.agreed.destination} by migration {run.id}",
                    hint=f"`migrator migration show {run.id}`",
                )

    def _agree(self, vm: str, request: pb.MigrateRequest) -> Agreed:
        channels = {run.agreed.channel for run in self._running.values()}
        channel = next(c for c in iter(lambda: secrets.randbelow(CHANNEL_MAX) + 1, 0) if c not in channels)
        return Agreed(
            id=str(uuid.uuid4()),
            vm=vm,
            source=self._store.catalog.host_of(vm),
            destination=request.to,
            epoch=self._store.journal.counter(epoch_counter(vm)) + 1,
            channel=channel,
            token=secrets.token_hex(16),
            strict=request.strict,
            without_state=request.without_state,
            ordered_elsewhere=request.ordered_elsewhere,
            timeout_s=request.timeout_s or self._deadlines.pre_copy_s,
            downtime_ms=request.downtime_ms or DOWNTIME_MS,
        )

    def abort(self, migration: str) -> pb.Migration:
        """Ask for the end of a migration. Raises MigrationNotFound, IllegalTransition (too late)."""
        run = self._find(migration)
        if run.machine.phase in machine.MOVED:
            raise IllegalTransition(f"migration {run.id} has moved the VM already", hint="migrate it back")
        self._feed(run, machine.AbortAsked("aborted by the operator"))
        return run.report

    def resolve(self, migration: str, guest_at: str) -> pb.Migration:
        """The operator says where the guest is. Raises MigrationNotFound, IllegalTransition."""
        run = self._find(migration)
        role = run.agreed.role(guest_at)
        if role is None:
            hosts = f"{run.agreed.source} or {run.agreed.destination}"
            raise IllegalTransition(f"migration {run.id} is not with host {guest_at}", hint=f"--guest-at {hosts}")
        if run.machine.phase not in machine.UNDECIDED:
            raise IllegalTransition(
                f"migration {run.id} is {run.machine.phase.reported}: nothing is in doubt",
                hint="`migrator migration list`",
            )
        self._feed(run, machine.Resolved(role))
        return run.report

    async def follow(self, migration: str) -> AsyncIterator[pb.Migration]:
        """The report whenever it changes (the newest only), until it is done. Raises MigrationNotFound."""
        while (run := self._running.get(migration)) is not None:
            news, sent = run.news, orders.copy(run.report)
            yield sent
            if sent.done:
                return
            if self._stopped:
                raise PeerLost(
                    f"the coordinator stops; migration {migration} goes on", hint="`migrator migration show`"
                )
            await news.wait()
        report = self._store.catalog.objects["migration"].get(migration)
        if report is None:
            raise MigrationNotFound(f"no migration {migration!r}", hint="`migrator migration list` shows those kept")
        yield orders.copy(report)

    # ---- what agents say ----

    def restart(self) -> None:
        """Finish or undo what the journal has; called once, before agents attach."""
        for row in self._store.journal.migrations():
            report = self._store.catalog.objects["migration"].get(row.id, pb.Migration(id=row.id))
            run = self._running[row.id] = decode(row.state or b"", orders.copy(report))
            if not run.report.done:
                RUNNING.inc()
            log.info("migration found in the journal", migration=run.id, phase=run.machine.phase.value)
            self._arm(run)
            if run.machine.phase is Phase.DONE:
                self._await_places(run, self._roster.expected())
            self._feed(run, machine.Restarted())

    def stop(self) -> None:
        """Let go of timers and of questions to agents; what is in hand stays in the journal as it is."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        for run in self._running.values():
            run.notify()
            for timer in (run.deadline, run.report_later):
                if timer is not None:
                    timer.cancel()

    def attached(self, hello: pb.Hello) -> None:
        """An agent is here (again): what it says of its ports may be news, then it is told what it missed."""
        for run in list(self._running.values()):
            role = run.agreed.role(hello.host)
            if role is None:
                continue
            for word in orders.missed(run, role, hello):
                self._feed(run, machine.Said(role, word))
            self._feed(run, machine.Back(role))

    def progress(self, host: str, news: pb.Progress) -> None:
        run = self._running.get(news.migration)
        role = run.agreed.role(host) if run else None
        if run is None or role is None:
            log.info(
                "progress of a migration that is not in hand", migration=news.migration, host=host, said=news.event
            )
            return
        merge(run.report, news.report)
        reason = news.problem.message or news.report.reason
        if news.event in machine.WORDS:
            log.info("agent says", migration=run.id, host=host, said=news.event, reason=reason)
            self._feed(run, machine.Said(role, news.event, reason))
        self._report_soon(run)

    def redirect_idle(self, host: str, news: pb.RedirectIdle) -> None:
        """A redirect passes nothing any more; it ends when all hosts know the new place."""
        for run in list(self._running.values()):
            if run.agreed.source == host and run.agreed.vm == news.vm and news.epoch in run.epochs.values():
                self._feed(run, machine.RedirectIdle())
                return
        places = self._store.catalog.places_of(news.vm)
        if not any(place.host == host and place.epoch == news.epoch for place in places):
            self._roster.send(host, end_redirect=pb.EndRedirect(vm=news.vm, epoch=news.epoch))

    # ---- changes of the configuration during a migration ----

    def instances_of(self, vm: str) -> list[tuple[str, int]]:
        """Hosts and epochs of instances beside the one where the VM is: staged ones, which changes go to as well."""
        return [
            (run.agreed.destination, run.agreed.epoch)
            for run in self._running.values()
            if run.agreed.vm == vm and run.blocks and run.machine.phase in orders.STAGED
        ]

    # ---- the machine ----

    def _feed(self, run: Running, event: Event) -> None:
        state, actions = machine.step(run.machine, event)
        if self._stopped or (state == run.machine and not actions):
            return
        before, run.machine = run.machine, state
        self._note(run, before, actions)
        moves = any(isinstance(action, machine.MovePlace) for action in actions)
        try:
            self._commit(run, moves=moves)
        except BaseException:
            run.machine = before
            raise
        self._after_step(run, before, actions)

    def _note(self, run: Running, before: machine.State, actions: tuple[Action, ...]) -> None:
        """Bring the report up to the new state."""
        if before.phase is not run.machine.phase:
            run.report.phase = run.machine.phase.reported
            log.info("migration goes on", migration=run.id, phase=run.machine.phase.value)
        for action in actions:
            if isinstance(action, machine.Finish):
                close(run.report, action.outcome.value, action.reason)
        if run.machine.phase is Phase.IN_DOUBT:
            run.report.reason = run.machine.reason

    def _commit(self, run: Running, *, moves: bool = False, counters: dict[str, int] | None = None) -> None:
        row = MigrationRow(run.id, run.encode() if run.live else None)
        writes = [Write("migration", run.id, run.report.SerializeToString())]
        if moves:
            writes += moved_writes(self._store.catalog, run.agreed.vm, run.agreed.destination, run.agreed.epoch)
        writes += [Write("migration", old, None) for old in self._finished[:-REPORTS_KEPT]]
        self._store.commit(Batch(writes, [row], counters or {}))
        del self._finished[:-REPORTS_KEPT]

    def _after_step(self, run: Running, before: machine.State, actions: tuple[Action, ...]) -> None:
        if run.machine.phase is not before.phase or run.deadline is None:
            self._arm(run)
        for action in actions:
            self._act(run, action)
        if not run.live:
            self._running.pop(run.id, None)
            for timer in (run.deadline, run.report_later):
                if timer is not None:
                    timer.cancel()
        run.notify()

    def _arm(self, run: Running) -> None:
        """Start the deadline of the phase."""
        if run.deadline is not None:
            run.deadline.cancel()
        phase = run.machine.phase
        after_s = self._deadlines.of(phase, run.agreed.timeout_s)
        if after_s is not None:
            loop = asyncio.get_running_loop()
            run.deadline = loop.call_later(after_s, self._feed, run, machine.Timeout(phase))

    def _act(self, run: Running, action: Action) -> None:
        match action:
            case machine.Send(role=role, order=order, reason=reason):
                self._order(run, role, order, reason)
            case machine.Tell(role=role, verdict=verdict):
                self._roster.send(run.agreed.host(role), verdict=orders.verdict(run, verdict))
            case machine.MovePlace():
                places = self._store.catalog.places_of(run.agreed.vm)
                update = pb.PlaceUpdate(places=places, revision=self._store.revision)
                self._await_places(run, self._roster.broadcast(places=update))
            case machine.Finish():
                self._finished.append(run.id)
                RUNNING.dec()
                ENDED.labels(run.report.outcome).inc()
                DURATION.observe(run.report.finished_at - run.report.started_at)
                log.info("migration ends", migration=run.id, outcome=run.report.outcome, reason=run.report.reason)

    def _order(self, run: Running, role: Role, order: machine.Order, reason: str) -> None:
        host = run.agreed.host(role)
        match order:
            case machine.Order.DESCRIBE | machine.Order.PREPARE | machine.Order.START:
                task = asyncio.get_running_loop().create_task(self._ask(run, role, order))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case machine.Order.AUTHORISE:
                self._roster.send(host, authorise=pb.Authorise(migration=run.id))
            case machine.Order.ABORT:
                self._roster.send(host, abort=pb.Abort(migration=run.id, reason=reason))
            case machine.Order.END_REDIRECT:
                for epoch in sorted(set(run.epochs.values())):
                    self._roster.send(host, end_redirect=pb.EndRedirect(vm=run.agreed.vm, epoch=epoch))

    async def _ask(self, run: Running, role: Role, order: machine.Order) -> None:
        """Give one of the orders that are answered, and tell the machine the answer."""
        host = run.agreed.host(role)
        event: Event
        try:
            session = self._roster.get(host)
            if session is None:
                raise PeerLost(f"agent of {host} is not connected")
            timeout_s = self._deadlines.of(run.machine.phase, run.agreed.timeout_s) or self._deadlines.start_s
            peer = self._store.catalog.hosts[run.agreed.destination].peer
            body = orders.body(order, run, self._store.catalog, peer)
            described_at = self._store.revision
            reply = await session.request(timeout_s, **body)
            event = self._answered(run, order, reply, described_at)
        except Error as error:
            event = machine.Refused(role, str(error))
        self._feed(run, event)

    def _answered(self, run: Running, order: machine.Order, reply: pb.Reply, described_at: int) -> Event:
        match order:
            case machine.Order.DESCRIBE:
                if not reply.need.records:
                    raise PreflightFailed(f"{run.agreed.source} runs no port of VM {run.agreed.vm}")
                run.need, run.described_at = reply.need, described_at
                run.epochs.update(reply.need.epochs)
                return machine.Described()
            case machine.Order.PREPARE:
                for order_ in orders.changed_since(self._store.catalog, run):
                    self._roster.send(run.agreed.destination, port=order_)
                return machine.Prepared()
            case _:
                return machine.Started()

    def _await_places(self, run: Running, hosts: Iterable[str]) -> None:
        loop = asyncio.get_running_loop()
        known = partial(self._feed, run, machine.PlacesKnown())
        revision = self._store.catalog.place_revision(run.agreed.vm)
        self._places.expect(revision, hosts, lambda: loop.call_soon(known))

    # ---- reports ----

    def _report_soon(self, run: Running) -> None:
        """Write and tell the report's numbers, at most ten times a second."""
        if run.report_later is None and run.id in self._running:
            loop = asyncio.get_running_loop()
            run.report_later = loop.call_later(REPORT_INTERVAL_S, self._write_report, run)

    def _write_report(self, run: Running) -> None:
        run.report_later = None
        write = Write("migration", run.id, run.report.SerializeToString())
        self._store.commit(Batch([write]), durable=False)
        run.notify()

    def _find(self, migration: str) -> Running:
        run = self._running.get(migration)
        if run is None:
            if migration in self._store.catalog.objects["migration"]:
                raise IllegalTransition(
                    f"migration {migration} has ended", hint=f"`migrator migration show {migration}`"
                )
            raise MigrationNotFound(f"no migration {migration!r}", hint="`migrator migration list` shows all")
        return run
