"""The coordinator without its transport: what agents say, what operators ask, what every host is to have."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import structlog
from prometheus_client import Gauge

from migrator import config, protocol
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.change import Planned, plan_apply, plan_removal
from migrator.coordinator.declare import Declarations, refuse_foreign, refuse_foreign_removal
from migrator.coordinator.fanout import Fanout
from migrator.coordinator.held import unread_fields
from migrator.coordinator.journal import Batch, Entry, Journal, Write
from migrator.coordinator.migrations import Migrations
from migrator.coordinator.places import Acknowledgements
from migrator.coordinator.removals import Removals
from migrator.coordinator.roster import Roster, Session
from migrator.coordinator.settings import Deadlines
from migrator.coordinator.store import Store
from migrator.errors import ConfigInvalid

EPOCH_MAX = (1 << 32) - 1  # half a word of the switch
RESYNC_DELAY_S = 0.05
RESYNC_DELAY_PER_HOST_S = 0.002

ATTACHED = Gauge("migrator_hosts_attached", "Agents that are attached")
REVISION = Gauge("migrator_revision", "Newest revision of the configuration")

log = structlog.get_logger()


class Cluster:
    """One coordinator's whole state. All runs in one event loop; every change is journalled before it is told."""

    def __init__(self, journal: Journal, deadlines: Deadlines | None = None) -> None:
        self._deadlines = deadlines or Deadlines()
        self.store = Store(journal)
        REVISION.set_function(lambda: self.store.revision)
        self.roster = Roster()
        self._places = Acknowledgements()
        self._fanout = Fanout(self.store, self.roster)
        self.migrations = Migrations(self.store, self.roster, self._fanout, self._places, self._deadlines)
        self._removals = Removals(self.store, self.roster)
        self.declarations = Declarations(
            self.store, self.roster, self._fanout, self.migrations, self._removals, self._running_instances, self._push
        )
        self._later: asyncio.TimerHandle | None = None
        self._stopped = False
        self._resync: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Go on where the journal ends. Called once, in the event loop, before agents attach."""
        catalog = self.store.catalog
        expected = [name for name, host in catalog.hosts.items() if host.connected]
        self.roster.expect(expected)
        self.store.commit(Batch([self._host_write(name, connected=False) for name in expected]))
        self.migrations.restart()
        loop = asyncio.get_running_loop()
        self._later = loop.call_later(self._deadlines.return_s, self._forget_missing, expected)

    def stop(self) -> None:
        """Let go of timers and agents; the journal keeps migrations, and who was attached, for they will be back."""
        self._stopped = True
        for timer in (self._later, self._resync):
            if timer is not None:
                timer.cancel()
        self.migrations.stop()
        self._fanout.stop()
        self._removals.stop()
        self.store.close()
        for session in self.roster:
            session.close()

    def _forget_missing(self, expected: Sequence[str]) -> None:
        """Hosts that did not come back after a restart are not live: nobody waits for what they acknowledge."""
        for host in expected:
            if self.roster.get(host) is None:
                self._places.left(host)

    # ---- agents ----

    def join(self, hello: pb.Hello) -> Session:
        """An agent attached: it gets all that concerns its host, then what it missed of migrations."""
        if not hello.host:
            raise ConfigInvalid("an agent attached without a host name", hint="set [agent] host in its configuration")
        known = self.store.catalog.hosts.get(hello.host)
        self.store.commit(Batch([self._host_write(hello.host, hello=hello)]), durable=False)
        session = Session(hello)
        self.roster.join(session)
        self._places.joined(session.host)
        ATTACHED.set(len(self.roster))
        log.info("agent attached", host=session.host, driver=hello.driver, ports=len(hello.instances))
        try:
            self._start_sync(session, self._sync_common())
            self._removals.attached(session)
            self.migrations.attached(hello)
        except BaseException:
            self.leave(session)
            raise
        if known is None or known.underlay != hello.underlay:
            self._sync_soon()
        return session

    def leave(self, session: Session) -> None:
        if not self.roster.leave(session) or self._stopped:
            return
        ATTACHED.set(len(self.roster))
        self._places.left(session.host)
        self._fanout.left(session.host)
        log.info("agent left", host=session.host)
        if session.host in self.store.catalog.hosts:
            self.store.commit(Batch([self._host_write(session.host, connected=False)]), durable=False)

    def receive(self, session: Session, message: pb.FromAgent) -> None:
        """Anything an agent says after its Hello."""
        self.roster.last_seen[session.host] = time.time()
        match message.WhichOneof("message"):
            case "reply":
                session.answer(message.reply)
            case "progress":
                self.migrations.progress(session.host, message.progress)
            case "places":
                self._acknowledged(session, message.places)
            case "redirect_idle":
                self.migrations.redirect_idle(session.host, message.redirect_idle)
            case "guest":
                log.info("guest", host=session.host, vm=message.guest.vm, state=message.guest.state)
                self.migrations.guest(session.host, message.guest)
            case "instance":
                log.debug("instance", host=session.host, vm=message.instance.vm, state=message.instance.state)

    def _acknowledged(self, session: Session, known: pb.PlacesKnown) -> None:
        session.place_revision = max(session.place_revision, known.revision)
        unset = [f"{place.network}/{place.mac}" for place in known.unset]
        if unset:
            log.warning("agent could not set all places", host=session.host, places=unset[:5], count=len(unset))
        self._places.acknowledge(session.host, known.revision, unset)
        self._fanout.acknowledged(session.host, known.revision)

    def _host_write(self, name: str, *, hello: pb.Hello | None = None, connected: bool = True) -> Write:
        host = pb.Host()
        if hello is not None:
            for field in ("underlay", "peer", "driver", "version", "layout"):
                setattr(host, field, getattr(hello, field))
            host.protocol = protocol.text(hello.protocol)
            host.kinds.update(hello.kinds)
        else:
            host.CopyFrom(self.store.catalog.hosts[name])
        host.name = name
        host.connected = connected
        return Write("host", name, host.SerializeToString(deterministic=True))

    # ---- what hosts are to have ----

    def _sync_common(self) -> pb.Sync:
        catalog = self.store.catalog
        return pb.Sync(
            networks=catalog.networks.values(),
            hosts={name: host.underlay for name, host in catalog.hosts.items() if host.underlay},
            places=catalog.places.values(),
            revision=self.store.revision,
        )

    def _start_sync(self, session: Session, common: pb.Sync) -> None:
        ports = [port for port in self.store.catalog.ports.values() if port.host == session.host]
        answer = session.ask_sync(common, map(self.store.catalog.order, self._readable(session.host, ports)))
        answer.add_done_callback(lambda reply: self._synced(session, common.revision, reply))

    def _readable(self, host: str, ports: Iterable[pb.Port]) -> list[pb.Port]:
        """Those whose rules the agent of a host reads as they are: an older one, that came in place of another, opens
        no port wider than it is declared. What it has of the others stays as it is."""
        catalog = self.store.catalog
        there, unread = catalog.hosts.get(host), dict[str, list[str]]()
        found = []
        for port in ports:
            if port.policy not in unread:
                unread[port.policy] = unread_fields(there, catalog.policies.get(port.policy))
                if unread[port.policy]:
                    log.warning(
                        "ports not ordered: the agent does not know all that their rules say",
                        host=host,
                        policy=port.policy,
                        fields=unread[port.policy],
                    )
            if not unread[port.policy]:
                found.append(port)
        return found

    def _synced(self, session: Session, revision: int, reply: asyncio.Future[pb.Reply]) -> None:
        if reply.cancelled() or reply.exception() is not None:
            return
        problem = reply.result().problem
        if problem.kind:  # which places it has, if any, the agent says itself
            log.warning("agent could not take all", host=session.host, problem=problem.message, hint=problem.hint)
        else:
            self._acknowledged(session, pb.PlacesKnown(revision=revision))

    def _sync_soon(self) -> None:
        """Tell all hosts of a changed set of hosts, a little later, for hosts rarely come alone."""
        if self._resync is None:
            delay_s = RESYNC_DELAY_S + RESYNC_DELAY_PER_HOST_S * len(self.roster)
            self._resync = asyncio.get_running_loop().call_later(delay_s, self._sync_all)

    def _sync_all(self) -> None:
        if self._resync is not None:
            self._resync.cancel()
            self._resync = None
        common = self._sync_common()
        for session in self.roster:
            self._start_sync(session, common)

    # ---- configuration ----

    def apply(self, request: pb.ApplyRequest) -> pb.ApplyReply:
        """Make objects or change them: all of it or nothing. Raises ConfigInvalid, AlreadyMigrating."""
        wanted = config.from_message(request.config, config.Config)
        refuse_foreign(self.store.catalog, wanted.ports)
        moving, running = self.migrations.migrating(), self._running_instances()
        planned = plan_apply(self.store.catalog, wanted, self.store.journal, moving, running)
        if not request.dry_run:
            self._carry_out(planned)
        return self._reply(planned)

    def _running_instances(self) -> Mapping[tuple[str, str, str], int]:
        """As of each agent's Hello. An epoch that no switch can have is none to go on from."""
        return {
            (instance.vm, instance.mac, session.host): instance.epoch
            for session in self.roster
            for instance in session.hello.instances
            if instance.state == "active" and instance.epoch <= EPOCH_MAX
        }

    def remove(self, request: pb.Removal) -> pb.ApplyReply:
        """Remove one object. Raises ObjectNotFound, ConfigInvalid, AlreadyMigrating."""
        catalog = self.store.catalog
        refuse_foreign_removal(catalog, self.roster, request)
        planned = plan_removal(catalog, request.sort, request.name, self.migrations.migrating())
        gone = [catalog.places[write.name] for write in planned.writes if write.sort == "place"]
        removals = [self._port_removal(w.name) for w in planned.writes if w.sort == "port"]
        for _, removal in removals:
            planned.counters.update(self._removals.counters(removal))
        self._carry_out(planned)
        for host, removal in removals:
            self._removals.order(host, removal)
        self._fanout.tell(gone)
        return self._reply(planned)

    def _port_removal(self, name: str) -> tuple[str, pb.PortRemoval]:
        port = self.store.catalog.ports[name]
        return port.host, pb.PortRemoval(vm=port.vm, mac=port.mac, epoch=self.store.catalog.epoch(port))

    def _reply(self, planned: Planned) -> pb.ApplyReply:
        return pb.ApplyReply(revision=self.store.revision, changed=planned.changed, warnings=planned.warnings)

    def _carry_out(self, planned: Planned) -> None:
        entries = self.store.commit(Batch(planned.writes, counters=planned.counters))
        if any(entry.sort in ("network", "host") for entry in entries):
            self._sync_all()
        self._push(entries)

    def _push(self, entries: Sequence[Entry]) -> None:
        """Tell the agents: places to all, ports to where they are and to where they are staged."""
        catalog = self.store.catalog
        places = (entry.name for entry in entries if entry.sort == "place" and entry.body is not None)
        self._fanout.tell(catalog.places[name] for name in places)
        for port in catalog.ports_touched(entries):
            if self._readable(port.host, [port]):
                self.roster.send(port.host, port=catalog.order(port))
            for host, epoch in self.migrations.instances_of(port.vm):
                if self._readable(host, [port]):
                    self.roster.send(host, port=catalog.order(port, host=host, epoch=epoch))

    # ---- what operators see ----

    def hosts(self) -> pb.HostList:
        listed = pb.HostList()
        ports = Counter(port.host for port in self.store.catalog.ports.values())
        for name, known in sorted(self.store.catalog.hosts.items()):
            host = listed.hosts.add()
            host.CopyFrom(known)
            session = self.roster.get(name)
            host.connected = session is not None
            host.place_revision = session.place_revision if session else 0
            host.ports = ports[name]
            host.last_seen_s = self.roster.last_seen.get(name, 0.0)
        return listed
