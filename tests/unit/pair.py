"""Agents with switches in memory, a coordinator and a hypervisor, all in one event loop over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datapath.drivers.dummy import DummyDriver, fabric
from datapath.provider import PortRef, PortState, PortStatus
from datapath.registry import KINDS
from datapath.state.kind import Columns, Table, empty_columns
from migrator._pb import migrator_pb2 as pb
from migrator.agent.config import AgentConfig
from migrator.agent.daemon import Agent
from migrator.agent.guests import GuestEvent, GuestFailed, MoveOptions, Remaining
from migrator.agent.guests.word import BY_DEFAULT
from migrator.agent.side import AgentSide
from migrator.coordinator.cluster import Cluster
from migrator.coordinator.service import serve
from migrator.coordinator.sqlite import SqliteJournal
from migrator.lifecycle.machine import Guest, Role
from migrator.security import authority, identity
from migrator.security.authority import Authority
from migrator.security.identity import Identity
from migrator.security.settings import Tls, folder
from migrator.security.transport import Transport

VM = "6f0c4d2e-7a55-4c0e-9d5e-3f2b8a1c0d01"
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
HOSTS = ("a", "b", "c")


@dataclass
class Hypervisor:
    """One VM that all hosts share. `script` says how its next move goes."""

    place: str = "a"
    running: bool = True
    moving: str = ""
    downtime_s: float = 0.01
    speaks: bool = True
    fail: bool = False  # after the stop: comes back to where it was
    converged: bool = True
    needed_ms: int = 0  # what is left of its memory takes so long
    options: MoveOptions = BY_DEFAULT  # of its last move
    sides: dict[str, Side] = field(default_factory=dict)
    pending: set[asyncio.Task[None]] = field(default_factory=set)

    def side(self, host: str) -> Side:
        return self.sides.setdefault(host, Side(self, host))

    def tell(self, host: str, what: str, reason: str, *, moving: bool) -> None:
        self.sides[host].on_event(GuestEvent(VM, what, moving=moving, reason=reason, time=time.monotonic()))

    def stop(self) -> None:
        self.running = False
        self.tell(self.place, "paused", "migrated" if self.moving else "user", moving=bool(self.moving))
        if self.moving:
            task = asyncio.create_task(self._arrive())
            self.pending.add(task)
            task.add_done_callback(self.pending.discard)

    async def _arrive(self) -> None:
        await asyncio.sleep(self.downtime_s)
        if not self.moving:
            return
        source, destination, self.moving = self.place, self.moving, ""
        if self.fail:
            self.resume(source, "failed")
            return
        self.resume(destination, "migrated")
        await asyncio.sleep(0.005)
        if self.place != source:
            self.tell(source, "gone", "migrated", moving=True)

    def resume(self, host: str, reason: str) -> None:
        self.place, self.running = host, True
        self.tell(host, "running", reason, moving=True)


class Side:
    """The hypervisor as one host's agent sees it."""

    def __init__(self, hypervisor: Hypervisor, host: str) -> None:
        self.all = hypervisor
        self.host = host
        self.on_event: Callable[[GuestEvent], None] = lambda _: None
        self.guards = True  # starts a guarded VM only with the agent's word
        self.guarded: set[tuple[Role, str]] = set()

    async def start(self, on_event: Callable[[GuestEvent], None]) -> None:
        self.on_event = on_event

    async def stop(self) -> None:
        self.on_event = lambda _: None

    @property
    def speaks(self) -> bool:
        return self.all.speaks

    def state(self, vm: str) -> Guest | None:
        assert vm == VM
        if self.all.place != self.host:
            return Guest.GONE
        return Guest.RUNNING if self.all.running else Guest.PAUSED

    def states(self) -> Mapping[str, Guest]:
        return {VM: Guest.RUNNING} if self.all.place == self.host else {}

    async def migrate(self, vm: str, to: str, options: MoveOptions = BY_DEFAULT) -> None:
        self.all.options = options
        if self.all.moving or vm != VM:
            raise GuestFailed(f"the VM moves to {self.all.moving}")
        self.all.moving = to

    async def leaving(self, vm: str) -> bool:
        assert vm == VM
        return True

    async def accompany(self, vm: str) -> None:
        assert vm == VM

    async def remaining(self, vm: str, downtime_ms: int) -> Remaining:
        assert vm == VM
        return Remaining(0, self.all.converged and downtime_ms >= self.all.needed_ms)

    async def suspend(self, vm: str) -> None:
        assert vm == VM
        self.all.stop()

    async def resume(self, vm: str) -> None:
        assert vm == VM
        self.all.resume(self.host, "user")

    async def cancel(self, vm: str, *, certain: bool) -> bool:
        assert vm == VM and certain in (True, False)
        if self.all.place == self.host and self.all.moving:
            self.all.moving = ""
            if not self.all.running:
                self.all.resume(self.host, "cancelled")
        elif self.all.place == self.host and certain and not self.all.running:
            self.all.resume(self.host, "user")
        return self.all.place == self.host and self.all.running

    def committed(self, vm: str) -> None:
        assert vm == VM

    async def guard(self, vm: str, role: Role, migration: str) -> str:  # noqa: ARG002
        self.guarded.add((role, migration))
        return "" if self.guards else "it has no lock driver"

    def unguard(self, vm: str, role: Role, migration: str) -> None:  # noqa: ARG002
        self.guarded.discard((role, migration))

    async def attach(self, side: AgentSide) -> None:
        assert side.host == self.host


@dataclass
class World:
    directory: Path
    name: str
    cluster: Cluster
    address: str
    stack: AsyncExitStack
    hypervisor: Hypervisor = field(default_factory=Hypervisor)
    agents: dict[str, Agent] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    guests: str = ""  # "none": no hypervisor at all
    ports: dict[str, int] = field(default_factory=dict)
    server: Any = None  # the coordinator's
    authority: Authority | None = None  # of those who speak TLS

    async def outage(self) -> None:
        """The coordinator goes; `recover` has it back at its address, with its journal."""
        self.cluster.stop()
        await self.server.stop(0)

    async def recover(self) -> None:
        self.cluster = Cluster(self.cluster.store.journal)
        self.cluster.start()
        self.stack.callback(self.cluster.stop)
        self.server, _ = await serve(self.cluster, [self.address], Transport(self.tls("coordinator", "c")))
        self.stack.push_async_callback(self.server.stop, 0.1)

    def tls(self, role: str, name: str) -> Tls:
        """The certificate of an agent, an operator …, made at the first call."""
        place = self.directory / "tls" / f"{role}-{name}"
        if self.authority is None:
            return Tls()
        if not place.exists():
            self.authority.issue(Identity(identity.Role(role), name), place)
        return folder(place)

    async def agent(self, host: str) -> Agent:
        config = AgentConfig.model_validate(
            {
                "agent": {
                    "host": host,
                    "coordinator": self.address,
                    "listen": f"127.0.0.1:{self.port(host)}",
                    "socket": str(self.directory / f"{host}.sock"),
                    "state_dir": str(self.directory / host),
                },
                "driver": {"name": "dummy", "fabric": self.name, "underlay": f"10.0.0.{1 + HOSTS.index(host)}"},
                "guests": {"driver": "none"},
                "migration": {"redirect_idle_s": 0.1, "step_s": 2.0, "settle_s": 5.0, **self.settings},
                "tls": self.tls("agent", host),
            }
        )
        side = None if self.guests == "none" else self.hypervisor.side(host)
        agent = self.agents[host] = Agent(config, guests=side)
        await agent.start()
        return agent

    def port(self, host: str) -> int:
        """Of the agent's peer service: the same after a restart."""
        if host not in self.ports:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.ports[host] = free.getsockname()[1]
        return self.ports[host]

    async def stop(self, host: str) -> None:
        await self.agents.pop(host).stop()

    async def start(self, *hosts: str) -> None:
        for host in hosts:
            await self.agent(host)
        await eventually(lambda: len(self.cluster.roster) == len(self.agents))

    async def declare(self, host: str = "a", macs: tuple[str, ...] = MACS) -> None:
        rules = [{"direction": "to", "action": "allow", "protocol": "tcp", "ports": ["22"], "priority": 10}]
        config = pb.Config(
            networks=[pb.Network(name="blue", kind="uplink", vlan=10)],
            policies=[pb.Policy(name="web", rules=[pb.Rule(**rule) for rule in rules])],
            ports=[
                pb.Port(
                    vm=VM, mac=mac, network="blue", host=host, device=f"tap{i}", policy="web", addresses=[f"10.1.0.{i}"]
                )
                for i, mac in enumerate(macs, 1)
            ],
        )
        self.cluster.apply(pb.ApplyRequest(config=config))
        await eventually(lambda: len(self.active(host)) == len(macs))

    def driver(self, host: str) -> DummyDriver:
        driver = self.agents[host].driver
        assert isinstance(driver, DummyDriver)
        return driver

    def statuses(self, host: str) -> list[PortStatus]:
        return [status for status in self.driver(host).ports() if status.ref.vm == VM]

    def active(self, host: str) -> list[PortRef]:
        return [status.ref for status in self.statuses(host) if status.state is PortState.ACTIVE]

    def fill(self, host: str, count: int) -> None:
        """So many connections in every port of the VM."""
        for ref in self.active(host):
            self.driver(host).load(ref, Table("conntrack", columns=connections(count)))

    def connections(self, host: str) -> dict[str, set[bytes]]:
        """Keys of all connections by MAC."""
        found: dict[str, set[bytes]] = {}
        for ref in self.active(host):
            keys = found.setdefault(ref.mac, set())
            for table in self.driver(host).dump(ref, "conntrack"):
                assert table.columns is not None
                keys.update(zip(table.columns["raddr"].tolist(), table.columns["rport"].tolist(), strict=True))
        return found

    async def migrate(self, to: str, **options: Any) -> str:
        return await self.cluster.migrations.migrate(pb.MigrateRequest(vm=VM, to=to, **options))

    async def finish(self, migration: str, timeout_s: float = 10.0) -> pb.Migration:
        async with asyncio.timeout(timeout_s):
            reports = [report async for report in self.cluster.migrations.follow(migration)]
            return reports[-1]

    async def quiet(self) -> None:
        """Nothing is in hand any more, not even a redirect."""
        await eventually(lambda: not any(list(agent.ends) for agent in self.agents.values()))


def connections(count: int, seed: int = 0) -> Columns:
    columns = empty_columns(KINDS["conntrack"], count)
    number = np.arange(count, dtype="<u8") + seed
    raw = np.zeros((count, 16), dtype="u1")
    raw[:, 8:] = number.view("u1").reshape(count, 8)
    columns["raddr"] = raw.view("V16").reshape(count)
    columns["rport"] = (number % 60000).astype("<u2")
    columns["proto"][:] = 6
    columns["state"][:] = 3
    columns["id"] = number + 1
    return columns


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def world(
    directory: Path, *hosts: str, guests: str = "", tls: bool = False, **settings: Any
) -> AsyncIterator[World]:
    """A coordinator and agents of these hosts, with the VM's ports at the first one."""
    async with AsyncExitStack() as stack:
        journal = SqliteJournal(directory / "journal.sqlite")
        stack.callback(journal.close)
        cluster = Cluster(journal)
        cluster.start()
        stack.callback(cluster.stop)
        made = World(directory, str(directory), cluster, "", stack, settings=settings, guests=guests)
        made.authority = authority.create(directory / "pki") if tls else None
        made.server, port = await serve(cluster, ["127.0.0.1:0"], Transport(made.tls("coordinator", "c")))
        stack.push_async_callback(made.server.stop, 0.1)
        made.address = f"127.0.0.1:{port}"
        stack.callback(lambda: fabric(made.name).switches.clear())

        async def stop_all() -> None:
            for host in list(made.agents):
                await made.stop(host)

        stack.push_async_callback(stop_all)
        await made.start(*hosts)
        if hosts:
            await made.declare(hosts[0])
        yield made
