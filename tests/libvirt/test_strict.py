# SPDX-License-Identifier: GPL-2.0-only
"""Strict mode: libvirt starts no vCPU at the destination before all of the network state is committed there."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import libvirt
import pytest

from migrator.lab.errors import LabError, TooSlow
from migrator.lab.machines import Port
from migrator.lab.processes import wait_until

from . import bench as benches_
from .bench import Bench, Kept
from .hooked import LIVE, UNHURRIED, Moving, ended, led, metadata, reports
from .lab import Events, Wiring, add_guest
from .strictly import StrictCluster, at

pytestmark = pytest.mark.slow
ASKED_S = 2.0  # the lock driver waits so long for an agent that does not answer
HELD_S = 0.5  # less than that
OTHER = Port("52:54:00:00:00:11", "blue", ("10.1.0.3",))


@pytest.fixture(scope="module")
def benches() -> Iterator[Kept[Bench]]:
    kept = Kept(benches_.strict)
    yield kept
    kept.drop()


@pytest.fixture
def cluster(bench: Bench) -> StrictCluster:
    assert isinstance(bench.cluster, StrictCluster)
    return bench.cluster


@contextlib.contextmanager
def watched(cluster: StrictCluster, host: str) -> Iterator[Events]:
    events = Events()
    end = events.watch(host, cluster.hosts[host].connection())
    try:
        yield events
    finally:
        end()


def moved(bench: Bench, to: str) -> None:
    """So slowly that the agent stops the guest before QEMU can, on a busy machine, too."""
    bench.settled()
    moving = Moving(bench.guest, to, LIVE, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: UNHURRIED})
    moving.join()
    assert moving.error is None and bench.guest.place() == to, moving.error


def committed_at(cluster: StrictCluster, host: str, migration: str) -> float:
    """When the destination noted the commit; the commit itself was before."""
    (line,) = cluster.said(host, event="phase", role="destination", phase="committed", migration=migration)
    return at(line)


@pytest.mark.parametrize("to", ["h2", "h1"])
def test_the_commit_lies_before_the_first_instruction(bench: Bench, cluster: StrictCluster, to: str) -> None:
    bench.go_home()
    if to == "h1":
        moved(bench, "h2")
    number = len(reports(cluster, bench.guest)) + 1
    with watched(cluster, to) as events:
        moved(bench, to)
        runs = events.wait_for(to, "qemu", "RESUME").at
    report = ended(cluster, bench.guest, number)
    assert (report.outcome, report.destination) == ("complete", to), report
    assert committed_at(cluster, to, report.id) < runs
    answers = cluster.said(report.source, event="hook", op="release", uuid=bench.guest.uuid)
    assert answers and answers[-1]["result"] == "ok"
    assert committed_at(cluster, to, report.id) <= at(answers[-1]), "the pause ends before the commit"
    bench.traffic.check()
    bench.settled()
    led(report)


def test_a_commit_that_is_late_holds_the_guest(bench: Bench, cluster: StrictCluster) -> None:
    """The destination stands still until QEMU has sent everything, when release has been given up, and longer."""
    bench.go_home()
    number = len(reports(cluster, bench.guest)) + 1
    with watched(cluster, "h2") as events:

        def all_sent() -> bool:
            return any('"completed"' in str(event.detail) for event in events.find("h2", "qemu", "MIGRATION"))

        with cluster.standing("destination.committing"):
            moving = Moving(bench.guest, "h2")
            cluster.wait_for("destination.committing")
            wait_until("QEMU has sent everything", all_sent, interval_s=0.002)
            with pytest.raises(LabError):
                events.wait_for("h2", "qemu", "RESUME", HELD_S)
        moving.join()
        if moving.error is not None and "does not answer" in str(moving.error):
            raise TooSlow(f"it stood longer than the lock driver waits: {moving.error}")
        assert moving.error is None, moving.error
        runs = events.wait_for("h2", "qemu", "RESUME").at
    report = ended(cluster, bench.guest, number)
    assert report.outcome == "complete", report
    assert committed_at(cluster, "h2", report.id) < runs
    bench.traffic.check()


@pytest.mark.parametrize(
    ("point", "killed", "says"),
    [
        ("destination.committing", "h2", "the migrator agent does not answer"),
        ("source.final", "h1", "cannot be completed"),
        ("source.draining", "h1", "cannot be completed"),
    ],
)
def test_what_cannot_be_committed_does_not_start_there(
    bench: Bench, cluster: StrictCluster, point: str, killed: str, says: str
) -> None:
    """An agent dies inside the barrier, at either end: the guest goes on where it was, with all that it had."""
    bench.go_home()
    with cluster.standing(point):
        moving = Moving(bench.guest, "h2", LIVE, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: UNHURRIED})
        cluster.wait_for(point)
        cluster.agents[killed].kill()
    moving.join()
    assert moving.error is not None and says in str(moving.error), moving.error
    assert bench.guest.place() == "h1"
    assert cluster.hosts["h2"].domain(bench.guest.uuid) is None
    cluster.restart(cluster.agents[killed])
    bench.settled()
    assert reports(cluster, bench.guest)[-1].outcome == "aborted"
    bench.traffic.check()


def test_an_agent_that_dies_after_the_commit_holds_nobody(bench: Bench, cluster: StrictCluster) -> None:
    bench.go_home()
    with cluster.standing("destination.committed"):
        moving = Moving(bench.guest, "h2")
        cluster.wait_for("destination.committed")
        cluster.agents["h2"].kill()
    moving.join()
    assert moving.error is None and bench.guest.place() == "h2"
    cluster.restart(cluster.agents["h2"])
    bench.settled()
    bench.traffic.check()


def test_two_at_once_in_opposite_directions(bench: Bench, cluster: StrictCluster) -> None:
    bench.go_home()
    with cluster.scope():
        wiring, own = Wiring(), metadata(OTHER, policy="open", strict="yes", lead="no")
        other = add_guest(cluster, "vm2", "h2", [OTHER], wiring, metadata=own)
        other.booted()
        both = [Moving(bench.guest, "h2"), Moving(other, "h1")]
        for moving in both:
            moving.join()
            assert moving.error is None
        for one, to in ((bench, "h2"), (replace(bench, guest=other), "h1")):
            one.settled()
            assert one.guest.place() == to and reports(cluster, one.guest)[-1].outcome == "complete"
        bench.traffic.check()


def test_without_a_move_nobody_is_asked(bench: Bench, cluster: StrictCluster) -> None:
    """Pause and resume are at once, also when the agent does not answer; it is not even asked."""
    bench.settled()
    place = bench.guest.place()
    agent, domain = cluster.agents[place], bench.guest.domain()
    before = len(cluster.said(place, event="hook", uuid=bench.guest.uuid))
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        domain.suspend()
        domain.resume()
        took_s = time.monotonic() - began
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    wait_until("it runs", lambda: bench.guest.place() == place)
    bench.traffic.check()
    assert len(cluster.said(place, event="hook", uuid=bench.guest.uuid)) == before
    if took_s >= ASKED_S:
        raise TooSlow(f"pause and resume took {took_s:.1f} s: whether they waited for the agent cannot be told")


def test_without_an_agent_vms_are_as_they_are_without_us(cluster: StrictCluster) -> None:
    cluster.agents["h2"].kill()
    try:
        with cluster.scope():
            stranger = add_guest(cluster, "stranger", "h2", [OTHER])
            stranger.booted()
            domain = stranger.domain()
            domain.suspend()
            domain.resume()
            stranger.control.call("ping")
            domain.destroy()
            assert stranger.place() == ""
    finally:
        cluster.restart(cluster.agents["h2"])


def test_a_host_without_the_driver_is_refused(bench: Bench, cluster: StrictCluster) -> None:
    bench.go_home()
    host = cluster.hosts["h2"]
    cluster.uninstall(host)
    try:
        moving = Moving(bench.guest, "h2")
        moving.join()
        assert moving.error is not None and bench.guest.place() == "h1"
        for words in ("has not loaded the lock driver", "migrator libvirt install --strict"):
            assert words in str(moving.error), moving.error
        assert moving.error.get_error_code() != libvirt.VIR_ERR_OPERATION_ABORTED
    finally:
        assert "installed" in cluster.install(host)
    bench.settled()
    bench.traffic.check()
