# SPDX-License-Identifier: GPL-2.0-only
"""What daemons and hosts hold over time: memory, descriptors, and all that a VM may leave where it is no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.soak.lab import SoakLab
from tests.soak.reference import Model
from tests.soak.scene import CONTROL, HOSTS, MACHINES, VMS

SETTLED = 8  # looks at a process before its memory is taken as what it needs
GROWTH_KB = 32 << 10
GROWTH_FDS = 24  # a port takes about eight, and a host may have more of them than at the first look
FDS_A_PORT = 10
SLACK_HITS = 6  # a packet that was being judged while its rule was withdrawn counts once more
OPEN_RULES = 2  # of the policy that lets all through


@dataclass
class Process:
    """What one daemon held at the first looks, and what it holds now."""

    pid: int
    ports: int
    looks: int = 0
    first_kb: int = 0
    now_kb: int = 0
    first_fds: int = 0
    now_fds: int = 0


class Leaks:
    def __init__(self, lab: SoakLab, model: Model) -> None:
        self.lab, self.model = lab, model
        self.processes: dict[str, Process] = {}

    def look(self) -> list[str]:
        """What has grown beyond its bound."""
        wrong = []
        for name in (*HOSTS, CONTROL):
            process = self._read(name)
            if process.looks > SETTLED and process.now_kb > process.first_kb + GROWTH_KB:
                wrong.append(f"{name} grew from {process.first_kb} to {process.now_kb} kB in {process.looks} looks")
            more = self._ports(name) - process.ports
            if process.now_fds > process.first_fds + GROWTH_FDS + FDS_A_PORT * max(more, 0):
                wrong.append(f"{name} had {process.first_fds} descriptors, has {process.now_fds}, {more} ports more")
        return wrong

    def _read(self, name: str) -> Process:
        pid = self.lab.cluster.daemon(name).pid
        process = self.processes.get(name)
        if process is None or process.pid != pid:
            process = self.processes[name] = Process(pid, self._ports(name))
        process.looks += 1
        process.now_kb, process.now_fds = _memory_kb(pid), len(list(Path(f"/proc/{pid}/fd").iterdir()))
        if process.looks <= SETTLED:
            process.first_kb = max(process.first_kb, process.now_kb)
        process.first_fds = process.first_fds or process.now_fds
        return process

    def left(self) -> list[str]:
        """What hosts' switches hold beyond the ports of the machines that are there."""
        return [f"{host}: {problem}" for host in HOSTS for problem in self._left(host)]

    def _left(self, host: str) -> Iterator[str]:
        remains = self.lab.cluster.remains(host)
        there = [name for name, place in self.model.places.items() if place == host]
        ports = [nic for name in there for nic in MACHINES[name].nics]
        macs = sorted(name.split()[2] for name in remains.get("ports", []))
        if macs != sorted(nic.mac for nic in ports):
            yield f"ports {remains.get('ports')}"
        if remains.get("dirty sets"):
            yield f"dirty sets {remains['dirty sets']}"
        if len(remains.get("channels", [])) > len(ports):  # a port keeps the one by which it came
            yield f"channels {remains['channels']} of {len(ports)} ports"
        if len(remains.get("tables", [])) != len(ports):
            yield f"tables {remains.get('tables')} of {len(ports)} ports"
        hits, most = remains.get("hits", []), sum(self._rules(name) * len(MACHINES[name].nics) for name in there)
        if len(hits) > most + SLACK_HITS:
            yield f"{len(hits)} counters of {most} rules: {hits}"
        if kept := list((self.lab.cluster.directory / host / "state" / "migrations").iterdir()):
            yield f"files of migrations: {[path.name for path in kept]}"

    def _rules(self, name: str) -> int:
        """With the default drop."""
        return 1 + (max(len(self.model.config.applied(name)), OPEN_RULES) if name in VMS else OPEN_RULES)

    def _ports(self, host: str) -> int:
        return sum(len(MACHINES[name].nics) for name, place in self.model.places.items() if place == host)

    def told(self) -> str:
        """Memory and descriptors of each daemon now."""
        return ", ".join(f"{name} {p.now_kb >> 10} MB {p.now_fds} fds" for name, p in self.processes.items())


def _memory_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
