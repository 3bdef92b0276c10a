"""Carries out the coordinator's machine for every migration: journal first, then act.

A step's new state, its report and, when the VM has moved, its new places are one durable write; only then are the
step's orders given. So what is found in the journal at start is never behind what an agent was told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

import structlog
from prometheus_client import Counter, Gauge, Histogram

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator import orders
from migrator.coordinator.catalog import moved_writes
from migrator.coordinator.change import epoch_counter
from migrator.coordinator.fanout import Fanout
from migrator.coordinator.journal import Batch, MigrationRow, Write
from migrator.coordinator.places import Acknowledgements
from migrator.coordinator.roster import Roster
from migrator.coordinator.running import Running, close, decode
from migrator.coordinator.settings import Deadlines
from migrator.coordinator.store import Store, readable
from migrator.coordinator.whereabouts import Doubts
from migrator.errors import JournalFailed, PeerLost, PreflightFailed
from migrator.faults import reach
from migrator.lifecycle import coordinator as machine
from migrator.lifecycle.machine import Action, Event, Role

REPORTS_KEPT = 1_000
REPORT_INTERVAL_S = 0.1
RETRY_S = 5.0

RUNNING = Gauge("migrator_migrations_running", "Migrations whose outcome is open")
ENDED = Counter("migrator_migrations_total", "Migrations that ended", ["outcome"])
DURATION = Histogram(
    "migrator_migration_seconds", "From the order to the outcome", buckets=(1, 3, 10, 30, 100, 300, 1000)
)

log = structlog.get_logger()
Phase = machine.Phase


class Execution:
    """The migrations in hand, each with its machine, deadline and report."""

    def __init__(
        self, store: Store, roster: Roster, fanout: Fanout, places: Acknowledgements, deadlines: Deadlines
    ) -> None:
        self._store, self._roster, self._places, self.deadlines = store, roster, places, deadlines
        self._fanout = fanout
        self.running: dict[str, Running] = {}
        self.stopped = False
        self.doubts = Doubts(roster, self.feed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._again: set[asyncio.TimerHandle] = set()
        reports = store.catalog.objects["migration"].values()
        self._finished = [r.id for r in sorted(reports, key=lambda r: r.finished_at) if r.done]

    # ---- life ----

    def begin(self, run: Running, actions: tuple[Action, ...]) -> None:
        """Take a new migration in hand. Raises JournalFailed, and then it is not."""
        self._commit(run, counters={epoch_counter(run.agreed.vm): run.agreed.epoch})
        reach("coordinator", run.machine.phase)
        self.running[run.id] = run
        RUNNING.inc()
        self._after_step(run, run.machine, actions)

    def restart(self) -> None:
        """Finish or undo what the journal has; called once, before agents attach."""
        for run in self._found():  # all of them are read before anything is done
            self.running[run.id] = run
            if not run.report.done:
                RUNNING.inc()
            log.info("migration found in the journal", migration=run.id, phase=run.machine.phase.value)
            self._arm(run)
            if run.machine.phase in machine.MOVED and not run.machine.places_known:
                self._await_places(run, self._roster.expected())
            self.feed(run, machine.Restarted())

    def _found(self) -> list[Running]:
        reports, found = self._store.catalog.objects["migration"], []
        for row in self._store.journal.migrations():
            with readable(f"migration {row.id!r}"):
                found.append(decode(row.state or b"", orders.copy(reports.get(row.id, pb.Migration(id=row.id)))))
        return found

    def stop(self) -> None:
        """Let go of timers and of questions to agents; what is in hand stays in the journal as it is."""
        self.stopped = True
        self.doubts.stop()
        for task in self._tasks:
            task.cancel()
        for again in self._again:
            again.cancel()
        for run in self.running.values():
            run.notify()
            for timer in (run.deadline, run.report_later):
                if timer is not None:
                    timer.cancel()

    # ---- the machine ----

    def feed(self, run: Running, event: Event) -> None:
        """One step of a migration's machine. Raises JournalFailed, and then the step was not made."""
        state, actions = machine.step(run.machine, event)
        if self.stopped or (state == run.machine and not actions):
            return
        before, run.machine = run.machine, state
        self._note(run, before, actions)
        moves = any(isinstance(action, machine.MovePlace) for action in actions)
        renews = any(isinstance(action, machine.Renew) for action in actions)
        try:
            self._commit(run, moves=moves, renews=renews)
        except BaseException:
            run.machine = before
            raise
        if state.phase is not before.phase:
            reach("coordinator", state.phase)
        self._after_step(run, before, actions)

    def _feed_surely(self, run: Running, event: Event) -> None:
        """What nobody says a second time: fed until it can be journalled."""
        if self.running.get(run.id) is not run:
            return
        try:
            self.feed(run, event)
        except JournalFailed as error:
            log.error("cannot be journalled, tried again", migration=run.id, what=str(event), error=str(error))
            loop = asyncio.get_running_loop()
            self._again = {timer for timer in self._again if timer.when() > loop.time()}
            self._again.add(loop.call_later(RETRY_S, self._feed_surely, run, event))

    def _note(self, run: Running, before: machine.State, actions: tuple[Action, ...]) -> None:
        """Bring the report up to the new state."""
        if before.phase is not run.machine.phase:
            run.report.phase = run.machine.phase.reported
            log.info("migration goes on", migration=run.id, phase=run.machine.phase.value)
        for action in actions:
            if isinstance(action, machine.Finish):
                close(run.report, action.outcome.value, action.reason, dry_run=run.machine.dry_run)
        if run.machine.phase is Phase.IN_DOUBT:
            run.report.reason = run.machine.reason

    def _commit(
        self, run: Running, *, moves: bool = False, renews: bool = False, counters: dict[str, int] | None = None
    ) -> None:
        row = MigrationRow(run.id, run.encode() if run.live else None)
        writes = [Write("migration", run.id, run.report.SerializeToString())]
        if moves:
            writes += moved_writes(self._store.catalog, run.agreed.vm, run.agreed.destination, run.agreed.epoch)
        if renews:
            counter = epoch_counter(run.agreed.vm)
            counters = {counter: self._store.journal.counter(counter) + 1}
            writes += moved_writes(self._store.catalog, run.agreed.vm, run.agreed.source, counters[counter])
        writes += [Write("migration", old, None) for old in self._finished[:-REPORTS_KEPT]]
        self._store.commit(Batch(writes, [row], counters or {}))
        del self._finished[:-REPORTS_KEPT]

    def _after_step(self, run: Running, before: machine.State, actions: tuple[Action, ...]) -> None:
        if run.machine.phase is not before.phase or run.deadline is None:
            self._arm(run)
        for action in actions:
            self._act(run, action)
        if run.machine.phase in machine.MOVED and before.phase not in machine.MOVED:
            self._configure(run, run.agreed.destination, since=run.opened_with)
        self.doubts.consider(run)
        if not run.live:
            self.running.pop(run.id, None)
            for timer in (run.deadline, run.report_later):
                if timer is not None:
                    timer.cancel()
        run.notify()

    def _arm(self, run: Running) -> None:
        """Start the deadline of the phase."""
        if run.deadline is not None:
            run.deadline.cancel()
        phase = run.machine.phase
        after_s = self.deadlines.of(phase, run.agreed.timeout_s)
        if after_s is not None:
            loop = asyncio.get_running_loop()
            run.deadline = loop.call_later(after_s, self._feed_surely, run, machine.Timeout(phase))

    def _act(self, run: Running, action: Action) -> None:
        match action:
            case machine.Send(role=role, order=order, reason=reason):
                self._order(run, role, order, reason)
            case machine.Tell(role=role, verdict=verdict):
                self._roster.send(run.agreed.host(role), verdict=orders.verdict(run, verdict))
            case machine.MovePlace():
                self._fanout.tell_soon(self._store.catalog.places_of(run.agreed.vm))
                self._await_places(run, [session.host for session in self._roster])
            case machine.Renew():
                self._configure(run, run.agreed.source)
            case machine.Finish():
                self._finished.append(run.id)
                RUNNING.dec()
                ENDED.labels(run.report.outcome).inc()
                DURATION.observe(run.report.finished_at - run.report.started_at)
                log.info("migration ends", migration=run.id, outcome=run.report.outcome, reason=run.report.reason)

    def _configure(self, run: Running, host: str, *, since: int = 0) -> None:
        """Tell a host the VM's ports as they are, if they have changed after revision `since`."""
        for port in self._store.catalog.ports_of(run.agreed.vm):
            order = self._store.catalog.order(port)
            if order.revision > since:
                self._roster.send(host, port=order)

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
            timeout_s = self.deadlines.of(run.machine.phase, run.agreed.timeout_s) or self.deadlines.start_s
            peer = self._store.catalog.hosts[run.agreed.destination].peer
            speaking = orders.spoken(run, self._roster)
            body = orders.body(order, run, self._store.catalog, peer, speaking)
            described_at = self._store.revision
            reply = await session.request(timeout_s, **body)
            event = self._answered(run, order, reply, described_at)
        except Error as error:
            event = machine.Refused(role, str(error))
        self._feed_surely(run, event)

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
        known = partial(self._feed_surely, run, machine.PlacesKnown())
        revision = self._store.catalog.place_revision(run.agreed.vm)
        names = self._store.catalog.place_names_of(run.agreed.vm)
        self._places.expect(revision, hosts, lambda: loop.call_soon(known), names)

    # ---- reports ----

    def report_soon(self, run: Running) -> None:
        """Write and tell the report's numbers, at most ten times a second."""
        if run.report_later is None and run.id in self.running:
            loop = asyncio.get_running_loop()
            run.report_later = loop.call_later(REPORT_INTERVAL_S, self._write_report, run)

    def _write_report(self, run: Running) -> None:
        run.report_later = None
        write = Write("migration", run.id, run.report.SerializeToString())
        try:
            self._store.commit(Batch([write]), durable=False)
        except JournalFailed as error:  # the next step writes it as well
            log.warning("report is not written", migration=run.id, error=str(error))
        run.notify()
