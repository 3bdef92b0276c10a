"""A thousand hosts: how long until all of them know where a VM went."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import pytest

from migrator._pb import migrator_pb2 as pb
from tests.unit.scripted import VM, Agent, Bench, configuration, source

HOSTS = 1_000
CHANNELS = 20
MOVES = 20
BUDGET_S = 1.0


class Crowd(Agent):
    """One of many: notes when it learned each place, keeps nothing else."""

    def __init__(self, number: int, learned: list[float]) -> None:
        super().__init__(f"h{number}")
        self._learned = learned

    def _take(self, message: pb.ToAgent) -> None:
        if message.WhichOneof("message") == "places":
            self._learned.append(time.monotonic())
        super()._take(message)
        if len(self.heard) > 4:
            del self.heard[0]


@pytest.mark.slow
def test_a_thousand_hosts_learn_a_place_in_time(tmp_path: Path, record_property) -> None:
    async def main() -> None:
        async with Bench(tmp_path) as bench:
            learned: list[float] = []
            a, b = source("h1"), source("h2")
            crowd = [Crowd(number, learned) for number in range(3, HOSTS + 1)]
            await bench.attach(a, b)
            channels = [bench.channel() for _ in range(CHANNELS)]
            tasks = [asyncio.create_task(agent.run(channels[n % CHANNELS])) for n, agent in enumerate(crowd)]
            async with asyncio.timeout(120):
                for agent in crowd:
                    await agent.hear("sync")
            await bench.stub.Apply(pb.ApplyRequest(config=configuration()))
            await a.hear("port")
            spans: list[float] = []
            moves: list[float] = []  # the slowest one in a hundred hosts of each move
            for move in range(MOVES):
                here, there = (a, b) if move % 2 == 0 else (b, a)
                learned.clear()
                report = await bench.begin_migration(to=there.host)
                await here.until(lambda m=report.id, h=here: h.migration == m and "authorise" in h.names()[-4:])
                begun = time.monotonic()
                there.progress("opened", report.id)
                assert (await bench.finished(report.id)).outcome == "complete"
                async with asyncio.timeout(30):
                    while len(learned) < len(crowd):
                        await asyncio.sleep(0.005)
                spans += [when - begun for when in learned]
                moves.append(sorted(learned)[int(len(learned) * 0.99)] - begun)
            for agent in crowd:
                agent.stop()
            for task in tasks:
                task.cancel()
            spans.sort()
            p50, p99 = spans[len(spans) // 2], spans[int(len(spans) * 0.99)]
            record_property("place_fanout_p50_s", round(p50, 4))
            record_property("place_fanout_p99_s", round(p99, 4))
            print(f"{HOSTS} hosts, {MOVES} moves of VM {VM}: p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms")
            assert statistics.median(moves) < BUDGET_S  # all hosts share this machine: one busy moment is not the rule

    asyncio.run(main())
