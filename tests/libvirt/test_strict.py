# SPDX-License-Identifier: GPL-2.0-only
"""Strict mode: libvirt starts no vCPU at the destination before all of the network state is committed there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import libvirt
import pytest

from migrator.lab.errors import LabError
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until

from .hooked import Moving, Traffic, ended, metadata, reports
from .lab import Events, GuestMachine, Wiring, add_guest
from .strictly import StrictCluster, at, guarded

pytestmark = pytest.mark.slow
AT_ONCE_S = 0.5
HELD_S = 0.5  # less than libvirt's lock driver waits
PORT = Port("52:54:00:00:00:10", "blue", ("10.1.0.1",))
OTHER = Port("52:54:00:00:00:11", "blue", ("10.1.0.3",))


@pytest.fixture(scope="module")
def cluster() -> Iterator[StrictCluster]:
    with guarded() as made:
        yield made


@pytest.fixture(scope="module")
def peer(cluster: StrictCluster) -> Machine:
    made = add_peer(cluster, "p1", "h3", Port("52:54:00:00:00:20", "blue", ("10.1.0.2",)), policy="open")
    cluster.declare(made)
    return made


@pytest.fixture(scope="module")
def guest(cluster: StrictCluster) -> GuestMachine:
    """Led: the agent stops it in the first pass over its memory."""
    made = add_guest(cluster, "vm1", "h1", [PORT], metadata=metadata(PORT, strict="yes", max_passes="1"))
    made.booted()
    return made


@pytest.fixture(scope="module")
def traffic(guest: GuestMachine, peer: Machine) -> Traffic:
    return Traffic(guest, peer, connections=20)


def elsewhere(place: str) -> str:
    return "h2" if place == "h1" else "h1"


def settled(cluster: StrictCluster, guest: GuestMachine) -> None:
    """Its moves have ended, it has ports where it runs and nowhere else, and nobody is asked for it."""

    def left() -> dict[str, object]:
        states = {
            name: [p.instance.state for p in cluster.ports(name) if p.instance.vm == guest.uuid]
            for name in cluster.machine_names
        }
        place = guest.place()
        wrong = {name: found for name, found in states.items() if found != (["active"] if name == place else [])}
        undone = [(r.phase, r.outcome, r.reason) for r in reports(cluster, guest) if not r.done]
        marks = [mark for mark in cluster.marks() if guest.uuid in mark]
        return {"place": place, "ports": wrong, "moves": undone, "marks": marks}

    def quiet() -> bool:
        now = left()
        return bool(now["place"]) and not (now["ports"] or now["moves"] or now["marks"])

    wait_until("all is settled", quiet, 45.0, explain=left)


def begun(cluster: StrictCluster, guest: GuestMachine) -> tuple[str, int]:
    """Where it goes, and the number that its next move will have."""
    settled(cluster, guest)
    return elsewhere(guest.place()), len(reports(cluster, guest)) + 1


def home(cluster: StrictCluster, guest: GuestMachine) -> None:
    settled(cluster, guest)
    if guest.place() != "h1":
        moving = Moving(guest, "h1")
        moving.join()
        assert moving.error is None
        settled(cluster, guest)


def committed_at(cluster: StrictCluster, host: str, migration: str) -> float:
    """When the destination noted the commit; the commit itself was before."""
    (line,) = cluster.said(host, event="phase", role="destination", phase="committed", migration=migration)
    return at(line)


@pytest.mark.parametrize("way", ["there", "back"])
def test_the_commit_lies_before_the_first_instruction(
    cluster: StrictCluster, guest: GuestMachine, traffic: Traffic, way: str
) -> None:
    to, number = begun(cluster, guest)
    assert (to == "h2") is (way == "there")
    events = Events()
    end = events.watch(to, cluster.hosts[to].connection())
    try:
        moving = Moving(guest, to)
        moving.join()
        assert moving.error is None
        runs = events.wait_for(to, "qemu", "RESUME").at
    finally:
        end()
    report = ended(cluster, guest, number)
    assert (report.outcome, report.destination, report.leading) == ("complete", to, True), report
    assert committed_at(cluster, to, report.id) < runs
    answers = cluster.said(elsewhere(to), event="hook", op="release", uuid=guest.uuid)
    assert answers and answers[0]["result"] == "ok"
    assert answers[0]["ms"] >= report.times_ms["committed"] - 5, "the pause ends before the commit"
    traffic.check()
    settled(cluster, guest)


def test_a_commit_that_is_late_holds_the_guest(cluster: StrictCluster, guest: GuestMachine, traffic: Traffic) -> None:
    """The destination stands still until QEMU has sent everything, when release has been given up, and longer."""
    home(cluster, guest)
    to, number = begun(cluster, guest)
    events = Events()
    end = events.watch(to, cluster.hosts[to].connection())

    def all_sent() -> bool:
        seen = events.find(to, "qemu", "MIGRATION")
        return any('"completed"' in str(event.detail) for event in seen)

    try:
        with cluster.standing("destination.committing"):
            moving = Moving(guest, to)
            cluster.wait_for("destination.committing")
            wait_until("QEMU has sent everything", all_sent, interval_s=0.002)
            with pytest.raises(LabError):
                events.wait_for(to, "qemu", "RESUME", HELD_S)
        moving.join()
        assert moving.error is None
        runs = events.wait_for(to, "qemu", "RESUME").at
    finally:
        end()
    report = ended(cluster, guest, number)
    assert report.outcome == "complete", report
    assert committed_at(cluster, to, report.id) < runs
    traffic.check()
    home(cluster, guest)


@pytest.mark.parametrize(
    ("point", "killed", "says"),
    [
        ("destination.committing", "h2", "the migrator agent does not answer"),
        ("source.final", "h1", "cannot be completed"),
        ("source.draining", "h1", "cannot be completed"),
    ],
)
def test_what_cannot_be_committed_does_not_start_there(
    cluster: StrictCluster, guest: GuestMachine, traffic: Traffic, point: str, killed: str, says: str
) -> None:
    """An agent dies inside the barrier, at either end: the guest goes on where it was, with all that it had."""
    home(cluster, guest)
    with cluster.standing(point):
        moving = Moving(guest, "h2")
        cluster.wait_for(point)
        cluster.agents[killed].kill()
    moving.join()
    assert moving.error is not None and says in str(moving.error), moving.error
    assert guest.place() == "h1"
    assert cluster.hosts["h2"].domain(guest.uuid) is None
    cluster.restart(cluster.agents[killed])
    settled(cluster, guest)
    assert reports(cluster, guest)[-1].outcome == "aborted"
    traffic.check()


def test_an_agent_that_dies_after_the_commit_holds_nobody(
    cluster: StrictCluster, guest: GuestMachine, traffic: Traffic
) -> None:
    home(cluster, guest)
    with cluster.standing("destination.committed"):
        moving = Moving(guest, "h2")
        cluster.wait_for("destination.committed")
        cluster.agents["h2"].kill()
    moving.join()
    assert moving.error is None and guest.place() == "h2"
    cluster.restart(cluster.agents["h2"])
    settled(cluster, guest)
    traffic.check()


def test_two_at_once_in_opposite_directions(cluster: StrictCluster, guest: GuestMachine, traffic: Traffic) -> None:
    home(cluster, guest)
    with cluster.scope():
        wiring, own = Wiring(), metadata(OTHER, policy="open", strict="yes", lead="no")
        other = add_guest(cluster, "vm2", "h2", [OTHER], wiring, metadata=own)
        other.booted()
        both = [Moving(guest, "h2"), Moving(other, "h1")]
        for moving in both:
            moving.join(60.0)
            assert moving.error is None
        for one, to in ((guest, "h2"), (other, "h1")):
            settled(cluster, one)
            assert one.place() == to and reports(cluster, one)[-1].outcome == "complete"
        traffic.check()


def test_without_a_move_nobody_is_asked(cluster: StrictCluster, guest: GuestMachine, traffic: Traffic) -> None:
    """Pause and resume are at once, also when the agent does not answer; it is not even asked."""
    settled(cluster, guest)
    place = guest.place()
    agent, domain = cluster.agents[place], guest.domain()
    before = len(cluster.said(place, event="hook", uuid=guest.uuid))
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        domain.suspend()
        domain.resume()
        assert time.monotonic() - began < AT_ONCE_S
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    wait_until("it runs", lambda: guest.place() == place)
    traffic.check()
    assert len(cluster.said(place, event="hook", uuid=guest.uuid)) == before


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


def test_a_host_without_the_driver_is_refused(cluster: StrictCluster, guest: GuestMachine, traffic: Traffic) -> None:
    home(cluster, guest)
    host = cluster.hosts["h2"]
    cluster.uninstall(host)
    try:
        moving = Moving(guest, "h2")
        moving.join()
        assert moving.error is not None and guest.place() == "h1"
        for words in ("has not loaded the lock driver", "migrator libvirt install --strict"):
            assert words in str(moving.error), moving.error
        assert moving.error.get_error_code() != libvirt.VIR_ERR_OPERATION_ABORTED
    finally:
        assert "installed" in cluster.install(host)
    settled(cluster, guest)
    traffic.check()
