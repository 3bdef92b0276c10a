"""A large cluster on one coordinator: how soon all hosts know a VM's new place, how many moves it drives in a second.

The coordinator is the real one, a process with its journal on disk; agents are simulated (bench.agents), with real gRPC
streams on loopback. The VMs move one after the other for the times, then many at once for the rate. All of it shares
this machine's processors, so the times are bounds for a coordinator with processors of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.agents import NEWS, host_name, mac_of, vm_of
from bench.figures import Figures
from bench.plot import Lines
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc

AGENTS_A_PROCESS = 250
DEADLINE_S = 120.0
AT_ONCE = 32
CLOCK_TICK = os.sysconf("SC_CLK_TCK")


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    times = Lines("Until all hosts know a VM's new place", "hosts", "ms")
    rate = Lines(f"Moves of one coordinator, {AT_ONCE} at once", "hosts", "moves/s")
    for hosts in (10, 50) if quick else (10, 100, 1_000):
        asyncio.run(_one_size(figures, (times, rate), hosts, 5 if quick else 40, 40 if quick else 400))
    figures.chart("places", times)
    figures.chart("moves", rate)
    return figures


async def _one_size(figures: Figures, charts: tuple[Lines, Lines], hosts: int, alone: int, together: int) -> None:
    async with cluster(hosts) as bench:
        vms = await bench.declare(hosts // 2)
        delays = []
        for number in range(alone):
            delays += await bench.move(vms[number % len(vms)])
        budget = "<1000" if hosts == 1_000 else ""
        for percentile, bound in ((50, ""), (99, budget)):
            value = 1e3 * float(np.percentile(delays, percentile))
            figure = figures.add(f"{hosts:,} hosts: place known, p{percentile}", "ms", [value], bound)
            charts[0].add(f"p{percentile}", hosts, figure)
        figures.add(f"{hosts:,} hosts: place known, worst of {len(delays):,}", "ms", [1e3 * max(delays)])
        cpu, began = bench.cpu_s(), time.monotonic()
        await bench.move_many(vms, together)
        lasted = time.monotonic() - began
        charts[1].add(
            "moves/s", hosts, figures.add(f"{hosts:,} hosts: moves, {AT_ONCE} at once", "moves/s", [together / lasted])
        )
        figures.add(f"{hosts:,} hosts: coordinator's CPU a move", "ms", [1e3 * (bench.cpu_s() - cpu) / together])
        figures.add(f"{hosts:,} hosts: coordinator's memory, peak", "MiB", [bench.memory_mib()])


@dataclass
class Vm:
    """Moves between two hosts of one process of agents."""

    vm: str
    hosts: tuple[str, str]
    at: int = 0

    def next(self) -> str:
        self.at = 1 - self.at
        return self.hosts[self.at]


@dataclass
class Cluster:
    coordinator: subprocess.Popen[bytes]
    stub: Any
    agents: list[asyncio.subprocess.Process] = field(default_factory=list)
    hosts: int = 0

    async def declare(self, count: int) -> list[Vm]:
        """A VM for each pair of hosts, with one port."""
        vms = [Vm(vm_of(n), (host_name(2 * n), host_name(2 * n + 1))) for n in range(count)]
        ports = [
            pb.Port(vm=vm.vm, mac=mac_of(vm.vm), network="blue", host=vm.hosts[0], device="t{mac6}", policy="web")
            for vm in vms
        ]
        rule = pb.Rule(direction="to", protocol="tcp", ports=["443"], action="allow", priority=1)
        config = pb.Config(
            networks=[pb.Network(name="blue", kind="overlay", vni=7)],
            policies=[pb.Policy(name="web", rules=[rule])],
            ports=ports,
        )
        await self.stub.Apply(pb.ApplyRequest(config=config))
        await self.collect()
        return vms

    async def move(self, vm: Vm) -> list[float]:
        """Seconds until each host knew the new place, from the word that it is open."""
        await self._migrate(vm)
        place = (mac_of(vm.vm), vm.hosts[vm.at])
        opened: list[float] = []
        told: list[float] = []
        async with asyncio.timeout(DEADLINE_S):
            while len(told) < self.hosts:
                news = await self.collect()
                opened += [at for mac, host, at in news["opened"] if (mac, host) == place]
                told += [at for mac, host, at in news["told"] if (mac, host) == place]
        assert (len(opened), len(told)) == (1, self.hosts), f"opened {len(opened)} times, told {len(told)} hosts"
        return [at - opened[0] for at in told]

    async def move_many(self, vms: list[Vm], count: int) -> None:
        slots = asyncio.Semaphore(AT_ONCE)
        busy = {vm.vm: asyncio.Lock() for vm in vms}

        async def one(vm: Vm) -> None:
            async with busy[vm.vm], slots:
                await self._migrate(vm)

        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(one(vms[number % len(vms)]) for number in range(count)))

    async def _migrate(self, vm: Vm) -> None:
        last = None
        async for report in self.stub.Migrate(pb.MigrateRequest(vm=vm.vm, to=vm.next(), ordered_elsewhere=False)):
            last = report
        assert last is not None and last.outcome == "complete", last

    async def collect(self) -> dict[str, list[tuple[str, str, float]]]:
        """What the hosts were told and did since the last call: MAC, host, time."""
        found: dict[str, list[tuple[str, str, float]]] = {name: [] for name in NEWS}
        for process in self.agents:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"\n")
            news = json.loads(await process.stdout.readline())
            for name in NEWS:
                found[name] += [tuple(entry) for entry in news[name]]
        return found

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.coordinator.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICK

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.coordinator.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


@contextlib.asynccontextmanager
async def cluster(hosts: int) -> AsyncIterator[Cluster]:
    """A coordinator and that many agents, all attached."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-cluster-")))
        address = f"127.0.0.1:{_free_port()}"
        coordinator = _coordinator(folder, address)
        stack.callback(_end, coordinator)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        await asyncio.wait_for(channel.channel_ready(), DEADLINE_S)
        bench = Cluster(coordinator, migrator_pb2_grpc.CoordinatorStub(channel), hosts=hosts)
        for first in range(0, hosts, AGENTS_A_PROCESS):
            count = min(AGENTS_A_PROCESS, hosts - first)
            process = await _agents(address, first, count)
            stack.push_async_callback(_close, process)
            bench.agents.append(process)
        for process in bench.agents:
            assert process.stdout is not None
            await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        yield bench


def _coordinator(folder: Path, address: str) -> subprocess.Popen[bytes]:
    config = folder / "coordinator.toml"
    config.write_text(
        f'[coordinator]\nlisten = ["{address}"]\nstate_dir = "{folder}"\nlog_level = "error"\n[tls]\ninsecure = true\n'
    )
    return subprocess.Popen([sys.executable, "-m", "migrator.cli.main", "coordinator", "--config", str(config)])


async def _agents(address: str, first: int, count: int) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "bench.agents", address, str(first), str(count))
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 26)


async def _close(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await asyncio.wait_for(process.wait(), DEADLINE_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(DEADLINE_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
