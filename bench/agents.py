"""Agents that have no switch, for the benchmark of a large cluster.

They attach, play their part of a migration at once, acknowledge places, and note when each place reached them. Run as a
process of its own for some of the hosts: `python -m bench.agents ADDRESS FIRST COUNT`. It writes a line of JSON when
all are attached, and one for each line that it reads: {"told": [[MAC, where, time], ...], "opened": [[MAC, where,
time], ...]}, what its hosts were told and did since the line before. Times are seconds of CLOCK_MONOTONIC, which all
processes of a machine share. The end of its input ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc

NEWS = ("told", "opened")
KINDS = {"port": 1, "acl": 1, "fdb": 1, "conntrack": 1}


def host_name(number: int) -> str:
    return f"host{number}"


def underlay(number: int) -> str:
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


class Agent:
    """`others`: the agents of this process by host; the source and the destination of a migration are among them."""

    def __init__(self, number: int, others: dict[str, Agent]) -> None:
        self.host = host_name(number)
        self.hello = pb.Hello(host=self.host, version="bench", driver="none", underlay=underlay(number), peer="none:1")
        self.hello.kinds.update(KINDS)
        self.others = others
        self.told: list[tuple[str, str, float]] = []
        self.opened: list[tuple[str, str, float]] = []
        self.attached = asyncio.Event()
        self._part: dict[str, tuple[pb.StartSource, str]] = {}
        self._saying: asyncio.Queue[pb.FromAgent] = asyncio.Queue()

    async def run(self, address: str) -> None:
        """Until the stream ends."""
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 256 << 20))
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            async for message in migrator_pb2_grpc.CoordinatorStub(channel).Attach(self._messages()):
                self._take(message)

    async def _messages(self) -> AsyncIterator[pb.FromAgent]:
        yield pb.FromAgent(hello=self.hello)
        while True:
            yield await self._saying.get()

    def say(self, **body: Any) -> None:
        self._saying.put_nowait(pb.FromAgent(**body))

    def progress(self, migration: str, *words: str) -> None:
        for word in words:
            self.say(progress=pb.Progress(migration=migration, event=word, report=pb.Migration()))

    def _take(self, message: pb.ToAgent) -> None:
        name = message.WhichOneof("message")
        if name == "places":
            now = time.monotonic()
            self.told += [(place.mac, place.host, now) for place in message.places.places]
            self.say(places=pb.PlacesKnown(revision=message.places.revision))
        if message.request:
            self._answer(message, name)
        if name == "sync":
            self.attached.set()
        elif name == "start":
            self._part[message.start.migration] = (message.start, message.start.destination)
            self.progress(message.start.migration, "converged")
        elif name == "authorise":
            self._switch_over(message.authorise.migration)

    def _answer(self, message: pb.ToAgent, name: str) -> None:
        reply = pb.Reply(request=message.request)
        if name == "describe":
            mac = mac_of(message.describe.vm)
            reply.need.CopyFrom(pb.Need(kinds=KINDS, records=b"\x90", epochs={mac: 1}, connections=65_536))
        self.say(reply=reply)

    def _switch_over(self, migration: str) -> None:
        """What both ends say of it, in the order in which real ones do."""
        start, destination = self._part.pop(migration)
        self.progress(migration, "held", "paused")
        there = self.others[destination]
        there.progress(migration, "committed", "opened")
        there.opened.append((mac_of(start.vm), destination, time.monotonic()))
        self.progress(migration, "redirecting", "settled")
        self.say(redirect_idle=pb.RedirectIdle(vm=start.vm, epoch=max(start.epochs.values()), idle_s=60))


def vm_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def mac_of(vm: str) -> str:
    return ":".join(["02", *(vm[-10:][i : i + 2] for i in range(0, 10, 2))])


async def main(address: str, first: int, count: int) -> None:
    agents: dict[str, Agent] = {}
    for number in range(first, first + count):
        agents[host_name(number)] = Agent(number, agents)
    tasks = [asyncio.create_task(agent.run(address)) for agent in agents.values()]
    for agent in agents.values():
        await agent.attached.wait()
    print(json.dumps({"attached": count}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        news = {name: [entry for agent in agents.values() for entry in getattr(agent, name)] for name in NEWS}
        print(json.dumps(news), flush=True)
        for agent in agents.values():
            agent.told, agent.opened = [], []
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
