# SPDX-License-Identifier: GPL-2.0-only
"""Real daemons on a lab's hosts: an agent each, one coordinator, and what a test asks of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.lab import netns
from migrator.lab.errors import LabError
from migrator.lab.machines import Machine
from migrator.lab.processes import PATIENT_S, Daemon, wait_until
from migrator.lab.topology import UPLINK, Lab
from migrator.security import authority
from migrator.security.identity import Identity, Role
from migrator.security.settings import folder

COORDINATOR_PORT = 7400
PEER_PORT = 7401
ATTACHED_S = 120.0
"""For all daemons to start, each of which loads its programs: the machine may have much else to do."""
_CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
"""Else a daemon that took half a minute to begin is not asked again for as long."""


class Cluster(Lab):
    """A lab whose hosts run agents. `networks` are declared at start.

    The coordinator listens on the fabric for agents and on a unix socket for whoever is outside the lab's namespaces.
    """

    def __init__(
        self,
        hosts: Sequence[str] = ("h1", "h2", "h3"),
        networks: Sequence[Mapping[str, Any]] = (),
        driver_options: Mapping[str, Any] | None = None,
        migration_options: Mapping[str, Any] | None = None,
        *,
        tls: bool = True,
    ) -> None:
        super().__init__(hosts)
        self.networks = networks
        self.driver_options = dict(driver_options or {})
        self.migration_options = dict(migration_options or {})
        self.tls = tls
        self.agents: dict[str, Daemon] = {}
        self.coordinator: Daemon
        self.channels: dict[str, grpc.Channel] = {}

    def _build(self) -> None:
        super()._build()
        if self.tls:
            self._certificates()
        self.coordinator = self._daemon(
            "coordinator",
            "control",
            [
                "coordinator",
                "--config",
                str(self._write("control", "coordinator.toml", self._coordinator_config())),
            ],
        )
        for host in self.host_names:
            self._mount_bpffs(host)
            self.agents[host] = self._daemon(
                f"agent-{host}",
                host,
                [
                    "agent",
                    "--config",
                    str(self._write(host, "agent.toml", self._agent_config(host))),
                ],
            )
        self.coordinator.start()
        for agent in self.agents.values():
            agent.start()
        self._await_agents()
        self.apply(networks=self.networks)
        wait_until("all hosts have the networks", self._networks_there, ATTACHED_S)

    def _await_agents(self) -> None:
        wait_until("all agents are attached", self._attached, ATTACHED_S, 0.1, self._tails)

    def _tails(self) -> str:
        return "\n".join(f"{daemon.name}: {daemon.tail()}" for daemon in (self.coordinator, *self.agents.values()))

    def _networks_there(self) -> bool:
        names = {network["name"] for network in self.networks}
        with contextlib.suppress(grpc.RpcError):
            there = [set(self.agent_stub(h).Status(pb.Empty(), timeout=5).networks) for h in self.host_names]
            return all(names <= found for found in there)
        return False

    # ---- files and processes ----

    def _coordinator_config(self) -> dict[str, Any]:
        return {
            "coordinator": {
                "listen": [f"{self.underlay('control')}:{COORDINATOR_PORT}", f"unix:{self._coordinator_socket()}"],
                "state_dir": str(self.directory / "control"),
            },
            "tls": self._tls("control"),
        }

    def _agent_config(self, host: str) -> dict[str, Any]:
        base = self.directory / host
        return {
            "agent": {
                "host": host,
                "coordinator": f"{self.underlay('control')}:{COORDINATOR_PORT}",
                "listen": f"{self.underlay(host)}:{PEER_PORT}",
                "advertise": f"{self.underlay(host)}:{PEER_PORT}",
                "socket": str(base / "agent.sock"),
                "state_dir": str(base / "state"),
            },
            "driver": {
                "name": "ebpf",
                "instance": host,
                "bpffs": str(base / "bpf"),
                "state_dir": str(base / "switch"),
                "underlay": self.underlay(host),
                "uplinks": [UPLINK],
                "slots": 64,
                "sweep_interval_s": 0.5,
                **self.driver_options,
            },
            "guests": {"driver": "process", "directory": str(base / "guests")},
            "migration": self.migration_options,
            "tls": self._tls(host),
        }

    def _certificates(self) -> None:
        """From an authority of this cluster's own."""
        self.authority = authority.create(self.directory / "pki")
        self.authority.issue(Identity(Role.COORDINATOR, "control"), self.certificates("control"))
        self.authority.issue(Identity(Role.OPERATOR, "lab"), self.certificates("operator"))
        for host in self.host_names:
            self.authority.issue(Identity(Role.AGENT, host), self.certificates(host))

    def certificates(self, place: str) -> Path:
        """Folder of the certificate of a host's agent, of the coordinator ("control") or of the "operator"."""
        return self.directory / "tls" / place

    def _tls(self, place: str) -> dict[str, Any]:
        if not self.tls:
            return {"insecure": True}
        given = folder(self.certificates(place)).model_dump(include={"ca", "certificate", "key"})
        return {name: str(path) for name, path in given.items()}

    def _coordinator_socket(self) -> Path:
        return self.directory / "control" / "c.sock"

    def _write(self, place: str, name: str, content: Mapping[str, Mapping[str, Any]]) -> Path:
        file = self.directory / place / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(_toml(content)) + "\n")
        return file

    def _daemon(self, name: str, namespace: str, arguments: Sequence[str]) -> Daemon:
        daemon = Daemon(
            name,
            self.name(namespace),
            [sys.executable, "-m", "migrator.cli.main", *arguments],
            self.directory / f"{name}.log",
        )
        self.stack.callback(daemon.stop)
        return daemon

    def _mount_bpffs(self, host: str) -> None:
        """Each host has its own: pins of one are not seen by another."""
        place = self.directory / host / "bpf"
        place.mkdir(parents=True)
        (self.directory / host / "guests").mkdir()
        netns.run(["mount", "-t", "bpf", "bpf", str(place)])
        self.stack.callback(netns.run, ["umount", "-l", str(place)])

    def _attached(self) -> bool:
        if not self.coordinator.running():
            raise LabError(f"the coordinator ended: {self.coordinator.tail()}")
        for agent in self.agents.values():
            if not agent.running():
                raise LabError(f"{agent.name} ended: {agent.tail()}")
        with contextlib.suppress(grpc.RpcError):
            hosts = self.coordinator_stub().Hosts(pb.Empty(), timeout=5).hosts
            return bool({host.name for host in hosts if host.connected} >= set(self.agents))
        return False

    # ---- speaking to them ----

    def coordinator_stub(self) -> rpc.CoordinatorStub:
        return rpc.CoordinatorStub(self._channel(self._coordinator_socket()))  # type: ignore[no-untyped-call]

    def agent_stub(self, host: str) -> rpc.AgentStub:
        return rpc.AgentStub(self._channel(self.directory / host / "agent.sock"))  # type: ignore[no-untyped-call]

    def _channel(self, socket: Path) -> grpc.Channel:
        channel = self.channels.get(str(socket))
        if channel is None:
            channel = grpc.insecure_channel(f"unix:{socket}", _CHANNEL_OPTIONS)
            self.channels[str(socket)] = channel
            self.stack.callback(channel.close)
        return channel

    def apply(self, **objects: Any) -> pb.ApplyReply:
        """Declare networks, policies, ports …: lists of mappings with the fields of the messages."""
        config = json_format.ParseDict(objects, pb.Config())
        reply: pb.ApplyReply = self.coordinator_stub().Apply(pb.ApplyRequest(config=config), timeout=30)
        return reply

    def declare(self, *machines: Machine, timeout_s: float = PATIENT_S) -> None:
        """Give machines their ports and wait until these are open."""
        self.apply(ports=[message for machine in machines for message in port_messages(machine)])
        for machine in machines:
            wait_until(f"the ports of {machine.name} are open", partial(self.is_open, machine, machine.host), timeout_s)

    def withdraw(self, *machines: Machine) -> None:
        """Take machines' ports out of the cluster."""
        for machine in machines:
            for port in machine.ports:
                removal = pb.Removal(sort="port", name=f"{machine.uuid}/{port.mac}")
                self.coordinator_stub().Remove(removal, timeout=10)

    def is_open(self, machine: Machine, host: str) -> bool:
        """All ports of a machine are active on a host."""
        here = [p for p in self.ports(host) if p.instance.vm == machine.uuid and p.instance.state == "active"]
        return len(here) == len(machine.ports)

    def ports(self, host: str) -> Sequence[pb.PortStatus]:
        ports: Sequence[pb.PortStatus] = self.agent_stub(host).Ports(pb.Empty(), timeout=10).ports
        return ports

    def migrate(self, machine: Machine, to: str, **options: Any) -> pb.Migration:
        """Move a VM and wait for the end: its last report."""
        *_, last = self.migration(machine, to, **options)
        return last

    def migration(
        self, machine: Machine, to: str, *, deadline_s: float = 30.0, **options: Any
    ) -> Iterator[pb.Migration]:
        """Move a VM; its reports as they come."""
        request = pb.MigrateRequest(vm=machine.uuid, to=to, **options)
        yield from self.coordinator_stub().Migrate(request, timeout=deadline_s)

    def remains(self, host: str) -> dict[str, list[str]]:
        """All that a host's switch holds of VMs."""
        reply = self.agent_stub(host).Remains(pb.Empty(), timeout=10)
        return {sort: list(names.names) for sort, names in reply.remains.items() if names.names}

    def cli(self, *arguments: str, host: str = "", timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """The operator's command, as a person at the control namespace (or on a host) runs it."""
        command, environment = self._cli(arguments, host)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)

    def cli_process(self, *arguments: str, output: Path, host: str = "") -> subprocess.Popen[bytes]:
        """The same for a command that goes on: it writes to `output` and `output`.err, and is the caller's to end."""
        command, environment = self._cli(arguments, host)
        with output.open("wb") as out, output.with_name(output.name + ".err").open("wb") as err:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)

    def _cli(self, arguments: Sequence[str], host: str) -> tuple[list[str], dict[str, str]]:
        environment = {
            **os.environ,
            "MIGRATOR_COORDINATOR": f"{self.underlay('control')}:{COORDINATOR_PORT}",
            **({"MIGRATOR_TLS": str(self.certificates("operator"))} if self.tls else {}),
            "MIGRATOR_AGENT": str(self.directory / (host or self.host_names[0]) / "agent.sock"),
        }
        command = [sys.executable, "-m", "migrator.cli.main", *arguments]
        return netns.inside(self.name(host or "control"), command), environment

    def restart(self, daemon: Daemon) -> None:
        """Start a daemon that was killed, and wait until all agents are attached again."""
        daemon.start()
        self._await_agents()

    def settled(self, machine: Machine, timeout_s: float = PATIENT_S) -> None:
        """Wait until no agent has anything of a migration of this VM in hand."""

        def quiet() -> bool:
            return not any(
                p.instance.migration for h in self.host_names for p in self.ports(h) if p.instance.vm == machine.uuid
            )

        wait_until(f"the migration of {machine.name} is settled", quiet, timeout_s)


def port_messages(machine: Machine) -> list[dict[str, Any]]:
    """A machine's ports as messages."""
    return [
        {
            "vm": machine.uuid,
            "name": machine.name,
            "mac": port.mac,
            "network": port.network,
            "host": machine.host,
            "device": port.device,
            "devices": dict(port.devices),
            "addresses": [*port.addresses, *port.silent],
            "policy": machine.policy,
            "mtu": port.mtu,
            "timeouts_ms": dict(machine.timeouts_ms),
            "connections_max": machine.connections_max,
        }
        for port in machine.ports
    ]


def _toml(content: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for section, values in content.items():
        yield f"[{section}]"
        for key, value in values.items():
            yield f"{key} = {_toml_value(value)}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml_value(item)}' for key, item in value.items()) + "}"
    return str(value) if isinstance(value, int | float) else f'"{value}"'


def now() -> float:
    """CLOCK_MONOTONIC, which every process of a lab shares."""
    return time.monotonic()
