# SPDX-License-Identifier: GPL-2.0-only
"""A move as the programs of a release spoke in it, said again to an agent of this version in place of one of them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from datapath.drivers.dummy.switch import fabric
from datapath.provider import PortState
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc

from .pair import MACS, VM, World, eventually

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASED = sorted(FIXTURES.glob("rpc-*/move.jsonl"))
COUNT = 200
UNTIMED = {"running", "places", "guest", "redirect_idle", "section", "rolled-back"}
"""What is said more or less often, or sooner or later, from one run to the next."""


@dataclass(frozen=True)
class Said:
    by: str
    to: str
    message: Any

    @property
    def name(self) -> str:
        """What sort of message it is; of a reply also to which request, and whether it is a good one."""
        if isinstance(self.message, pb.Hello):
            return "hello"
        which = str(self.message.WhichOneof("message"))
        if which == "progress":
            return str(self.message.progress.event)
        if which == "reply":
            problem = self.message.reply.problem.message
            return f"reply to {self.message.reply.request}" + (f": {problem}" if problem else "")
        return which


def recorded(path: Path) -> Iterator[Said]:
    for line in path.read_text().splitlines():
        one = json.loads(line)
        yield Said(one["by"], one["to"], json_format.ParseDict(one["message"], getattr(pb, one["type"])()))


@dataclass
class Others(rpc.CoordinatorServicer, rpc.PeerServicer):
    """Everyone but the agent `who`: says what was recorded, when the agent has said what it then had said."""

    who: str
    heard: Counter[str] = field(default_factory=Counter)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    orders: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    stream: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    sections: int = 0

    def note(self, message: Any) -> None:
        self.heard[Said(self.who, "", message).name] += 1
        self.news.set()

    async def hears(self, name: str, times: int) -> None:
        try:
            async with asyncio.timeout(15):
                while self.heard[name] < times:
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise AssertionError(f"{self.who} did not say {name!r}; it said {dict(self.heard)}") from None

    async def _listen(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            self.note(message.hello if isinstance(message, pb.FromAgent) and message.HasField("hello") else message)

    @asynccontextmanager
    async def _listening(self, messages: AsyncIterator[Any]) -> AsyncIterator[None]:
        task = asyncio.create_task(self._listen(messages))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def Attach(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802, ARG002
        async with self._listening(requests):
            while True:
                yield await self.orders.get()

    async def Move(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802, ARG002
        async with self._listening(requests):
            while True:
                yield await self.stream.get()

    async def call(self, address: str) -> Any:
        """As the source: the stream to the destination's agent. Returns what to write to."""
        channel = grpc.aio.insecure_channel(address)
        call: Any = rpc.PeerStub(channel).Move()  # type: ignore[no-untyped-call]
        task = asyncio.create_task(self._listen(call))

        async def close() -> None:
            call.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await channel.close()

        return call, close


@asynccontextmanager
async def among(directory: Path, who: str) -> AsyncIterator[tuple[World, Others, str]]:
    """An agent of this version at host `who`, alone with others; and the address of these."""
    async with AsyncExitStack() as stack:
        others, server = Others(who), grpc.aio.server()
        rpc.add_CoordinatorServicer_to_server(others, server)  # type: ignore[no-untyped-call]
        rpc.add_PeerServicer_to_server(others, server)  # type: ignore[no-untyped-call]
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        stack.push_async_callback(server.stop, 0)
        world = World(directory, str(directory), None, address, stack)  # type: ignore[arg-type]
        stack.callback(lambda: fabric(world.name).switches.clear())
        far = World(directory, world.name, None, "127.0.0.1:1", stack)  # type: ignore[arg-type]
        host = {"a": "b", "b": "a"}[who]
        far.hypervisor = world.hypervisor
        await far.agent(host)  # its switch is what the path leads to
        stack.push_async_callback(far.stop, host)
        await world.agent(who)
        stack.push_async_callback(world.stop, who)
        yield world, others, address


async def replay(world: World, others: Others, address: str, said: list[Said]) -> None:
    """Say what others said, in its order; wait for what the agent said in between."""
    times: Counter[str] = Counter()
    stream: Any = None
    for one in said:
        if one.by == others.who and one.name not in UNTIMED:
            times[one.name] += 1
            await others.hears(one.name, times[one.name])
        elif one.by == "b" == others.who and one.name == "guest":
            world.hypervisor.resume("b", "migrated")
        elif one.to == others.who and isinstance(one.message, pb.FromSource):
            if stream is None:
                stream, close = await others.call(f"127.0.0.1:{world.port('b')}")
                world.stack.push_async_callback(close)
            await stream.write(one.message)
        elif one.to == others.who and isinstance(one.message, pb.FromDestination):
            others.stream.put_nowait(one.message)
        elif one.to == others.who:
            if one.message.HasField("start"):
                one.message.start.peer = address
            if one.message.HasField("describe"):
                world.fill("a", COUNT)
            others.orders.put_nowait(one.message)


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.parent.name)
def test_a_released_source_moves_a_vm_to_this_version(path: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with among(tmp_path, "b") as (world, others, address):
            await replay(world, others, address, list(recorded(path)))
            assert [ref.mac for ref in world.active("b")] == list(MACS)
            assert {mac: len(keys) for mac, keys in world.connections("b").items()} == dict.fromkeys(MACS, COUNT)
            assert all(ref.epoch == 2 for ref in world.active("b"))

    asyncio.run(run())


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.parent.name)
def test_this_version_moves_a_vm_to_a_released_destination(path: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with among(tmp_path, "a") as (world, others, address):
            await replay(world, others, address, list(recorded(path)))
            assert others.heard["section"] >= 4
            await eventually(lambda: not [s for s in world.statuses("a") if s.state is not PortState.STUB])

    asyncio.run(run())


def test_the_record_is_of_a_whole_move() -> None:
    assert RELEASED
    for path in RELEASED:
        names = [one.name for one in recorded(path)]
        assert {"hello", "prepare", "start", "final", "committed", "opened", "settled", "end_redirect"} <= set(names)
        assert VM in path.read_text()
