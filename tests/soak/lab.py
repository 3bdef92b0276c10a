# SPDX-License-Identifier: GPL-2.0-only
"""The lab of the soak: a cluster of three hosts with the machines of `scene`, and what is asked of both.

Daemons and vNICs may be asked by several threads; talkers by the one that runs the steps only.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator.lab.cluster import port_messages
from migrator.lab.machines import Machine, Port, add_peer, add_vm
from migrator.lab.processes import Worker, wait_until
from migrator.snapshot import decode_section
from tests.netns.standing import StandingCluster
from tests.netns.world import World
from tests.soak import scene
from tests.soak.plan import Act, Rule
from tests.soak.reference import NONE, OPEN, OWN, Config

NETWORKS: list[dict[str, Any]] = [
    {"name": "blue", "kind": "uplink", "vlan": 100, "uplink": "up0"},
    {"name": "over", "kind": "overlay", "vni": 5000, "mtu": 1450},
]
MTU = {"blue": 1500, "over": 1450}
MIGRATION = {  # patient: what a starved machine does late must not look like a fault
    "redirect_idle_s": 1.0,
    "lease_s": 8.0,
    "last_changes_s": 5.0,
    "probe_s": 10.0,
    "connect_s": 10.0,
    "step_s": 20.0,
}
EVERYTHING = [{"direction": way, "priority": 1, "protocol": "any", "action": "allow"} for way in ("to", "from")]


class SoakLab(World):
    """Machines that talk, on a cluster of three hosts."""

    def __init__(self, cluster: StandingCluster) -> None:
        super().__init__(cluster)
        self.by_name: dict[str, Machine] = {}
        self.by_uuid: dict[str, str] = {}
        self.talkers: dict[str, Worker] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def build(self, config: Config) -> None:
        """Everybody with ports and talkers, under the policies of a configuration."""
        self.cluster.apply(**self.documents(config))
        for spec in scene.MACHINES.values():
            self.add(spec, spec.host)
            self.talk(spec.name)
        self.cluster.declare(*self.machines)

    def add(self, spec: scene.Machine, host: str) -> Machine:
        """A machine at a host; its port is not declared yet."""
        ports = [Port(nic.mac, nic.network, (nic.ip4, nic.ip6), mtu=MTU[nic.network]) for nic in spec.nics]
        if spec.moves:
            machine = add_vm(self.cluster, spec.name, host, ports, policy=_policy(spec.name, OWN))
        else:
            machine = add_peer(self.cluster, spec.name, host, ports[0], policy=OPEN)
        self.by_name[spec.name] = machine
        self.by_uuid[machine.uuid] = spec.name
        self.machines.append(machine)
        return machine

    def talk(self, name: str) -> Worker:
        """Start the talker of a machine."""
        log = self.cluster.directory / f"{name}-talker.log"
        worker = Worker(f"{name}-talker", self.cluster.name(name), "tests.soak.talker", {}, log)
        self.cluster.adopt(worker)
        worker.call("serve", tcp=scene.TCP_PORTS, echo=[scene.ASK_PORT], numbers=scene.UDP_PORTS)
        self.talkers[name] = worker
        return worker

    # ---- configuration ----

    def documents(self, config: Config) -> dict[str, list[dict[str, Any]]]:
        """All policies and address sets of a configuration, as the coordinator takes them."""
        policies = [_document(vm, rules) for vm, rules in config.rules.items()]
        sets = [{"name": name, "prefixes": list(prefixes)} for name, prefixes in config.sets.items()]
        return {"address_sets": sets, "policies": [*policies, {"name": OPEN, "rules": EVERYTHING}]}

    def document(self, act: Act) -> dict[str, list[dict[str, Any]]]:
        """The change that an act makes."""
        if act.rules:
            return {"policies": [_document(act.target, act.rules)]}
        if act.kind == "set":
            return {"address_sets": [{"name": act.target, "prefixes": list(act.names)}]}
        return {"ports": port_messages(self.by_name[act.target])}

    def attach(self, vm: str, which: str) -> None:
        self.by_name[vm].policy = _policy(vm, which)

    # ---- asking ----

    def order(self, vm: str, op: str, **arguments: Any) -> dict[str, Any]:
        """Order a vNIC."""
        with self._locks[vm]:
            return self.by_name[vm].order(op, **arguments)

    def runs_at(self, vm: str) -> str:
        status = self.order(vm, "status")
        return str(status["place"]) if status["running"] else ""

    def instances(self, name: str) -> dict[str, list[pb.PortStatus]]:
        """Ports of a machine by host."""
        uuid = self.by_name[name].uuid
        found = {h: [p for p in self.cluster.ports(h) if p.instance.vm == uuid] for h in scene.HOSTS}
        return {host: ports for host, ports in found.items() if ports}

    def rules(self, vm: str, host: str) -> dict[tuple[str, int], dict[str, Any]]:
        """Rules of a VM as a host applies them, with their hits, by MAC and id."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        request = pb.VmRequest(vm=self.by_name[vm].uuid, kind="acl")
        for chunk in self.cluster.agent_stub(host).Dump(request, timeout=20):
            section = decode_section(chunk.data)
            for record in section.table.records or () if section.table else ():
                found.setdefault((section.port, record["id"]), {"hits": 0}).update(record)
        return found

    def migrations(self) -> Mapping[str, pb.Migration]:
        known = self.cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
        return {migration.id: migration for migration in known}

    def wait_attached(self, timeout_s: float = 90.0) -> None:
        """All agents are known to the coordinator, and it to them."""

        def attached() -> bool:
            try:
                hosts = self.cluster.coordinator_stub().Hosts(pb.Empty(), timeout=5, wait_for_ready=True).hosts
                answers = [
                    self.cluster.agent_stub(h).Status(pb.Empty(), timeout=5, wait_for_ready=True).coordinator
                    for h in scene.HOSTS
                ]
            except grpc.RpcError:
                return False
            return all(host.connected for host in hosts) and all(answers)

        wait_until("agents and coordinator know each other", attached, timeout_s, 0.1)

    def mark_logs(self) -> None:
        """What daemons wrote until now is no complaint."""
        self.marks = {daemon.name: daemon.log.stat().st_size for daemon in self._daemons()}

    def tails(self, lines: int = 20, columns: int = 400) -> Iterable[str]:
        """The end of each daemon's log, long lines cut."""
        for daemon in self._daemons():
            yield f"==== {daemon.name}, {daemon.log}"
            yield from (line[:columns] for line in daemon.tail(lines).splitlines())


def _policy(vm: str, which: str) -> str:
    return {OPEN: OPEN, OWN: f"of-{vm}", NONE: ""}[which]


def _document(vm: str, rules: Iterable[Rule]) -> dict[str, Any]:
    return {"name": _policy(vm, OWN), "rules": [_rule(rule) for rule in rules]}


def _rule(rule: Rule) -> dict[str, Any]:
    first, last = rule.ports
    return {
        "direction": rule.direction,
        "priority": rule.priority,
        "protocol": rule.protocol,
        "remote": list(rule.remote),
        "ports": [f"{first}-{last}" if last > first else str(first)],
        "action": rule.action,
    }
