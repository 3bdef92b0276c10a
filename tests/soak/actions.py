# SPDX-License-Identifier: GPL-2.0-only
"""Carries out the acts of a step, each in its time, and tells the model how moves ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.errors import WorkerFailed
from migrator.lab.machines import unplug
from migrator.lab.processes import wait_until
from tests.soak.lab import SoakLab
from tests.soak.plan import Act, Step
from tests.soak.reference import CHANGES, MOVED, Model, further
from tests.soak.scene import ASK_PORT, PEERS, VISITORS

ENDS_S = 180.0  # a migration, whatever is broken meanwhile
UNHEARD = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


class Wrong(AssertionError):
    """Something that the model does not allow."""


class Actions:
    def __init__(self, lab: SoakLab, model: Model) -> None:
        self.lab, self.model, self.cluster = lab, model, lab.cluster
        self.moving: dict[str, str] = {}  # VM -> id of its migration in this step
        self.told: list[str] = []  # what came of the acts, for people
        self._schedule = threading.Event()
        self._carry: dict[str, Callable[[Act], None]] = {
            "move": self.move,
            "abort": self.abort,
            "cancel": self.cancel,
            "order": self.order,
            "visitor": self.visitor,
            "replug": self.replug,
            "restore": self.restore,
            "suspend": self.suspend,
            "kill": self.fail,
            "restart": self.fail,
            "freeze": self.fail,
            "cut": self.cut,
            **dict.fromkeys(CHANGES, self.change),
        }

    def begin(self, step: Step) -> list[Future[None]]:
        """Set all acts of a step going; changes of the configuration are one after the other."""
        self.moving.clear()
        self.told = []
        self._began = time.monotonic()
        lanes: dict[int, list[Act]] = {}
        for act in step.acts:
            lanes.setdefault(0 if act.kind in CHANGES else id(act), []).append(act)
        self._pool = ThreadPoolExecutor(max(1, len(lanes)))
        return [self._pool.submit(self._lane, acts) for acts in lanes.values()]

    def finish(self, lanes: list[Future[None]]) -> None:
        """Wait for all; raises what the first one that failed did."""
        self._pool.shutdown()
        for lane in lanes:
            lane.result()

    def _lane(self, acts: list[Act]) -> None:
        for act in acts:
            self._pause(self._began + act.at_ms / 1e3 - time.monotonic())
            self._carry[act.kind](act)

    def _pause(self, seconds: float) -> None:
        """The plan's own times; nothing is waited for here."""
        self._schedule.wait(max(0.0, seconds))

    # ---- moves ----

    def move(self, act: Act) -> None:
        self.lab.order(act.target, "behave", **dict(act.hypervisor))
        place = self.model.started[act.target]
        for hop in act.hops:
            destination = further(place, hop)
            outcome = self._moved(act, place, destination, self._migrate(act.target, destination))
            if outcome not in MOVED:
                break
            place = destination

    def _moved(self, act: Act, source: str, destination: str, report: pb.Migration) -> str:
        vm, outcome = act.target, str(report.outcome)
        self.told.append(f"{vm} {source}→{destination} {outcome or 'not begun'}")
        self.model.moved(vm, source, destination, outcome, int(report.frames["may_be_lost"]))
        if outcome not in (may := self.model.outcomes(act, source, destination)):
            raise Wrong(f"the move of {vm} to {destination} ended {outcome!r}, not {sorted(may)}: {report}")
        return outcome

    def _migrate(self, vm: str, to: str, **options: Any) -> pb.Migration:
        """Order a move and follow it to its end, also over a restart of the coordinator. Outcome "": not begun."""
        known = set(self._known())
        try:
            for report in self.cluster.migration(self.lab.by_name[vm], to, deadline_s=ENDS_S, **options):
                self.moving[vm] = report.id
            if report.done:
                return report
        except grpc.RpcError as error:
            if self.moving.get(vm) in (None, *known) and error.code() not in UNHEARD:
                return pb.Migration(outcome="refused", reason=error.details())
        return self._ended(vm, known)

    def _ended(self, vm: str, known: set[str]) -> pb.Migration:
        """The stream of reports broke."""
        uuid = self.lab.by_name[vm].uuid

        def new() -> list[pb.Migration]:
            return [m for m in self._known().values() if m.vm == uuid and m.id not in known]

        wait_until(f"the move of {vm} ends", lambda: all(m.done for m in new()), ENDS_S, 0.1, new)
        ended: pb.Migration = next(iter(new()), pb.Migration())
        return ended

    def _known(self) -> dict[str, pb.Migration]:
        return dict(self._patiently(self.lab.migrations))

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """While the coordinator is away nobody answers."""

        def answer() -> list[Any]:
            with contextlib.suppress(grpc.RpcError):
                return [ask()]
            return []

        return wait_until("the coordinator answers", answer, 90.0, 0.1)[0]

    def abort(self, act: Act) -> None:
        wait_until("there is a move to abort", lambda: act.target in self.moving, 20.0)
        try:
            self.cluster.coordinator_stub().Abort(pb.MigrationRef(id=self.moving[act.target]), timeout=30)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            self.told.append("too late to abort")

    def cancel(self, act: Act) -> None:
        try:
            self.lab.order(act.target, "cancel")
        except WorkerFailed as error:
            if "does not move" not in str(error):
                raise
            self.told.append("too late to cancel")

    def order(self, act: Act) -> None:
        """An order that changes nothing: all but a dry run must be refused."""
        here, what = self.model.started[act.target], act.names[0]
        if what == "twice":
            return self._twice(act, here)
        if what == "dry run":
            report = self._migrate(act.target, further(here, 1), dry_run=True)
        elif what == "unknown VM":
            report = self._refused(vm="5f0c2b1e-0000-4000-8000-000000000000", to=here)
        else:
            report = self._refused(vm=self.lab.by_name[act.target].uuid, to=here if what == "same host" else "nowhere")
        self.told.append(f"{what}: {report.outcome}")
        if report.outcome != ("complete" if what == "dry run" else "refused"):
            raise Wrong(f"{what}: {report}")
        return None

    def _refused(self, **order: Any) -> pb.Migration:
        try:
            report: pb.Migration
            *_, report = self.cluster.coordinator_stub().Migrate(pb.MigrateRequest(**order), timeout=30)
        except grpc.RpcError as error:
            return pb.Migration(outcome="refused", reason=error.details())
        return report

    def _twice(self, act: Act, here: str) -> None:
        self.lab.order(act.target, "behave", memory_ms=500, swallow=False)
        reports = self.cluster.migration(self.lab.by_name[act.target], further(here, 1), deadline_s=ENDS_S)
        next(reports)
        second = self._refused(vm=self.lab.by_name[act.target].uuid, to=further(here, 2))
        if second.outcome != "refused":
            raise Wrong(f"a second move of {act.target} was not refused: {second}")
        *_, first = reports
        self._moved(act, here, further(here, 1), first)

    # ---- configuration and ports ----

    def change(self, act: Act) -> None:
        """The next version of the configuration; what was said while nobody heard it is said again."""
        if act.kind == "attach":
            self.lab.attach(act.target, act.names[0])
        said = self.lab.document(act)
        self._patiently(lambda: self.cluster.apply(**said))

    def visitor(self, act: Act) -> None:
        """A peer comes, talks, and goes."""
        spec = VISITORS[act.names[0]]
        peer = next(p for p in PEERS if self.lab.by_name[p].ports[0].network == act.names[0])
        machine = self.lab.add(spec, act.target)
        self.cluster.declare(machine)
        talker = self.lab.talk(spec.name)
        answer = talker.call("try", tries=[[1, "udp", self.lab.by_name[peer].address, ASK_PORT, 20.0]], timeout_s=30)
        self.lab.talkers.pop(spec.name).close()
        self.cluster.workers.remove(talker)
        self.cluster.withdraw(machine)
        wait_until(f"{spec.name} has no port any more", lambda: not self.lab.instances(spec.name), 20.0)
        unplug(self.cluster, machine)
        netns.remove(self.cluster.name(spec.name))
        self.lab.machines.remove(machine)
        if answer != {"1": "answered"}:
            raise Wrong(f"{spec.name} at {act.target} asked {peer}: {answer}")

    def replug(self, act: Act) -> None:
        """A VM's ports are taken away and declared again: its connections begin anew."""
        machine = self.lab.by_name[act.target]
        self.cluster.withdraw(machine)
        wait_until(f"{machine.name} has no port any more", lambda: not self.lab.instances(act.target), 30.0)
        machine.host = self.model.started[act.target]
        self.cluster.declare(machine)

    def restore(self, act: Act) -> None:
        """Its state to a file and back from there; a policy that has changed meanwhile stays as it is."""
        host, file = self.model.started[act.target], str(self.cluster.directory / f"{act.target}.mgs")
        self._cli(host, "checkpoint", self.lab.by_name[act.target].uuid, "-o", file)
        if act.rules:
            self.cluster.apply(**self.lab.document(act))
        self._cli(host, "restore", file)
        Path(file).unlink()

    def _cli(self, host: str, *words: str) -> None:
        done = self.cluster.cli(*words, host=host)
        if done.returncode:
            raise Wrong(f"migrator {' '.join(words)} at {host}: {done.stdout}{done.stderr}")

    def suspend(self, act: Act) -> None:
        self.lab.order(act.target, "suspend")
        self._pause(act.for_ms / 1e3)
        self.lab.order(act.target, "resume")

    # ---- faults ----

    def fail(self, act: Act) -> None:
        name = self.model.daemon(act)
        daemon = self.cluster.daemon(name)
        self.told.append(f"{act.kind} {name}")
        if act.kind == "freeze":
            os.kill(daemon.pid, signal.SIGSTOP)
            self._pause(act.for_ms / 1e3)
            os.kill(daemon.pid, signal.SIGCONT)
            return
        if act.kind == "kill":
            daemon.kill()
        elif (status := daemon.stop()) != 0:
            raise Wrong(f"{name} ended with status {status} when it was told to end")
        self._pause(act.for_ms / 1e3)
        daemon.start()

    def cut(self, act: Act) -> None:
        host = self.model.daemon(act)
        self.told.append(f"cut {host}")
        self.cluster.cut(host)
        self._pause(act.for_ms / 1e3)
        self.cluster.cut(host, off=False)
