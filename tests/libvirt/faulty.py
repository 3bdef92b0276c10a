# SPDX-License-Identifier: GPL-2.0-only
"""The crash matrix's cluster and stage with a QEMU guest that libvirt moves (see tests/netns/matrix.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import libvirt

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.machines import add_peer
from migrator.lab.processes import wait_until
from tests.netns.matrix import MatrixCluster, Stage
from tests.netns.matrix_faults import FAULTS, Fault, Roles, go_on
from tests.netns.matrix_traffic import Going

from .bench import GUEST, PEER
from .counted import CountedTraffic
from .hooked import LIVE, MOVED_S, OPEN, OUT, UNHURRIED, Moving, install, metadata, reports
from .lab import GuestMachine, LibvirtCluster, NotWhole, add_guest, migrate

UNHURRIED_DEADLINES = {"switchover_s": 10.0}
"""An emulated guest on a busy machine stands for seconds."""
STANDS_MIB_S = 1  # the guest stands for as long as what is left of its memory takes
REVIVED_S = 60.0
MOVES_MAX = 3
"""Tries of a move that a slow machine spoils."""


class FaultyCluster(MatrixCluster, LibvirtCluster):
    """Libvirt hosts h1 and h2 with small disks, whose agents speak through the proxy."""

    def __init__(self) -> None:
        super().__init__(guests={"driver": "libvirt"})

    def _coordinator_config(self) -> dict[str, Any]:
        config = super()._coordinator_config()
        return {**config, "coordinator.deadlines": {**config["coordinator.deadlines"], **UNHURRIED_DEADLINES}}

    def _mount_bpffs(self, host: str) -> None:
        """A libvirt host has the mounts that are there when it is made."""
        self.disk(host)
        super()._mount_bpffs(host)


class FaultyTraffic(CountedTraffic):
    """`CountedTraffic` as the matrix wants it told."""

    def assert_whole(self) -> None:
        self.check()

    def begin(self) -> None:
        self.lost()
        self.silence()

    def end(self) -> dict[str, float]:
        found = self.lost().values()
        told = {"lost": sum(lost for lost, _ in found), "doubled": sum(doubled for _, doubled in found)}
        return {**told, "silence": self.silence()["ms"]}


class GuestStage(Stage):
    """One guest under traffic, for many cases."""

    cluster: FaultyCluster
    vm: GuestMachine

    def _populate(self) -> None:
        install(self.cluster)
        self.cluster.apply(policies=[OUT, OPEN])
        self._died_at = ""
        self.spoilt = False
        described = metadata(GUEST, max_passes="1")  # the agent stops it in QEMU's first pass
        self.vm = add_guest(self.cluster, "vm1", "h1", [GUEST], metadata=described)
        self.vm.booted()
        self.peer = add_peer(self.cluster, "p1", "h3", PEER, policy="open")
        self.cluster.declare(self.peer)
        self._talk_anew()

    def _talk_anew(self) -> None:
        for worker in self.cluster.workers:
            worker.close()
        self.cluster.workers.clear()
        self.talk = self.numbers = FaultyTraffic(self.vm, self.peer, connections=20)

    def move_on(self) -> pb.Migration:
        """By libvirt alone, when it lets the guest go. One that the machine was too slow for begins anew, and is moved
        again; it is at the other host and whole in the end, whatever became of it."""
        to = self.other(self.vm.place())
        for left in reversed(range(MOVES_MAX)):
            report = self._move_to(to)
            if not self.spoilt:
                break
            print(f"the machine is too slow for its guest: spoilt in a move to {to}, {left} more tries")
            self._begin_anew(self.other(to) if left else to)
        return report

    def _move_to(self, to: str) -> pb.Migration:
        said: list[str] = []
        wait_until(
            "the next migration may begin", lambda: self._libvirt_moves(to, said), MOVED_S, 0.5, lambda: said[-1]
        )
        report = wait_until("it has ended", self._last_ended, MOVED_S, 0.05)
        assert report.outcome == "complete", f"the next migration: {report.outcome}: {report.reason}"
        return report

    def _begin_anew(self, host: str) -> None:
        self.vm.destroy()
        wait_until("the guest is gone", self._gone, REVIVED_S, 0.1)
        self._start(host)
        self.spoilt = False

    def _libvirt_moves(self, to: str, said: list[str]) -> bool:
        try:
            migrate(self.vm, to, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: UNHURRIED})
        except libvirt.libvirtError as error:
            said.append(str(error))
            return False
        except NotWhole:
            self.spoilt = True
        return True

    def _last_ended(self) -> pb.Migration | None:
        last = reports(self.cluster, self.vm)[-1]
        return last if last.done else None

    # ---- a host that goes with all that runs on it ----

    def power_off(self, host: str) -> bool:
        """Not known yet: a guest that stands belongs to both, and libvirt decides."""
        machine = self.cluster.hosts[host]
        self._died_at = self.vm.place() or self._died_at
        machine.libvirtd.kill()
        machine.disconnect()
        for process in netns.run(["ip", "netns", "pids", self.cluster.name(host)]).split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                command = Path("/proc", process, "cmdline").read_bytes()
                if b"qemu" in command:
                    os.kill(int(process), signal.SIGKILL)
        for path in machine.run.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return False

    def power_on(self, host: str) -> None:
        self.cluster.hosts[host].start_libvirtd()

    def revive(self, host: str) -> None:
        """As its operator does when neither host knows it any more; what it had under way has ended with it."""
        if not wait_until("the guest runs, or is gone", lambda: self.vm.place() or self._gone(), REVIVED_S, 0.1):
            return
        if self.vm.place():
            return
        self._start(self._died_at or host)

    def _start(self, host: str) -> None:
        said: list[str] = []
        wait_until("it may be started again", lambda: self._created(host, said), REVIVED_S, 0.5, lambda: said[-1])
        self.vm.booted()
        self._talk_anew()

    def _gone(self) -> bool:
        return all(machine.domain(self.vm.uuid) is None for machine in self.cluster.hosts.values())

    def _created(self, host: str, said: list[str]) -> bool:
        try:
            self.cluster.hosts[host].create(self.vm.xml)
        except libvirt.libvirtError as error:
            said.append(str(error))
            return False
        return True


class GuestMove(Moving):
    """A client of libvirt's that waits for a move."""

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        super().join(MOVED_S if timeout is None else max(timeout, MOVED_S))


class CalledOff(GuestMove):
    """`virsh domjobabort` when the guest stands and the destination has committed."""

    def __init__(self, stage: GuestStage, here: str, to: str) -> None:
        self._domain = stage.cluster.hosts[here].domain(stage.vm.uuid)
        count = len(reports(stage.cluster, stage.vm))
        super().__init__(stage.vm, to, LIVE, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: STANDS_MIB_S})
        threading.Thread(target=self._abort, args=(stage, count), daemon=True).start()

    def _abort(self, stage: GuestStage, count: int) -> None:
        wait_until("it has committed, or ended", lambda: not self.is_alive() or _committed(stage, count), 60.0)
        with contextlib.suppress(libvirt.libvirtError):
            if self._domain is not None:
                self._domain.abortJob()


def _committed(stage: GuestStage, count: int) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return [report.phase for report in reports(stage.cluster, stage.vm)[count:]] == ["committed"]
    return False


@dataclass(frozen=True)
class GuestScenario:
    name: str

    def begin(self, stage: Stage, point: str) -> tuple[Roles, Going]:
        """Whoever comes to `point` will stand."""
        assert isinstance(stage, GuestStage)
        here = stage.vm.place()
        roles = Roles(stage, here, stage.other(here))
        stage.cluster.fault_file.write_text(point)
        if self.name == "called off":
            return roles, CalledOff(stage, here, roles.there)
        return roles, GuestMove(stage.vm, roles.there, LIVE, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: UNHURRIED})


SCENARIOS = [GuestScenario("plain"), GuestScenario("called off")]


def libvirtd_killed(letter: str) -> Fault:
    """libvirtd dies as by a crash and is started again; its guests go on."""

    def strike(roles: Roles, _: Going) -> None:
        assert isinstance(roles.stage, GuestStage)
        host = roles.stage.cluster.hosts[roles.here if letter == "A" else roles.there]
        host.libvirtd.kill()
        go_on(roles.stage)
        host.start_libvirtd()

    return Fault(f"libvirtd-{letter}", strike, "libvirtd", letter)


GUEST_FAULTS = [*FAULTS, *(libvirtd_killed(letter) for letter in "AB")]
