"""Many simulated agents in a process of their own: `python -m tests.unit.crowd PORT FIRST LAST`.

Says "attached" when all have had their Sync, then for each place that all have learned one line of JSON: its revision,
and when each of them learned it (CLOCK_MONOTONIC, seconds). Ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict

import grpc

from migrator._pb import migrator_pb2 as pb
from tests.unit.scripted import Agent

CHANNELS = 20


class Crowd:
    """Agents h<first> to h<last>."""

    def __init__(self, port: int, first: int, last: int) -> None:
        self.agents = [Member(number, self) for number in range(first, last + 1)]
        self._learned: dict[int, list[float]] = defaultdict(list)
        options = (("grpc.use_local_subchannel_pool", 1),)
        self._channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(CHANNELS)]

    def learned(self, revision: int) -> None:
        times = self._learned[revision]
        times.append(time.monotonic())
        if len(times) == len(self.agents):
            print(json.dumps({"revision": revision, "times": times}), flush=True)

    async def run(self) -> None:
        spread = enumerate(self.agents)
        tasks = [asyncio.create_task(agent.run(self._channels[n % CHANNELS])) for n, agent in spread]
        while not all("sync" in agent.names() for agent in self.agents):
            await asyncio.sleep(0.1)
        print("attached", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for task in tasks:
            task.cancel()


class Member(Agent):
    """One of the crowd. Attaches again when its stream breaks, as agents do; remembers little."""

    def __init__(self, number: int, crowd: Crowd) -> None:
        super().__init__(f"h{number}")
        self._crowd = crowd

    async def run(self, channel: grpc.aio.Channel) -> None:
        while True:
            await super().run(channel)
            await asyncio.sleep(0.5)

    def _take(self, message: pb.ToAgent) -> None:
        if message.WhichOneof("message") == "places":
            self._crowd.learned(message.places.revision)
        super()._take(message)
        if len(self.heard) > 4:
            del self.heard[0]


async def main() -> None:
    await Crowd(*map(int, sys.argv[1:4])).run()


if __name__ == "__main__":
    asyncio.run(main())
