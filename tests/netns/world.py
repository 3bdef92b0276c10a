# SPDX-License-Identifier: GPL-2.0-only
"""What a scenario is made of: VMs and peers on the networks of a cluster, moves, and the proof that nothing is left."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator.lab import oracle
from migrator.lab.machines import Machine, Port, add_peer, add_vm, unplug
from migrator.lab.processes import PATIENT_S, wait_until

from .standing import StandingCluster

NETWORKS: list[dict[str, Any]] = [
    {"name": "blue", "kind": "uplink", "vlan": 100, "uplink": "up0"},
    {"name": "over", "kind": "overlay", "vni": 5000, "mtu": 1450},
]

SERVICE = 7000  # TCP, both ways
NUMBERS = 9000  # UDP, numbered
ECHO = 9001  # UDP, admitted from the guest only

POLICIES: list[dict[str, Any]] = [
    {
        "name": "open",
        "rules": [{"direction": way, "priority": 100, "protocol": "any", "action": "allow"} for way in ("from", "to")],
    },
    {
        "name": "server",
        "rules": [  # what is not named is dropped: answers pass by state alone
            {"direction": "to", "priority": 10, "protocol": "tcp", "ports": [str(SERVICE)], "action": "allow"},
            {"direction": "from", "priority": 10, "protocol": "tcp", "ports": [str(SERVICE)], "action": "allow"},
            {"direction": "to", "priority": 20, "protocol": "udp", "ports": [str(NUMBERS)], "action": "allow"},
            {"direction": "from", "priority": 20, "protocol": "udp", "ports": [f"{NUMBERS}-{ECHO}"], "action": "allow"},
            {"direction": "from", "priority": 30, "protocol": "icmp", "icmp": "8", "action": "allow"},
            {"direction": "from", "priority": 30, "protocol": "icmpv6", "icmp": "128", "action": "allow"},
        ],
    },
]

BRIEF_S = 12
BRIEF = dict.fromkeys(("tcp_established", "udp", "udp_stream"), BRIEF_S * 1000)
POLICIES.append({**POLICIES[0], "name": "brief", "timeouts_ms": BRIEF})

MEMORY_MS = 50
# lines of the daemons' logs that any test may cause: a peer's port has no hypervisor behind it
EXPECTED: tuple[str, ...] = ()


class ClusterBox:
    """The session's cluster; made anew when a test has left it otherwise than it was."""

    def __init__(self) -> None:
        self.cluster: StandingCluster | None = None
        self.dirty = False

    def get(self) -> StandingCluster:
        if self.dirty:
            self.close()
        if self.cluster is None:
            self.cluster = self._made().__enter__()
            self.cluster.apply(policies=POLICIES)
        return self.cluster

    def _made(self) -> StandingCluster:
        return StandingCluster(networks=NETWORKS, migration_options={"redirect_idle_s": 1.0})

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.__exit__(None, None, None)
        self.cluster, self.dirty = None, False


class World:
    """One test's part of the cluster."""

    _numbers = itertools.count(1)

    def __init__(self, cluster: StandingCluster) -> None:
        self.cluster = cluster
        self.failed = False
        self._last_words: str | None = None
        self.machines: list[Machine] = []
        self.expected: list[str] = list(EXPECTED)  # patterns of log lines that this test causes
        self.marks = {d.name: d.log.stat().st_size for d in self._daemons()}
        self.before = {host: oracle.traces(cluster, host) for host in cluster.host_names}

    # ---- making ----

    def vm(self, host: str = "h1", network: str = "blue", **fields: Any) -> Machine:
        """A VM that runs on a host, its port open."""
        fields.setdefault("policy", "server")
        fields.setdefault("behaviour", {"memory_ms": MEMORY_MS})
        name, port = self._next("v", network)
        machine = add_vm(self.cluster, name, host, [port], **fields)
        return self._declared(machine)

    def peer(self, host: str = "h3", network: str = "blue", **fields: Any) -> Machine:
        """A peer that never moves, as a port of a host's switch."""
        fields.setdefault("policy", "open")
        name, port = self._next("p", network)
        return self._declared(add_peer(self.cluster, name, host, port, **fields))

    def _next(self, sort: str, network: str) -> tuple[str, Port]:
        n = next(self._numbers)
        mtu = next(x.get("mtu", 1500) for x in NETWORKS if x["name"] == network)
        addresses = (f"10.1.{n >> 8}.{n & 255}", f"fd00:1::{n:x}")
        silent = (f"10.1.{128 + (n >> 8)}.{n & 255}", f"fd00:1::1:{n:x}")
        return f"{sort}{n}", Port(f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}", network, addresses, mtu=mtu, silent=silent)

    def _declared(self, machine: Machine) -> Machine:
        self.machines.append(machine)
        self.cluster.declare(machine)
        return machine

    # ---- moving ----

    def move(self, machine: Machine, to: str, **options: Any) -> pb.Migration:
        """Move and expect all to be well."""
        report = self.cluster.migrate(machine, to, **options)
        assert report.outcome == "complete", f"{report.outcome}: {report.reason}\n{report}"
        assert machine.place() == to
        return report

    def follow(self, machine: Machine, route: Sequence[str], *, within_s: float = 2.0) -> list[pb.Migration]:
        """Move along a route; back within two seconds of the first arrival, or what a large table needs.

        A machine that is too slow for that just then goes a route that is a round again, three times at most.
        """
        for _ in range(3 if route[-1] == machine.place() else 1):
            reports, arrivals = [], []
            for host in route:
                reports.append(self.move(machine, host))
                arrivals.append(machine.order("status")["times"]["resumed"])
            if all(later - earlier < within_s for earlier, later in itertools.pairwise(arrivals)):
                return reports
        raise AssertionError(f"the way back took too long: {arrivals}")

    # ---- leaving ----

    def leave_nothing(self) -> None:
        """Remove what was made; then every host must look as one that never saw it, and no log may complain."""
        for machine in self.machines:
            self.cluster.settled(machine)
        wait_until("the ports may be taken away", self._withdrawn, 2 * PATIENT_S)
        for worker in self.cluster.workers:
            worker.dismiss()
        for worker in self.cluster.workers:
            worker.close()
        self.cluster.workers.clear()
        for machine in self.machines:
            if machine.vnic is None:
                unplug(self.cluster, machine)
        wait_until("hosts are as if the VMs never were", lambda: not self.remainder(), PATIENT_S, 0.1, self.remainder)
        assert not self.complaints(), "\n".join(self.complaints())

    def _withdrawn(self) -> bool:
        """False while the coordinator still undoes a move whose outcome it has told."""
        try:
            self.cluster.withdraw(*self.machines)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            return False
        return True

    def remainder(self) -> list[str]:
        """What hosts have that they had not before, or the other way."""
        return [
            f"{host}: {item}"
            for host, before in self.before.items()
            for item in oracle.difference(before, oracle.traces(self.cluster, host))
        ]

    def complaints(self) -> list[str]:
        """Warnings and errors that daemons wrote since the test began and that it did not expect."""
        return [
            line
            for name, text in self._written().items()
            for line in _complaining(name, text)
            if not any(re.search(pattern, line) for pattern in self.expected)
        ]

    def end(self) -> None:
        """The cluster may be closed after this, with the daemons' logs, before anybody asks for them."""
        self._last_words = self.logs()

    def logs(self) -> str:
        """What the daemons wrote since the test began, the end of it."""
        if self._last_words is not None:
            return self._last_words
        return "\n".join(f"==== {name}\n{text[-6000:]}" for name, text in self._written().items())

    def _written(self) -> dict[str, str]:
        """By daemon; nothing of a cluster that is gone."""
        there = [daemon for daemon in self._daemons() if daemon.log.exists()]
        return {d.name: d.log.read_bytes()[self.marks[d.name] :].decode(errors="replace") for d in there}

    def _daemons(self) -> list[Any]:
        return [self.cluster.coordinator, *self.cluster.agents.values()]


def _complaining(name: str, text: str) -> list[str]:
    return [f"{name}: {line}" for line in text.splitlines() if _complains(line)]


def _complains(line: str) -> bool:
    """A log line of level warning or above, or one that is no log line."""
    try:
        return bool(json.loads(line)["level"] in ("warning", "error", "critical"))
    except (ValueError, KeyError, TypeError):
        return bool(line.strip())


def since(moment: float) -> float:
    """Seconds of CLOCK_MONOTONIC since a moment."""
    return time.monotonic() - moment
