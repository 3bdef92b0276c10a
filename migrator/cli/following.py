"""Follows the state of VMs from host to host: one stream to the agent of each host where the coordinator says they are.

When a VM opens at another host its agent tells all that is there, and the view finds what of it is new: no change is
told twice, and none that lasts is left out, whether a VM moved, an agent was restarted or a connection broke. While the
coordinator is away the streams go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.coordinator.rpc import received
from migrator.errors import AccessError, MigrationError
from migrator.inspect import rows
from migrator.security.transport import Transport
from migrator.snapshot import decode_section
from migrator.watching.view import Change, Update, View

OPTIONS = [
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
AGAIN_S = (0.1, 0.2, 0.5, 1.0, 2.0)
WAITING_MAX = 10
"""Messages of agents, each of 1 MiB at most, that wait for whoever prints them or runs commands: then agents wait."""


@dataclass
class Wanted:
    """What is watched. `vm`: uuid, name or ""; `mac`: "" any. `request`: kinds, matches and interval."""

    request: pb.StateRequest
    vm: str = ""
    mac: str = ""

    def takes(self, port: pb.Port) -> bool:
        """Is it one of the ports that are watched?"""
        return (not self.vm or self.vm.lower() == port.vm or self.vm == port.name) and self.mac in ("", port.mac)


@dataclass
class Ways:
    """How agents and coordinator are reached. `socket` not "": this host's agent alone, without the coordinator."""

    transport: Transport
    coordinator: str = ""
    socket: str = ""


@dataclass
class _Host:
    """A host's stream. `told`: it has said all that was there at first, or cannot be reached."""

    key: tuple[str, frozenset[str]]
    task: asyncio.Task[None]
    told: bool = False


@dataclass
class Follower:
    """`give` takes the changes of one message, or why there are no more, and blocks while too many wait."""

    wanted: Wanted
    ways: Ways
    give: Callable[[list[Change] | Error], Any]
    warn: Callable[[str], None]
    names: dict[str, str] = field(default_factory=dict)  # uuid -> name
    view: View = field(default_factory=lambda: View(rows))
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _peers: dict[str, str] = field(default_factory=dict)
    _ports: dict[tuple[str, str], str] = field(default_factory=dict)  # -> host
    _named: set[tuple[str, str]] = field(default_factory=set)  # objects of the snapshot that comes
    _missed: set[str] = field(default_factory=set)  # hosts without an address, which were warned of
    _here: set[tuple[str, str]] = field(default_factory=set)  # what the one agent has told
    _known: bool = False
    _said: deque[list[Change] | Error] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Until it is cancelled. Raises what the first stream is refused with; later ones are tried again."""
        deliverer = asyncio.create_task(self._deliver())
        try:
            if self.ways.socket:
                await self._one_agent()
            else:
                async for change in self._again("the coordinator", self._objects):
                    await self._object(change)
        finally:
            tasks = [deliverer, *(host.task for host in self._hosts.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(
        self, whom: str, stream: Callable[[], AsyncIterator[Any]], *, host: str | None = None
    ) -> AsyncIterator[Any]:
        """A stream that is made again when it breaks. Raises when it is refused, or cannot be made at first.

        `host`: it is of an agent, so that changes may have been missed; one of several ("" the only one) may be
        away at first.
        """
        tried, began = 0, False
        while True:
            try:
                async for item in stream():
                    if tried:
                        self.warn(f"{whom} answers")
                        await self._say([Change("lost", "", host=host)] if began and host is not None else [])
                    tried, began = 0, True
                    yield item
            except (MigrationError, AccessError) as error:
                if not began and (not host or isinstance(error, AccessError)):
                    raise
                if tried == 0:
                    self.warn(f"{error}; trying again")
            await asyncio.sleep(AGAIN_S[min(tried, len(AGAIN_S) - 1)])
            tried += 1

    # ---- the coordinator: where VMs are ----

    async def _objects(self) -> AsyncIterator[pb.Change]:
        self._named = set()
        async with self.ways.transport.to_coordinator(self.ways.coordinator, OPTIONS) as channel:
            stub = rpc.CoordinatorStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Watch(pb.WatchRequest(sorts=["host", "port"]))
            async for change in _translated(call, f"the coordinator at {self.ways.coordinator}"):
                yield change

    async def _object(self, change: pb.Change) -> None:
        if change.snapshot:
            self._named.add((change.sort, change.name))
        if change.sort == "host":
            self._peers[change.name] = "" if change.removed else change.host.peer
        elif change.sort == "port":
            await self._port(change)
        if change.snapshot_end:
            self._known = True
            for vm, mac in [port for port in self._ports if ("port", "/".join(port)) not in self._named]:
                await self._ended(vm, mac)
        if self._known:
            self._connect()
            await self._maybe_current()

    async def _port(self, change: pb.Change) -> None:
        vm, _, mac = change.name.partition("/")
        if change.removed:
            await self._ended(vm, mac)
            return
        self.names[vm] = change.port.name
        if self.wanted.takes(change.port):
            self._ports[vm, mac] = change.port.host

    async def _ended(self, vm: str, mac: str) -> None:
        if self._ports.pop((vm, mac), None) is not None:
            await self._say(self.view.leave(vm, mac))

    def _connect(self) -> None:
        """A stream to each host where one of the ports is, and to no other."""
        vms = frozenset(vm for vm, _ in self._ports) if self.wanted.vm else frozenset()
        hosts = sorted({host for host in self._ports.values() if host})
        needed = {host: (self._peers[host], vms) for host in hosts if self._peers.get(host)}
        for name in set(hosts) - needed.keys() - self._missed:
            self._missed.add(name)
            self.warn(f"the agent of {name} has not said yet where it is: its ports are not watched until it does")
        for name, host in list(self._hosts.items()):
            if needed.get(name) != host.key:
                self._hosts.pop(name).task.cancel()
        for name, key in needed.items():
            if name not in self._hosts:
                self._hosts[name] = _Host(key, asyncio.create_task(self._follow(name, *key)))

    # ---- agents: what is there ----

    async def _follow(self, host: str, peer: str, vms: frozenset[str]) -> None:
        request = pb.StateRequest()
        request.CopyFrom(self.wanted.request)
        request.vms.extend(sorted(vms))
        try:
            async for update in self._again(host, lambda: self._updates(host, peer, request), host=host):
                await self._update(host, update)
        except Error as error:
            self._put(error)

    async def _one_agent(self) -> None:
        self._known = True
        agent = f"unix:{self.ways.socket}"
        async for update in self._again("the agent", lambda: self._updates("", agent, self.wanted.request), host=""):
            await self._update("", update)

    async def _updates(self, host: str, address: str, request: pb.StateRequest) -> AsyncIterator[pb.StateUpdate]:
        self._here = set()
        try:
            async with self.ways.transport.to_agent(address, host, OPTIONS) as channel:
                stub = rpc.StateStub(channel)  # type: ignore[no-untyped-call]
                async for update in _translated(stub.Watch(request), f"the agent at {address}"):
                    yield update
        except MigrationError:
            await self._begun(host)  # nobody waits for what cannot be had
            raise

    async def _update(self, host: str, update: pb.StateUpdate) -> None:
        if update.what == "lost":
            self._here = set()
            await self._say([Change("lost", "", host=host, time=update.time)])
        elif update.what == "current":
            await self._told(host)
        elif update.what == "gone":
            if (update.vm, update.mac) not in self._ports:  # where it has gone no coordinator says
                await self._say(self.view.leave(update.vm, update.mac, host, update.epoch, update.time))
        else:
            self._here.add((update.vm, update.mac))
            tables = [decode_section(sealed).table for sealed in update.sections]
            known = tuple(table for table in tables if table is not None)
            where = (update.vm, update.mac, update.epoch, update.kind)
            await self._say(self.view.take(host, Update(update.what, *where, known, update.last, update.time)))

    async def _told(self, host: str) -> None:
        """All that was there at the beginning of a stream has been told: what is not among it has gone."""
        if self.ways.socket:
            for vm, mac, _ in self.view.ports(host):
                if (vm, mac) not in self._here:
                    await self._say(self.view.leave(vm, mac))
        await self._begun(host)

    async def _begun(self, host: str) -> None:
        if host in self._hosts:
            self._hosts[host].told = True
        await self._maybe_current()

    async def _maybe_current(self) -> None:
        if self.view.snapshot and self._known and all(host.told for host in self._hosts.values()):
            self.view.snapshot = False
            await self._say([Change("current", "", snapshot=True)])

    async def _say(self, changes: Iterable[Change]) -> None:
        """Changes in the order in which the view found them. Who is cancelled while there is no room has said it."""
        if said := list(changes):
            self._put(said)
            while len(self._said) > WAITING_MAX:
                self._room.clear()
                await self._room.wait()

    def _put(self, said: list[Change] | Error) -> None:
        self._said.append(said)
        self._news.set()

    async def _deliver(self) -> None:
        while True:
            while not self._said:
                self._news.clear()
                await self._news.wait()
            said = self._said.popleft()
            self._room.set()
            await asyncio.to_thread(self.give, said)


async def _translated(call: Any, target: str) -> AsyncIterator[Any]:
    try:
        async for item in call:
            yield item
    except grpc.aio.AioRpcError as error:
        raise received(error, target) from None
    finally:
        call.cancel()


class _Ended(Exception):
    pass


def follow(wanted: Wanted, ways: Ways, warn: Callable[[str], None]) -> Iterator[tuple[Change, str]]:
    """Changes with the name of their VM, as they come, from a thread that ends with the iterator.

    Raises what the streams are refused with.
    """
    waiting: queue.Queue[list[Change] | BaseException] = queue.Queue(WAITING_MAX)
    stopped = threading.Event()

    def put(item: list[Change] | BaseException) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return
        raise _Ended

    follower = Follower(wanted, ways, put, warn)
    loop = asyncio.new_event_loop()
    work = loop.create_task(follower.run())

    def run() -> None:
        try:
            loop.run_until_complete(work)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            with contextlib.suppress(_Ended):
                put(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=run, name="following", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, BaseException):
                raise item
            for change in item:
                yield change, follower.names.get(change.vm, "")
    finally:
        stopped.set()
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(work.cancel)
        thread.join()
