# SPDX-License-Identifier: GPL-2.0-only
"""The crash matrix: a VM that talks while it is moved, and what must hold whatever broke on the way.

One cluster, one VM, one peer and their connections last for many cases. A case moves the VM, breaks something at one
point (migrator/faults.py), waits until all has come to rest, checks both hosts, and moves the VM again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from migrator import faults
from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns, oracle
from migrator.lab.cluster import COORDINATOR_PORT, PEER_PORT
from migrator.lab.machines import Machine, Port, add_peer, add_vm
from migrator.lab.processes import Daemon, Worker, wait_until

from .matrix_traffic import Counted, Going, Numbers, Talk
from .standing import StandingCluster
from .traffic import Conversations
from .world import NETWORKS, POLICIES

MOVING = ("h1", "h2")  # hosts that the VM moves between
REST_S = 60.0  # all comes to rest within
DISK_BYTES = 8 << 20
MIGRATION = {
    "probe_s": 1.5,
    "connect_s": 1.5,
    "step_s": 2.0,
    "settle_s": 4.0,
    "staged_s": 6.0,
    "timeout_s": 15.0,
    "lease_s": 3.0,
    "redirect_idle_s": 0.3,
}
DEADLINES = {
    "describe_s": 4.0,
    "stage_s": 6.0,
    "start_s": 6.0,
    "pre_copy_s": 15.0,
    "switchover_s": 3.0,
    "settle_s": 8.0,
    "undo_s": 4.0,
    "return_s": 10.0,
}
NUMBERED = ("pinned files", "attachments")
COUNTED = ("ports", "tables", "dirty sets", "devices", "attachments", "policies", "pinned files", "links")


class MatrixCluster(StandingCluster):
    """Agents h1 and h2 reach the coordinator and each other through a proxy, and disks are small."""

    def __init__(self, **options: Any) -> None:
        super().__init__(networks=NETWORKS, migration_options=MIGRATION, **options)
        self.proxy: Worker

    def _daemon(self, name: str, namespace: str, arguments: Sequence[str]) -> Daemon:
        if name == "coordinator":
            self._start_proxy()
        return super()._daemon(name, namespace, arguments)

    def _start_proxy(self) -> None:
        control = self.underlay("control")
        links = {}
        for number, host in enumerate(MOVING):
            links[f"coordinator-{host}"] = {"listen": [control, 7500 + number], "to": [control, COORDINATOR_PORT]}
            links[f"peer-{host}"] = {"listen": [control, 7600 + number], "to": [self.underlay(host), PEER_PORT]}
        self.proxy = Worker("proxy", self.name("control"), "tests.netns.proxy", links, self.directory / "proxy.log")
        self.stack.callback(self.proxy.close)
        self.proxy.answer("start")

    def _agent_config(self, host: str) -> dict[str, Any]:
        config = super()._agent_config(host)
        disk = self.disk(host)
        agent, driver = {**config["agent"]}, {**config["driver"]}
        agent["state_dir"], driver["state_dir"] = str(disk / "state"), str(disk / "switch")
        if host in MOVING:
            number = MOVING.index(host)
            agent["coordinator"] = f"{self.underlay('control')}:{7500 + number}"
            agent["advertise"] = f"{self.underlay('control')}:{7600 + number}"
        return {**config, "agent": agent, "driver": driver}

    def _coordinator_config(self) -> dict[str, Any]:
        config = super()._coordinator_config()
        coordinator = {**config["coordinator"], "state_dir": str(self.disk("coordinator"))}
        return {**config, "coordinator": coordinator, "coordinator.deadlines": DEADLINES}

    def disk(self, name: str) -> Path:
        """A small file system of a daemon's own, made when it is first asked for."""
        place = self.directory / f"disk-{name}"
        if not place.exists():
            place.mkdir()
            netns.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)])
            self.stack.callback(netns.run, ["umount", "-l", str(place)])
        return place

    def link(self, name: str, mode: str, value: float = 0) -> None:
        """How a link of the proxy treats what passes from now on."""
        self.proxy.call("mode", link=name, mode=mode, value=value)

    def stopped(self) -> list[Daemon]:
        """Daemons that stand still."""
        return [d for d in (self.coordinator, *self.agents.values()) if d.running() and state_of(d.pid) == "T"]


def state_of(process: int) -> str:
    """The letter of ps."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


class Stage:
    """The cluster with all that lasts from case to case."""

    def __init__(self, cluster: MatrixCluster) -> None:
        self.cluster = cluster
        self.vm: Machine
        self.talk: Talk
        self.numbers: Counted
        self.broken_talk = False  # the host that the guest ran on has gone with all of its connections
        self.empty: dict[str, dict[str, list[str]]] = {}  # traces of a host that the VM has left
        self.full: dict[str, dict[str, int]] = {}  # counts of a host that has it
        self._changes: threading.Thread | None = None
        self._populate()
        for host in reversed(MOVING):
            self.move_on()
            assert self.vm.place() == host, f"a complete move to {host} left the guest at {self.vm.place()!r}"
            self.rest()
            self._measure(host)

    def _populate(self) -> None:
        """A VM at h1, its peer, and what goes on between them."""
        self.cluster.apply(policies=POLICIES)
        self.vm = add_vm(self.cluster, "v", "h1", [_port(1)], policy="server", behaviour={"memory_ms": 50})
        self.peer = add_peer(self.cluster, "p", "h3", _port(2), policy="open")
        self.cluster.declare(self.vm, self.peer)
        self.talk = self._converse()
        self.numbers = Numbers(self.vm, self.peer)

    def _converse(self) -> Conversations:
        return Conversations.begin(self.vm, self.peer, inbound=5, outbound=5, every_ms=100)

    def converse_anew(self) -> None:
        """After all of them have ended, with the host that the guest ran on."""
        for worker in [one for one in self.cluster.workers if "-tcp-" in one.name]:
            worker.close()
            self.cluster.workers.remove(worker)
        self.talk = self._converse()

    def change(self, *changes: Callable[[], object]) -> None:
        """Make changes of the configuration one after the other, beside: the coordinator may stand at one of them."""
        self._changes = threading.Thread(target=lambda: [_insist(change) for change in changes], daemon=True)
        self._changes.start()

    @staticmethod
    def other(host: str) -> str:
        return next(name for name in MOVING if name != host)

    def power_off(self, host: str) -> bool:
        """What a host's reboot ends beside its switch; whether the guest goes with it. Its agent is dead."""
        return self.vm.place() == host

    def power_on(self, host: str) -> None:
        """It is up again; its agent comes next."""

    def revive(self, host: str) -> None:
        """The move has ended: a guest that a reboot has ended is started again there."""

    def _measure(self, host: str) -> None:
        self.empty[self.other(host)] = _numberless(oracle.traces(self.cluster, self.other(host)))
        self.full[host] = _counts(oracle.traces(self.cluster, host))

    # ---- the invariants ----

    def rest(self, timeout_s: float = REST_S) -> str:
        """Wait until all has come to rest as it must; the host where the guest is."""
        wait_until("all is at rest", lambda: not self.wrong(), timeout_s, 0.1, self.wrong)
        return self.vm.place()

    def wrong(self) -> list[str]:
        """What is not as it must be once all has come to rest."""
        place = self.vm.place()
        if not place:
            return ["the guest stands"]
        if self._changes is not None and self._changes.is_alive():
            return ["the configuration is being changed"]
        try:
            return self._wrong_reports() + self._wrong_ports(place) + self._wrong_traces(place)
        except grpc.RpcError as error:
            return [f"a daemon does not answer: {error}"]

    def _wrong_reports(self) -> list[str]:
        reports = self.cluster.coordinator_stub().Migrations(pb.Empty(), timeout=5).migrations
        return [f"migration {r.id} is {r.phase}: {r.reason}" for r in reports if not r.done]

    def _wrong_ports(self, place: str) -> list[str]:
        wrong = []
        for host in self.cluster.host_names:
            mine = [p for p in self.cluster.ports(host) if p.instance.vm == self.vm.uuid]
            wanted = ["active"] if host == place else []
            if [p.instance.state for p in mine] != wanted or any(p.instance.migration for p in mine):
                wrong.append(f"{host}: {[(p.instance.state, p.instance.epoch, p.instance.migration) for p in mine]}")
            wrong += [f"{host}: gate {p.gate}" for p in mine if p.gate != "local" or p.held_to or p.held_from]
        return wrong

    def _wrong_traces(self, place: str) -> list[str]:
        wrong = []
        other = self.other(place)
        if other in self.empty:
            found = oracle.difference(self.empty[other], _numberless(oracle.traces(self.cluster, other)))
            wrong += [f"{other}: {item}" for item in found]
        if place in self.full:
            counts = _counts(oracle.traces(self.cluster, place))
            wrong += [f"{place}: {s}: {counts[s]} not {n}" for s, n in self.full[place].items() if counts[s] != n]
        for host in MOVING:
            wrong += [f"{host}: {path.name}" for path in self.cluster.disk(host).glob("state/migrations/*")]
        return wrong

    # ---- moving ----

    def move_on(self) -> pb.Migration:
        """A move of nothing but the usual to the other host; it may have to wait for an earlier one, or an agent."""
        self.vm.order("behave", memory_ms=50, swallow=False)
        to = self.other(self.vm.place())
        report = wait_until("the next migration may begin", lambda: self._moved(to), 30.0, 0.2)
        assert report.outcome == "complete", f"the next migration: {report.outcome}: {report.reason}"
        return report

    def _moved(self, to: str) -> pb.Migration | None:
        try:
            return self.cluster.migrate(self.vm, to)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.UNAVAILABLE):
                return None
            if "is not connected" in (error.details() or ""):  # an agent whose connection was cut comes back
                return None
            raise

    def logs(self) -> str:
        daemons = (self.cluster.coordinator, *self.cluster.agents.values())
        return "\n".join(f"==== {d.name}\n{d.tail(60)}" for d in daemons)


def _insist(change: Callable[[], object]) -> None:
    wait_until("the coordinator takes a change", partial(_taken, change), REST_S, 0.2)


def _taken(change: Callable[[], object]) -> bool:
    """Also by a coordinator that died before it said so: what is not there has been removed."""
    try:
        change()
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.NOT_FOUND)
    return True


def _port(number: int) -> Port:
    return Port(f"02:00:00:00:00:{number:02x}", "blue", (f"10.1.0.{number}", f"fd00:1::{number:x}"))


def _numberless(traces: dict[str, list[str]]) -> dict[str, list[str]]:
    """Pins and attachments are known by the number of a device, which is another one after a reboot: their count."""
    return {sort: [str(len(names))] if sort in NUMBERED else names for sort, names in traces.items()}


def _counts(traces: dict[str, list[str]]) -> dict[str, int]:
    return {sort: len(traces.get(sort, ())) for sort in COUNTED}


class Move(threading.Thread):
    """A move whose reports are read beside, whatever becomes of the coordinator."""

    def __init__(self, stage: Stage, to: str) -> None:
        super().__init__(daemon=True)
        self._reports = stage.cluster.migration(stage.vm, to, deadline_s=REST_S)
        self.last: pb.Migration | None = None
        self.start()

    def run(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for report in self._reports:
                self.last = report


def ended(stage: Stage, known: frozenset[str]) -> pb.Migration | None:
    """The newest migration that is not among those known, if it is done."""
    with contextlib.suppress(grpc.RpcError):
        reports = stage.cluster.coordinator_stub().Migrations(pb.Empty(), timeout=5).migrations
        fresh = [report for report in reports if report.id not in known]
        if fresh and all(report.done for report in fresh):
            return fresh[-1]
    return None


def known(stage: Stage) -> frozenset[str]:
    reports = stage.cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
    return frozenset(report.id for report in reports)


@contextlib.contextmanager
def asked(stage: Stage, point: str) -> Iterator[None]:
    """Somebody is to stop at a point; afterwards nobody is, and who stands goes on."""
    stage.cluster.fault_file.write_text(point)
    try:
        yield
    finally:
        stage.cluster.fault_file.unlink(missing_ok=True)
        go_on(stage)


def go_on(stage: Stage) -> None:
    for daemon in stage.cluster.stopped():
        os.kill(daemon.pid, signal.SIGCONT)


def stands(stage: Stage, move: Going, timeout_s: float = REST_S) -> Daemon | None:
    """Who stands at the point that was asked for; None when all has come to rest without."""
    wait_until("somebody stands at the point", lambda: stage.cluster.stopped() or over(stage, move), timeout_s, 0.002)
    return next(iter(stage.cluster.stopped()), None)


def over(stage: Stage, move: Going) -> bool:
    """The move has an outcome, and nothing is left to be done of it."""
    return not move.is_alive() and not stage.wrong()


def recorded(stage: Stage) -> list[str]:
    """Points that were come to since it was asked for, and forget them."""
    file = stage.cluster.fault_file.with_suffix(".points")
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return list(dict.fromkeys(text.split()))


def record(stage: Stage) -> None:
    stage.cluster.fault_file.write_text(faults.RECORD)


monotonic = time.monotonic
