# SPDX-License-Identifier: GPL-2.0-only
"""One large host: a real agent with 1,000 ports and 100,000 rules, declared as an operator does it.

How long until all of it is in force, how much memory it takes, what a change of one rule costs beside few and beside
many other ports, and how long a restart of the agent takes, during which numbered datagrams go through two of the
ports and none may be lost. All of it and the coordinator share this machine's processors.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from bench.figures import Figures, verify
from bench.plot import Lines
from datapath.drivers.ebpf import syscall
from datapath.drivers.ebpf.maps import Table
from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.cluster import Cluster
from migrator.lab.machines import Port, add_peer
from migrator.lab.processes import Daemon, wait_until
from migrator.snapshot import decode_section
from tests.netns.traffic import Streams

HOST = "h1"
SIZES, QUICK = (10, 100, 1_000), (10, 50)  # ports, one after the other
RULES = 100  # of each port, and no two ports have the same
AT_ONCE = 100  # ports of one Apply
SAMPLED = 20  # ports whose rules are read back
LOADED_S, RESTARTED_S = 600.0, 120.0
CHANGES = 20
MAPS_OF_MAPS = (12, 13)  # BPF_MAP_TYPE_ARRAY_OF_MAPS, BPF_MAP_TYPE_HASH_OF_MAPS
OPEN = {
    "name": "open",
    "rules": [{"direction": way, "priority": 1, "protocol": "any", "action": "allow"} for way in ("from", "to")],
}


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    sizes = QUICK if quick else SIZES
    change = Lines("One rule of one port changed, beside other ports", "ports", "CPU time of the agent, ms")
    options = {"slots": sizes[-1] + 64, "sweep_interval_s": 5.0}
    with Cluster((HOST,), [{"name": "blue", "kind": "local"}], driver_options=options) as cluster:
        host = LargeHost(cluster)
        base = host.memory()
        for before, size in zip((0, *sizes), sizes, strict=False):
            took = host.grow(before, size)
            figures.add(f"{size - before:,} ports and {(size - before) * RULES:,} rules more, in force", "s", [took.s])
            figures.add(f"the same, agent, a port, beside {before:,}", "ms of CPU", [took.agent_ms / (size - before)])
            cost = [host.change() for _ in range(3)]
            row = figures.add(f"one rule changed, agent, {size:,} ports", "ms of CPU", [one.agent_ms for one in cost])
            figures.add(f"one rule changed, coordinator, {size:,} ports", "ms of CPU", [one.other_ms for one in cost])
            latency = [1e3 * host.latency() for _ in range(5 if quick else 10)]
            figures.add(f"one rule changed, until in force, {size:,} ports", "ms", latency)
            change.add("agent", size, row)
        _memory(figures, base, host.memory(), sizes[-1])
        _restarts(figures, host, 1 if quick else 2)
    figures.chart("change", change)
    return figures


def _memory(figures: Figures, base: Mapping[str, float], full: Mapping[str, float], ports: int) -> None:
    for name, mib in full.items():
        figures.add(f"{name}, {ports:,} ports, {ports * RULES:,} rules", "MiB", [mib])
        figures.add(f"{name}, no ports", "MiB", [base[name]])


def _restarts(figures: Figures, host: LargeHost, rounds: int) -> None:
    for how, end in (("stopped", Daemon.stop), ("killed", Daemon.kill)):
        took = [host.restart(end) for _ in range(rounds)]
        ports = host.ports
        figures.add(f"agent {how} and started again, {ports:,} ports: attached", "s", [one[0] for one in took])
        figures.add(
            f"datagrams through two ports while {how} and started, 2,000 a second", "sent", [one[1] for one in took]
        )
        figures.add("of these lost, doubled or overtaken", "lost", [0.0 for _ in took])  # or there is no figure


class Took:
    """Seconds by the clock, ms of CPU of the agent and of the coordinator, from its making to `end`."""

    def __init__(self, cluster: Cluster) -> None:
        self._daemons = (cluster.agents[HOST], cluster.coordinator)
        self._began, self._cpu = time.monotonic(), [_cpu_ms(daemon) for daemon in self._daemons]

    def end(self, divided_by: int = 1) -> Took:
        self.s = (time.monotonic() - self._began) / divided_by
        now = [_cpu_ms(daemon) for daemon in self._daemons]
        self.agent_ms, self.other_ms = (
            (after - before) / divided_by for after, before in zip(now, self._cpu, strict=True)
        )
        return self


class LargeHost:
    """`ports`: those made by `grow`, beside two peers that talk."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.ports = cluster, 0
        self._turn = 0
        cluster.apply(policies=[OPEN])
        self._peers = [
            add_peer(cluster, f"p{n}", HOST, Port(f"02:20:00:00:00:{n:02x}", "blue", (f"10.1.0.{n}",)), policy="open")
            for n in (1, 2)
        ]
        cluster.declare(*self._peers)

    def grow(self, first: int, last: int) -> Took:
        """Devices, then ports with their rules; what it took from the declaration until they pass frames."""
        parts = [range(begin, min(begin + AT_ONCE, last)) for begin in range(first, last, AT_ONCE)]
        for numbers in parts:
            wires = [f"link add d{n} up type veth peer name e{n}\nlink set e{n} up" for n in numbers]
            netns.ip_batch(self.cluster.name(HOST), wires)
        took = Took(self.cluster)
        for numbers in parts:
            self.cluster.apply(policies=[policy(n) for n in numbers], ports=[port(n) for n in numbers])
        self.ports = last
        wait_until(f"{last} ports are open", self._all_open, LOADED_S, 0.5)
        took.end()
        for n in range(first, last, max(1, (last - first) // SAMPLED)):
            verify(f"rules of port {n}", self.rules(n), wanted(n))
        return took

    def _all_open(self) -> bool:
        found = [port.instance.state for port in self.cluster.ports(HOST)]
        return len(found) == self.ports + len(self._peers) and set(found) == {"active"}

    def _served(self) -> bool:
        with contextlib.suppress(grpc.RpcError):  # its socket is not there yet
            there = self.cluster.agent_stub(HOST).Status(pb.Empty(), timeout=10)
            return bool(there.coordinator) and self._all_open()
        return False

    def rules(self, number: int) -> list[str]:
        """Remote prefixes of the rules that the switch has for a port."""
        request = pb.VmRequest(vm=vm(number), kind="acl")
        chunks = self.cluster.agent_stub(HOST).Dump(request, timeout=30)
        tables = [decode_section(chunk.data).table for chunk in chunks]
        records = [record for table in tables if table is not None for record in table.records or ()]
        return sorted(record["remote"][0] for record in records)

    def change(self) -> Took:
        """Ports spread over all have one rule changed, each by an Apply of its own; what one of them took."""
        self._turn += 1
        chosen = sorted({n * self.ports // CHANGES for n in range(CHANGES)})
        took = Took(self.cluster)
        for n in chosen:
            self.cluster.apply(policies=[policy(n, self._turn)])
        last = chosen[-1]  # orders are carried out one after the other; a look costs the agent, too: few of them
        wait_until("the last change is in force", lambda: self.rules(last) == wanted(last, self._turn), 120.0, 0.25)
        took.end(len(chosen))
        for n in chosen:
            verify(f"changed rules of port {n}", self.rules(n), wanted(n, self._turn))
        return took

    def latency(self) -> float:
        """Seconds from the Apply of one changed rule until the switch has it."""
        self._turn += 1
        n = self._turn * 7 % self.ports
        began = time.monotonic()
        self.cluster.apply(policies=[policy(n, self._turn)])
        wait_until("the change is in force", lambda: self.rules(n) == wanted(n, self._turn), 60.0, 0.002)
        return time.monotonic() - began

    def restart(self, end: Callable[[Daemon], object]) -> tuple[float, float]:
        """Seconds from the start of the new agent until it serves all ports, and how many datagrams went through."""
        agent = self.cluster.agents[HOST]
        with self.cluster.scope():
            streams = Streams(self._peers[0], self._peers[1], 1.0)
            end(agent)
            began = time.monotonic()
            agent.start()
            wait_until("the agent serves all ports", self._served, RESTARTED_S, 0.05, explain=agent.tail)
            took = time.monotonic() - began
            streams.run_on(200)
            found = streams.finish()
        for flow, report in found.items():
            lost = {name: report[name] for name in ("missing_count", "doubled", "overtaken")}
            verify(f"datagrams of flow {flow} during the restart", lost, dict.fromkeys(lost, 0))
        return took, float(sum(report["sent"] for report in found.values()))

    def memory(self) -> dict[str, float]:
        """MiB of the agent's process and of all of the switch's maps."""
        status = Path(f"/proc/{self.cluster.agents[HOST].pid}/status").read_text()
        resident = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        pins = (self.cluster.directory / HOST / "bpf").rglob("maps/*")
        return {"agent's memory": resident / 1024, "maps": sum(map(_map_bytes, _maps(pins))) / (1 << 20)}


# ---- what is declared ----


def vm(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def port(number: int) -> dict[str, Any]:
    return {
        "vm": vm(number),
        "mac": f"02:10:00:00:{number >> 8:02x}:{number & 255:02x}",
        "network": "blue",
        "host": HOST,
        "device": f"d{number}",
        "addresses": [f"10.2.{number >> 8}.{number & 255}"],
        "policy": f"policy{number}",
    }


def policy(number: int, turn: int = 0) -> dict[str, Any]:
    """RULES of a port's own; its first rule is another one in each turn."""
    return {
        "name": f"policy{number}",
        "rules": [
            {
                "direction": ("to", "from")[rule % 2],
                "priority": rule + 1,
                "protocol": ("tcp", "udp")[rule // 2 % 2],
                "remote": [remote(number, rule, turn)],
                "ports": [f"{1000 + rule}-{2000 + 3 * rule}"],
                "action": "allow",
            }
            for rule in range(RULES)
        ],
    }


def remote(number: int, rule: int, turn: int) -> str:
    return f"172.{16 + number % 16}.{turn if rule == 0 else rule}.{number >> 4}/32"


def wanted(number: int, turn: int = 0) -> list[str]:
    """As `LargeHost.rules` reads them."""
    return sorted(remote(number, rule, turn) for rule in range(RULES))


# ---- processes and maps ----


def _cpu_ms(daemon: Daemon) -> float:
    tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def _maps(pins: Iterator[Path]) -> Iterator[int]:
    """Descriptors of the pinned maps and of those inside of them; each is closed when the next is taken."""
    for pin in pins:
        handle = syscall.obj_get(pin)
        try:
            yield handle
            info = syscall.map_info(handle)
            if info.type in MAPS_OF_MAPS:
                yield from _inner(handle, info.key_size)
        finally:
            os.close(handle)


def _inner(outer: int, key_size: int) -> Iterator[int]:
    _, ids = Table(os.dup(outer), f"V{key_size}", "<u4").read()
    for id_ in ids.tolist():
        inner = syscall.map_by_id(id_)
        try:
            yield inner
        finally:
            os.close(inner)


def _map_bytes(handle: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    raise LookupError("memlock")
