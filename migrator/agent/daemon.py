"""The agent as a whole: switch, hypervisor, coordinator, other agents, and what ties them together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any

import grpc
import structlog

from datapath.errors import Error, FeatureMissing
from datapath.provider import Driver, Event, PortState
from datapath.registry import driver as driver_class
from migrator import protocol
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent import metrics
from migrator.agent.config import AgentConfig
from migrator.agent.end import End, Surroundings
from migrator.agent.ends import Ends
from migrator.agent.guests import GuestDriver, GuestEvent, guest_driver, whereabouts
from migrator.agent.host import HostConfig
from migrator.agent.household import Household
from migrator.agent.link import Link
from migrator.agent.local import AgentService
from migrator.agent.peer import LIMITS, PeerService
from migrator.agent.source import SourceEnd
from migrator.agent.store import Store
from migrator.agent.stream import SERVER_OPTIONS
from migrator.agent.traces import Traces
from migrator.agent.watching import StateService, Watching
from migrator.errors import PreflightFailed, error_name
from migrator.lifecycle import source_words as leaving
from migrator.lifecycle.machine import Guest, Role
from migrator.security import identity
from migrator.security.guard import Guard
from migrator.security.local import LocalSocket, Served
from migrator.security.transport import PLAIN, Transport

VERSION = version("vm-netstate-migrator")
REDIRECT_POLL_S = 1.0
GAUGES_S = 15.0  # as often as who scrapes them asks: each time all ports are looked at
STOP_S = 2.0


class Agent:
    """`start`, then `stop`. The switch goes on through both. `driver` and `guests` None: those of the configuration."""

    def __init__(self, config: AgentConfig, driver: Driver | None = None, guests: GuestDriver | None = None) -> None:
        self.config = config
        self.host = config.agent.host
        self.transport = Transport(config.tls, identity.Role.AGENT, self.host)
        self.driver = driver or driver_class(config.driver.name)()
        self.store = Store(config.agent.state_dir)
        self.guests = guests or guest_driver(config.guests.driver, config.guests.all_options)
        self.around = Surroundings(
            host=self.host,
            driver=self.driver,
            guests=self.guests,
            store=self.store,
            settings=config.migration,
            tell=self._tell,
            heard=lambda: self.link.connected,
            ended=self._ended,
            transport=self.transport,
        )
        self.ends = Ends(self.around, self._instance_ended)
        self.hosting = HostConfig(
            self.host,
            self.driver,
            self.around,
            self.store,
            self.ends.in_hand,
            self.ends.taking_part,
            self.ends.changed,
        )
        self.link = Link(config.agent.coordinator, self.hello, self._order, self._attached, self.transport)
        self.household = Household(self)
        self.traces = Traces(self.driver, self.around)
        self.watching = Watching(self.driver, self.around, self.ends.of)
        self.peer = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servers: list[Any] = []
        self._serves = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    # ---- life ----

    async def start(self) -> None:
        """Raises FeatureMissing when this machine lacks what the driver needs, ConfigInvalid for addresses."""
        self._loop = asyncio.get_running_loop()
        options = {"host": self.host, **self.config.driver.all_options}
        missing = [f"{name}: {hint}" for name, there, hint in type(self.driver).check(options) if not there]
        if missing:
            raise FeatureMissing("; ".join(missing), hint="migrator doctor shows all of it")
        await asyncio.to_thread(self.driver.start, options, self._switch_event)
        if await asyncio.to_thread(self.driver.ports):
            await self.guests.start(self._guest_event)
        else:  # a host that starts: its hypervisor may wait for this agent
            self._go(self.guests.start(self._guest_event))
        await self.hosting.recall()
        await self.ends.recall()
        await self._serve()
        await self.guests.attach(self.household)
        self._go(self.link.run())
        self._go(self._leases())
        self._go(self._redirects())
        self._log.info("agent started", host=self.host, driver=self.driver.name, peer=self.peer, version=VERSION)

    async def _serve(self) -> None:
        guard = Guard(self.transport, limits=LIMITS)
        peers = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[guard])
        rpc.add_PeerServicer_to_server(PeerService(self.ends), peers)  # type: ignore[no-untyped-call]
        rpc.add_StateServicer_to_server(StateService(self.watching), peers)  # type: ignore[no-untyped-call]
        port = self.transport.listen(peers, self.config.agent.listen, "agent.listen")
        await peers.start()
        self._servers.append(peers)
        self.peer = self.config.agent.advertise or f"{self.config.agent.listen.rpartition(':')[0]}:{port}"
        own = self.config.agent
        socket = LocalSocket(own.socket, own.socket_group, identity.Role(own.socket_role), "agent.socket")
        local = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[Guard(PLAIN, socket.identity)])
        rpc.add_AgentServicer_to_server(AgentService(self), local)  # type: ignore[no-untyped-call]
        rpc.add_StateServicer_to_server(StateService(self.watching), local)  # type: ignore[no-untyped-call]
        self._servers.append(Served(local, [socket]))
        socket.bind(local)
        await local.start()
        await socket.start()
        self._serves = True

    async def stop(self) -> None:
        """Let go of everything; ports keep passing frames and migrations in hand are taken up at the next start."""
        self.ends.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(server.stop(STOP_S / 4) for server in self._servers))
        await self.watching.close()
        await self.guests.stop()
        await self.household.close()
        await asyncio.to_thread(self.around.close)
        await asyncio.to_thread(self.driver.stop)
        self.store.close()
        if self._serves:
            self._log.info("agent stopped", host=self.host)

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("broken", task=task.get_name(), exc_info=task.exception())

    # ---- what happens on this host ----

    def _switch_event(self, event: Event) -> None:
        """From a thread of the driver's."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._switch_said, event)

    def _switch_said(self, event: Event) -> None:
        if event.what in {"trace", "log"}:
            self.traces.take(event)
        elif event.what == "opened":
            self.ends.switch(event)
        elif event.what in {"alarm", "full"}:
            vm = event.ref.vm if event.ref else ""
            self._log.warning("connection table", what=event.what, vm=vm, **dict(event.data))

    def _guest_event(self, event: GuestEvent) -> None:
        self._log.info("guest", vm=event.vm, what=event.what, reason=event.reason)
        self.ends.guest(event)
        self._tell(pb.FromAgent(guest=pb.GuestEvent(vm=event.vm, state=event.what, reason=event.reason)))

    def _tell(self, message: pb.FromAgent) -> None:
        self.link.send(message)

    def _ended(self, end: End) -> None:
        metrics.MIGRATIONS.labels(str(end.role), str(end.state.phase)).inc()
        for what, count in end.report.frames.items():
            metrics.FRAMES.labels(what).inc(count)
        metrics.RECORDS.labels(str(end.role)).inc(end.report.entries)
        if "downtime" in end.report.times_ms:
            metrics.DOWNTIME.observe(end.report.times_ms["downtime"] / 1e3)
        self.ends.ended(end)

    def _instance_ended(self, vm: str, epoch: int) -> None:
        self.hosting.note_ended(vm, epoch)

    # ---- the coordinator ----

    async def hello(self) -> pb.Hello:
        statuses = await asyncio.to_thread(self.driver.ports)
        return pb.Hello(
            host=self.host,
            version=VERSION,
            driver=self.driver.name,
            kinds=dict(self.driver.kinds()),
            underlay=str(self.config.driver.all_options.get("underlay", "")),
            peer=self.peer,
            instances=[self.instance(status) for status in statuses],
            guests={vm: str(state) for vm, state in self.guests.states().items() if state is not Guest.GONE},
            protocol=protocol.spoken(),
            layout=self.driver.layout(),
        )

    def instance(self, status: Any) -> pb.Instance:
        """A port's status as the coordinator and the CLI see it."""
        migration, role = self.ends.instance(status.ref)
        return pb.Instance(
            vm=status.ref.vm,
            mac=status.ref.mac,
            epoch=status.ref.epoch,
            state=str(status.state),
            committed=status.committed,
            migration=migration,
            role=role,
            redirecting=status.gate.startswith("redirect"),
        )

    def _attached(self) -> None:
        self.ends.tell_again()
        self._go(self.household.attached())

    async def _order(self, message: pb.ToAgent) -> None:
        """Orders are begun in the order in which they came; what takes long answers later."""
        which = message.WhichOneof("message") or ""
        body = getattr(message, which, None)
        handler = self._orders().get(which)
        if handler is None or body is None:
            self._log.warning("order not understood", order=which)
            hint = "upgrade the agent: docs/upgrades.md"
            self._reply(message.request, "NotReady", f"the agent of {self.host} does not know this order", hint)
            return
        self._go(self._carry_out(message.request, which, handler, body))
        await asyncio.sleep(0)

    def _orders(self) -> dict[str, Callable[[int, Any], Coroutine[Any, Any, None]]]:
        return {
            "sync": self._sync,
            "port": self._port,
            "remove": self._remove,
            "places": self._places,
            "describe": self._describe,
            "prepare": self._prepare,
            "start": self._start,
            "authorise": self._authorise,
            "abort": self._abort,
            "end_redirect": self._end_redirect,
            "verdict": self._verdict,
            "guest": self._whereabouts,
        }

    async def _carry_out(
        self, request: int, which: str, handler: Callable[[int, Any], Coroutine[Any, Any, None]], body: Any
    ) -> None:
        try:
            await handler(request, body)
        except Error as error:
            self._log.warning("order failed", order=which, error=str(error))
            self._reply(request, error_name(error), error.message, error.hint)
        except Exception as error:
            self._log.exception("broken", order=which)
            self._reply(request, "Error", f"{type(error).__name__}: {error}")

    def _reply(self, request: int, kind: str = "", message: str = "", hint: str = "", **fields: Any) -> None:
        if request:
            problem = pb.Problem(kind=kind, message=message, hint=hint) if kind else None
            self._tell(pb.FromAgent(reply=pb.Reply(request=request, problem=problem, **fields)))

    async def _sync(self, request: int, sync: pb.Sync) -> None:
        self.household.synced(sync)
        problems = await self.hosting.sync(sync)
        self._tell_places()
        for problem in problems:
            self._log.warning("not as configured", problem=problem)
        self._reply(request, *(("NotReady", "; ".join(problems)) if problems else ()))

    async def _port(self, request: int, order: pb.PortOrder) -> None:
        await self.household.port(order)
        self._reply(request)

    async def _remove(self, request: int, removal: pb.PortRemoval) -> None:
        await self.hosting.remove(removal)
        self.household.removed(removal)
        self._reply(request)

    async def _places(self, request: int, update: pb.PlaceUpdate) -> None:
        try:
            await self.hosting.places(update)
        finally:
            self._tell_places()
        self._reply(request)

    def _tell_places(self) -> None:
        self._tell(pb.FromAgent(places=self.hosting.places_known()))

    async def _describe(self, request: int, order: pb.Describe) -> None:
        if order.leaving and not await self.guests.leaving(order.vm):
            raise PreflightFailed(
                f"VM {order.vm} is not being moved out of {self.host}, as its hypervisor says",
                hint="`migrator migrate` moves it",
            )
        self._reply(request, need=await self.ends.describe(order.vm))

    async def _prepare(self, request: int, order: pb.PrepareDestination) -> None:
        protocol.require(order.protocol)

        def answer(why: str) -> None:
            self._reply(request, *(("PreflightFailed", why) if why else ()))

        await self.ends.guard(order, Role.DESTINATION)
        self.ends.prepare(order, answer)

    async def _start(self, request: int, order: pb.StartSource) -> None:
        protocol.require(order.protocol)
        await self.ends.guard(order, Role.SOURCE)
        self.ends.start(order)
        self._reply(request)

    async def _authorise(self, request: int, order: pb.Authorise) -> None:
        if not self.ends.authorise(order.migration):
            self._unknown(order.migration, "nothing of it is here")
        self._reply(request)

    async def _abort(self, request: int, order: pb.Abort) -> None:
        if not self.ends.abort(order):
            self._unknown(order.migration, order.reason)
        self._reply(request)

    async def _verdict(self, request: int, order: pb.Verdict) -> None:
        if not self.ends.verdict(order) and order.guest_at != self.host:
            self._unknown(order.migration, "nothing of it is here")
        self._reply(request)

    async def _whereabouts(self, request: int, query: pb.GuestQuery) -> None:
        self._reply(request, guest=str(whereabouts(self.guests, query.vm) or ""))

    def _unknown(self, migration: str, reason: str) -> None:
        """Nothing of that migration is here, so nothing has to be undone: it was, or there never was anything."""
        past = self.ends.past(migration)
        if past is None or not past.opened:
            problem = pb.Problem(kind="MigrationNotFound", message=reason)
            self._tell(pb.FromAgent(progress=pb.Progress(migration=migration, event="aborted", problem=problem)))

    async def _end_redirect(self, request: int, order: pb.EndRedirect) -> None:
        await self.ends.end_redirect(order)
        self._reply(request)

    # ---- at intervals ----

    async def _leases(self) -> None:
        """States that must not outlive the agent are renewed well before they would end."""
        waiting: set[str] = set()
        while True:
            await asyncio.sleep(self.config.migration.lease_s / 5)
            # Side by side: a VM whose lane is busy must not cost the others their leases.
            for end in self.ends:
                if end.vm not in waiting:
                    waiting.add(end.vm)
                    self._go(self._renew(end, waiting))

    async def _renew(self, end: End, waiting: set[str]) -> None:
        try:
            for one in self.ends.of(end.vm):
                await one.renew_lease()
        except Error as error:
            self._log.info("lease not renewed", vm=end.vm, error=str(error))
        finally:
            waiting.discard(end.vm)

    async def _redirects(self) -> None:
        limit = self.config.migration.redirect_idle_s
        gauged = 0.0
        while True:
            await asyncio.sleep(min(REDIRECT_POLL_S, max(limit / 4, 0.05)))
            for end in self.ends:
                if isinstance(end, SourceEnd) and end.state.phase is leaving.Phase.STUB:
                    await self._redirect(end, limit)
            try:
                if await self.hosting.retry_places():
                    self._tell_places()
                metrics.COORDINATOR.set(self.link.connected)
                if (now := asyncio.get_running_loop().time()) - gauged >= GAUGES_S:
                    gauged = now
                    await self._gauges()
            except Error as error:
                self._log.info("not looked at this time", error=str(error))

    async def _redirect(self, end: SourceEnd, limit: float) -> None:
        try:
            idle = await end.call(end.ports.redirect_idle_s)
        except Error as error:  # costs no other redirect its end
            self._log.info("redirect not looked at this time", vm=end.vm, error=str(error))
            return
        if idle >= limit:
            for epoch in sorted({ref.epoch for ref in end.refs}):
                self._tell(pb.FromAgent(redirect_idle=pb.RedirectIdle(vm=end.vm, epoch=epoch, idle_s=idle)))

    async def _gauges(self) -> None:
        counts = dict.fromkeys(PortState, 0)
        for status in await asyncio.to_thread(self.driver.ports):
            counts[status.state] += 1
        for state, count in counts.items():
            metrics.PORTS.labels(str(state)).set(count)
