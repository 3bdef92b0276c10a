# SPDX-License-Identifier: GPL-2.0-only
"""What the crash matrix breaks while a daemon stands at a point: each fault strikes, and is healed afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from migrator.lab import netns
from migrator.lab.processes import Daemon, wait_until
from migrator.lab.topology import UPLINK

from .matrix import Going, Stage, go_on, monotonic, over

FROZEN_S = 6.0  # longer than each deadline of an agent's, and than the leases
STALLED_S = 5.0  # longer than gRPC's keepalive
BAD_S = 1.5
SLOW_MS, SLOW_BYTES = 150, 20_000
ROOM_BYTES = 1 << 20


@dataclass(frozen=True)
class Roles:
    """Who is who in a move: hosts, and by letter the daemons (A: source, B: destination, C: coordinator)."""

    stage: Stage
    here: str
    there: str

    def daemon(self, letter: str) -> Daemon:
        agents = self.stage.cluster.agents
        return {"A": agents[self.here], "B": agents[self.there], "C": self.stage.cluster.coordinator}[letter]

    def disk(self, letter: str) -> Path:
        return self.stage.cluster.disk({"A": self.here, "B": self.there, "C": "coordinator"}[letter])

    def link(self, name: str) -> str:
        """Name at the proxy: the stream of the two agents goes to the peer service of the destination."""
        names = {"AB": f"peer-{self.there}", "CA": f"coordinator-{self.here}", "CB": f"coordinator-{self.there}"}
        return names[name]


@dataclass(frozen=True)
class Fault:
    """`strike` is called while somebody stands at the point; it lets them go on, and returns when all is healed."""

    name: str
    strike: Callable[[Roles, Going], None]
    kind: str
    letters: str

    def __str__(self) -> str:
        return self.name


def killed(letters: str) -> Fault:
    """Dead as by a crash, and started again."""

    def strike(roles: Roles, _: Going) -> None:
        daemons = [roles.daemon(letter) for letter in letters]
        for daemon in daemons:
            daemon.kill()
        go_on(roles.stage)
        start(roles.stage, daemons)

    return Fault(f"kill-{letters}", strike, "kill" if len(letters) == 1 else "kill two", letters)


def start(stage: Stage, daemons: list[Daemon]) -> None:
    first, *others = daemons
    for daemon in others:
        daemon.start()
    stage.cluster.restart(first)


def frozen(letter: str) -> Fault:
    """Stands still beyond every deadline and goes on in a world that went on without it."""

    def strike(roles: Roles, _: Going) -> None:
        daemon = roles.daemon(letter)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            for standing in roles.stage.cluster.stopped():
                if standing is not daemon:
                    os.kill(standing.pid, signal.SIGCONT)
            pass_time(FROZEN_S)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)

    return Fault(f"freeze-{letter}", strike, "freeze", letter)


def pass_time(seconds: float) -> None:
    """The world goes on: here the time itself is what the test needs."""
    until = monotonic() + seconds
    wait_until("time has passed", lambda: monotonic() > until, seconds + 10.0, 0.05)


def bad(link: str, mode: str, value: float = 0) -> Fault:
    """A connection between two daemons is bad for a while, or for good until they notice."""

    def strike(roles: Roles, move: Going) -> None:
        cluster = roles.stage.cluster
        cluster.link(roles.link(link), mode, value)
        try:
            go_on(roles.stage)
            if mode != "half":
                while_it_lasts(roles.stage, move, STALLED_S if mode == "stall" else BAD_S)
        finally:
            cluster.link(roles.link(link), "pass")

    return Fault(f"{mode}-{link}", strike, mode, link)


def while_it_lasts(stage: Stage, move: Going, seconds: float) -> None:
    """So long at most; no longer than anything is left to be done of the move."""
    until = monotonic() + seconds
    wait_until("enough of it", lambda: monotonic() > until or over(stage, move), seconds + 30.0, 0.05)


def full(letter: str) -> Fault:
    """Nothing more fits on a daemon's disk for a while."""

    def strike(roles: Roles, move: Going) -> None:
        with filled(roles.disk(letter) / "fill"):
            go_on(roles.stage)
            while_it_lasts(roles.stage, move, BAD_S)

    return Fault(f"full-{letter}", strike, "disk full", letter)


@contextlib.contextmanager
def filled(path: Path) -> Iterator[None]:
    """All room of a file system is taken."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while os.write(descriptor, bytes(size)):
                    pass
        yield
    finally:
        os.close(descriptor)
        path.unlink()


def starved(letter: str) -> Fault:
    """A daemon gets no more memory for a while; it may die of it, and is started again then."""

    def strike(roles: Roles, move: Going) -> None:
        daemon = roles.daemon(letter)
        size = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_AS, (size + ROOM_BYTES, resource.RLIM_INFINITY))
        go_on(roles.stage)
        while_it_lasts(roles.stage, move, BAD_S)
        if daemon.running():
            resource.prlimit(daemon.pid, resource.RLIMIT_AS, (hard, hard))
        else:
            start(roles.stage, [daemon])

    return Fault(f"starve-{letter}", strike, "memory", letter)


def rebooted(letter: str) -> Fault:
    """Processes, maps, programs and devices of a host's switch are gone; files, and the guest's device, are there."""

    def strike(roles: Roles, _: Going) -> None:
        host = roles.here if letter == "A" else roles.there
        daemon = roles.daemon(letter)
        daemon.kill()
        dies = roles.stage.power_off(host)
        _forget_all(roles.stage, host)
        roles.stage.power_on(host)
        go_on(roles.stage)
        start(roles.stage, [daemon])
        if dies:
            roles.stage.broken_talk = True

    return Fault(f"reboot-{letter}", strike, "reboot", letter)


def _forget_all(stage: Stage, host: str) -> None:
    cluster = stage.cluster
    namespace, pins = cluster.name(host), cluster.directory / host / "bpf"
    mine = str(cluster.disk(host))
    for process in netns.run(["ip", "netns", "pids", namespace]).split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{process}/cmdline").read_bytes().decode()
            if "keeper_process" in command and mine in command:
                os.kill(int(process), signal.SIGKILL)
    for folder in [path for path in pins.iterdir() if path.is_dir()]:  # not the kernel's own files
        shutil.rmtree(folder)
    guests = set(stage.vm.ports[0].devices.values())
    for line in netns.ip("-o", "link", namespace=namespace).splitlines():
        device = line.split(": ")[1].partition("@")[0]
        if device not in {"lo", UPLINK, *guests}:
            netns.ip("link", "del", device, namespace=namespace)


FAULTS: list[Fault] = [
    *(killed(letters) for letters in ("A", "B", "C")),
    *(killed("".join(pair)) for pair in itertools.combinations("ABC", 2)),
    *(frozen(letter) for letter in "ABC"),
    *(
        bad(link, mode, value)
        for mode, value in (
            ("cut", 0),
            ("stall", 0),
            ("half", 0),
            ("delay", SLOW_MS),
            ("throttle", SLOW_BYTES),
            ("corrupt", 0),
        )
        for link in ("AB", "CA", "CB")
    ),
    *(full(letter) for letter in "ABC"),
    *(starved(letter) for letter in "ABC"),
    *(rebooted(letter) for letter in "AB"),
]
