"""A coordinator on loopback and agents that answer by script, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc
from migrator.coordinator.cluster import Cluster
from migrator.coordinator.service import serve
from migrator.coordinator.settings import Deadlines
from migrator.coordinator.sqlite import SqliteJournal

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
MAC = "52:54:00:12:34:56"
DEADLINE_S = 10.0


def configuration(host: str = "h1", vm: str = VM, mac: str = MAC) -> pb.Config:
    """One network, a policy with an address set, one port."""
    rule = pb.Rule(direction="to", priority=10, protocol="tcp", ports=["443"], remote=["@office"], action="allow")
    return pb.Config(
        networks=[pb.Network(name="blue", kind="uplink", vlan=7)],
        address_sets=[pb.AddressSet(name="office", prefixes=["192.0.2.0/24"])],
        policies=[pb.Policy(name="web", rules=[rule])],
        ports=[pb.Port(vm=vm, mac=mac, network="blue", host=host, device="t{mac6}", policy="web", name="shop")],
    )


class Agent:
    """One agent. `refuse` names requests answered with a problem; `heard` is every message it got, in order.

    `on` maps a message's name to what the agent says on it, as Progress words.
    """

    def __init__(self, host: str, **hello: Any) -> None:
        self.host = host
        self.hello = pb.Hello(host=host, version="1", driver="dummy", underlay=f"10.0.0.{host[1:]}", **hello)
        self.hello.kinds.update({"port": 1})
        self.refuse: set[str] = set()
        self.silent: set[str] = set()
        self.acknowledges = True
        self.guest = ""  # what its hypervisor says of the VM
        self.on: dict[str, list[str]] = {}
        self.heard: list[pb.ToAgent] = []
        self.migration = ""
        self._heard_more = asyncio.Event()
        self._saying: asyncio.Queue[pb.FromAgent | None] = asyncio.Queue()

    def say(self, **body: Any) -> None:
        self._saying.put_nowait(pb.FromAgent(**body))

    def stop(self) -> None:
        self._saying.put_nowait(None)

    def progress(self, word: str, migration: str = "", **report: Any) -> None:
        message = pb.Progress(migration=migration or self.migration, event=word, report=pb.Migration(**report))
        self.say(progress=message)

    def names(self) -> list[str]:
        return [message.WhichOneof("message") for message in self.heard]

    def last(self, name: str) -> Any:
        return next(getattr(m, name) for m in reversed(self.heard) if m.WhichOneof("message") == name)

    async def until(self, found: Callable[[], Any]) -> Any:
        """Wait until `found()` is true after a message came. Fails after a deadline."""
        async with asyncio.timeout(DEADLINE_S):
            while not (value := found()):
                self._heard_more.clear()
                await self._heard_more.wait()
            return value

    async def hear(self, name: str, count: int = 1) -> Any:
        await self.until(lambda: self.names().count(name) >= count)
        return self.last(name)

    async def run(self, channel: grpc.aio.Channel) -> None:
        """Attach and answer until the stream ends."""
        stream = migrator_pb2_grpc.CoordinatorStub(channel).Attach(self._messages())
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            async for message in stream:
                self._take(message)

    async def _messages(self) -> AsyncIterator[pb.FromAgent]:
        yield pb.FromAgent(hello=self.hello)
        while (message := await self._saying.get()) is not None:
            yield message

    def _take(self, message: pb.ToAgent) -> None:
        name = message.WhichOneof("message")
        self.heard.append(message)
        self.migration = getattr(getattr(message, name), "migration", "") or self.migration
        if message.request and name not in self.silent:
            self._answer(message.request, name)
        if name == "places" and self.acknowledges:
            self.say(places=pb.PlacesKnown(revision=message.places.revision))
        for word in self.on.get(name, ()):
            self.progress(word)
        self._heard_more.set()

    def _answer(self, request: int, name: str) -> None:
        reply = pb.Reply(request=request)
        if name in self.refuse:
            reply.problem.CopyFrom(pb.Problem(kind="PreflightFailed", message=f"{name} refused", hint="try later"))
        elif name == "guest":
            reply.guest = self.guest
        elif name == "describe":
            reply.need.CopyFrom(pb.Need(kinds={"port": 1}, records=b"\x90", epochs={MAC: 1}, connections=65536))
        self.say(reply=reply)


def source(host: str = "h1", **hello: Any) -> Agent:
    """An agent whose side of a migration goes well."""
    agent = Agent(host, **hello)
    agent.on = {"start": ["converged"], "authorise": ["held", "paused"], "verdict": ["redirecting", "settled"]}
    return agent


class Bench:
    """A coordinator with a journal in a file, and its agents. `kill` ends it as a crash would."""

    def __init__(self, folder: Path, **deadlines: float) -> None:
        self._path = folder / "journal.sqlite"
        self._deadlines = Deadlines(**deadlines)
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[grpc.aio.Channel] = []
        self.agents: dict[str, Agent] = {}

    async def __aenter__(self) -> Bench:
        await self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def begin(self) -> None:
        self.journal = SqliteJournal(self._path)
        self.cluster = Cluster(self.journal, self._deadlines)
        self.cluster.start()
        self._server, self.port = await serve(self.cluster, ["127.0.0.1:0"])
        self.stub = migrator_pb2_grpc.CoordinatorStub(self.channel())

    def channel(self) -> grpc.aio.Channel:
        options = (("grpc.use_local_subchannel_pool", 1),)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=options)
        self._channels.append(channel)
        return channel

    async def attach(self, *agents: Agent) -> None:
        for agent in agents:
            self.agents[agent.host] = agent
            self._tasks.append(asyncio.get_running_loop().create_task(agent.run(self.channel())))
            await agent.hear("sync")

    async def kill(self) -> None:
        """No word to anyone: from here nothing is written, whatever the agents still say."""
        self.cluster.stop()
        await self._server.stop(0)
        for agent in self.agents.values():
            agent.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        self._tasks, self._channels = [], []
        self.journal.close()

    async def two_hosts(self) -> tuple[Agent, Agent]:
        """h1 with the VM, h2 empty, both attached and willing."""
        a, b = source("h1"), Agent("h2")
        await self.attach(a, b)
        await self.stub.Apply(pb.ApplyRequest(config=configuration()))
        await a.hear("port")
        return a, b

    async def finished(self, migration: str) -> pb.Migration:
        async with asyncio.timeout(DEADLINE_S):
            async for report in self.stub.Follow(pb.MigrationRef(id=migration)):
                last = report
        return last

    async def begin_migration(self, **request: Any) -> pb.Migration:
        """First report of a migration that goes on by itself."""
        request = {"vm": "shop", "to": "h2", **request}
        call = self.stub.Migrate(pb.MigrateRequest(**request))
        async with asyncio.timeout(DEADLINE_S):
            return await call.read()

    async def phase(self, migration: str, wanted: str) -> pb.Migration:
        """Wait for a phase that lasts: of reports that follow each other closely the newest alone is told."""
        async with asyncio.timeout(DEADLINE_S):
            async for report in self.stub.Follow(pb.MigrationRef(id=migration)):
                if report.phase == wanted:
                    return report
        raise AssertionError(f"ended in phase {report.phase}: {report.reason}")
