# SPDX-License-Identifier: GPL-2.0-only
"""Moves of a guest that the agent stops, and what breaks from then on.

The destination has committed: the guest runs on where it came from. `test_hook` has what fails before the pause,
`test_killed` daemons that die in each phase.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial

import libvirt
import pytest

from migrator.lab.processes import Daemon, wait_until

from .bench import Bench, Kept, killable
from .counted import CountedTraffic
from .hooked import LIVE, Moving, ended, reports
from .lab import migrate
from .test_hook import nothing_at, qemu

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benches() -> Iterator[Kept[Bench]]:
    """The agent stops the guest in QEMU's first pass: what is left of memory then takes as long as the test wants."""
    kept = Kept(partial(killable, CountedTraffic, max_passes="1"))
    yield kept
    kept.drop()


class Case:
    """What the tests of this module have in common."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.cluster, self.guest = bench, bench.cluster, bench.guest
        assert isinstance(bench.traffic, CountedTraffic)
        self.traffic = bench.traffic
        bench.go_home()
        self.count = len(reports(self.cluster, self.guest))
        self.traffic.lost()

    def stopped(self) -> Moving:
        """Begin a move to h2 and wait until the guest stands and the destination has committed."""
        moving = Moving(self.guest, "h2", LIVE, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 1})
        wait_until("the destination has committed", self._committed, explain=self._newest)
        return moving

    def _newest(self) -> object:
        return reports(self.cluster, self.guest)[self.count :]

    def _committed(self) -> bool:
        return [report.phase for report in reports(self.cluster, self.guest)[self.count :]] == ["committed"]

    def abort(self) -> None:
        """`virsh domjobabort`. The guest stands, so it is not looked for among those that run."""
        domain = self.cluster.hosts["h1"].domain(self.guest.uuid)
        assert domain is not None
        domain.abortJob()

    def kill_qemu(self) -> None:
        os.kill(qemu("h2", self.cluster, self.guest), signal.SIGKILL)

    def kill_libvirtd(self) -> None:
        self.cluster.hosts["h2"].libvirtd.kill()

    def kill_own_libvirtd(self) -> None:
        """The source's: when it is back it calls off what it was doing."""
        self.cluster.hosts["h1"].libvirtd.kill()
        self.cluster.hosts["h1"].start_libvirtd()

    @contextlib.contextmanager
    def without(self, daemon: Daemon) -> Iterator[None]:
        daemon.kill()
        try:
            yield
        finally:
            self.cluster.restart(daemon)

    def back_to_normal(self, moving: Moving) -> None:
        """It runs at h1 as if nothing had been, nothing of it is at h2, and the next moves work."""
        moving.join()
        assert moving.error is not None
        report = ended(self.cluster, self.guest, self.count + 1)
        assert report.outcome == "aborted", report
        assert self.guest.place() == "h1"
        self.traffic.check()
        nothing_at(self.cluster, "h2", self.guest)
        for number, to in ((2, "h2"), (3, "h1")):
            migrate(self.guest, to)
            assert ended(self.cluster, self.guest, self.count + number).outcome == "complete"
            self.traffic.check()


@pytest.fixture
def case(bench: Bench) -> Case:
    return Case(bench)


HARM: dict[str, Callable[[Case], None]] = {"abort": Case.abort, "qemu": Case.kill_qemu, "libvirtd": Case.kill_libvirtd}
HARM["own-libvirtd"] = Case.kill_own_libvirtd


@pytest.mark.parametrize("harm", sorted(HARM))
def test_a_move_fails_after_the_pause(case: Case, harm: str) -> None:
    """What came meanwhile is in the source's hold: the guest gets all of it, once, and misses nothing."""
    moving = case.stopped()
    HARM[harm](case)
    moving.join()
    wait_until("it runs at h1", lambda: case.guest.place() == "h1")
    lost = case.traffic.lost()
    if harm == "libvirtd":
        case.cluster.hosts["h2"].start_libvirtd()
    assert lost == {"from": (0, 0), "to": (0, 0)}
    case.back_to_normal(moving)


@pytest.mark.parametrize("dead", ["h1", "h2", "coordinator"])
def test_a_move_fails_while_a_daemon_is_dead(case: Case, dead: str) -> None:
    """When it is back it finds where the guest is. Frames are another matter: who should have passed them was dead."""
    moving = case.stopped()
    daemon = case.cluster.coordinator if dead == "coordinator" else case.cluster.agents[dead]
    with case.without(daemon):
        case.abort()
        moving.join()
        assert case.guest.place() == "h1"
    case.back_to_normal(moving)


def test_the_destinations_qemu_and_agent_die_together(case: Case) -> None:
    moving = case.stopped()
    with case.without(case.cluster.agents["h2"]):
        case.kill_qemu()
        moving.join()
    case.back_to_normal(moving)
