# SPDX-License-Identifier: GPL-2.0-only
"""The agent's libvirt driver against real libvirtds and QEMU: what it hears, how it moves guests, what it survives."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest

from migrator.lab.processes import PATIENT_S, wait_until

from .driven import Driven, driven
from .lab import GuestMachine, HostDaemon, LibvirtLab, allow_downtime, last_move, migrate
from .lab.guests import LIVE

Word = tuple[str, bool, str]
STOPPED: Word = ("paused", True, "migrated")
SLOW_MIB_S = 1
LEISURELY_MIB_S = 48  # slow enough for QEMU to see that it cannot stop the guest yet
OTHER = {"h1": "h2", "h2": "h1"}


@pytest.fixture(scope="module")
def options(bridged: LibvirtLab) -> dict[str, Any]:
    """As in an agent's configuration; the emulated guest is stopped in the first pass over its memory."""
    return {
        "uris": {name: host.remote_uri for name, host in bridged.hosts.items()},
        "data_uris": {name: f"tcp://{host.address}" for name, host in bridged.hosts.items()},
        "max_passes": 1,
    }


@pytest.fixture(scope="module")
def drivers(bridged: LibvirtLab, options: dict[str, Any]) -> Iterator[dict[str, Driven]]:
    """A driver at each host."""
    uris = {name: host.uri for name, host in bridged.hosts.items()}
    with driven({**options, "uri": uris["h1"]}) as h1, driven({**options, "uri": uris["h2"]}) as h2:
        yield {"h1": h1, "h2": h2}


class Here:
    """The guest where it is: `own` is the driver of its host, `far` that of the other."""

    def __init__(self, guest: GuestMachine, drivers: dict[str, Driven]) -> None:
        self.guest = guest
        self.vm = guest.uuid
        self.place = wait_until("the guest runs", guest.place)
        self.to = OTHER[self.place]
        self.own, self.far = drivers[self.place], drivers[self.to]
        wait_until("the driver knows that it runs", lambda: self.state() == "running")
        for driver in drivers.values():
            driver.events.clear()
            driver.happenings.clear()

    def state(self) -> str | None:
        found: str | None = self.own.call("state", vm=self.vm)
        return found

    def hear(self, *words: Word) -> None:
        """Wait until exactly these were told here."""
        wait_until("all is told", lambda: len(self.own.words(self.vm)) >= len(words), explain=self.told)
        assert self.own.words(self.vm) == list(words)

    def told(self) -> str:
        return f"{self.own.words(self.vm)}, there {self.far.words(self.vm)}"

    def copies(self) -> None:
        """Wait until QEMU is in a pass over the memory."""
        wait_until("QEMU copies", lambda: self.own.call("remaining", vm=self.vm, downtime_ms=1)["converged"])


@pytest.fixture
def here(guest: GuestMachine, drivers: dict[str, Driven]) -> Here:
    return Here(guest, drivers)


def test_a_guest_is_where_libvirt_says(here: Here) -> None:
    assert here.far.call("state", vm=here.vm) is None
    assert here.own.call("speaks") and here.far.call("speaks")
    domain = here.guest.domain()
    domain.suspend()
    here.hear(("paused", False, "suspended"))
    assert here.state() == "paused"
    domain.resume()
    here.hear(("paused", False, "suspended"), ("running", False, "QEMU runs"))
    assert here.state() == "running"


def test_the_agent_stops_and_starts_a_guest(here: Here) -> None:
    here.own.call("suspend", vm=here.vm)
    here.hear(("paused", False, "suspended"))
    assert "paused already" in here.own.refusal("suspend", vm=here.vm)
    here.own.call("resume", vm=here.vm)
    wait_until("it runs", lambda: here.state() == "running")


def test_a_guest_that_nobody_moves_is_not_accompanied(here: Here) -> None:
    assert here.own.call("leaving", vm=here.vm) is False
    assert "does not move VM" in here.own.refusal("accompany", vm=here.vm)
    assert here.own.call("cancel", vm=here.vm, certain=True) is True, "it runs here"
    assert here.far.call("cancel", vm=here.vm, certain=True) is False, "it is not here"
    refusal = here.far.refusal("remaining", vm=here.vm, downtime_ms=300)
    assert "Domain not found" in refusal and here.vm in refusal


def test_a_snapshot_of_memory_is_no_move(here: Here, tmp_path: Path) -> None:
    """QEMU sends the memory away and stops the guest, as in a migration: but into a file."""
    domain, file = here.guest.domain(), tmp_path / "saved"
    domain.save(str(file))
    here.hear(("paused", False, "suspended"), ("gone", False, "saved"))
    assert here.own.happenings[-1]["what"] == "saved"
    wait_until("it is not here", lambda: here.state() is None)
    domain.connect().restore(str(file))
    wait_until("it runs again", lambda: here.state() == "running")
    assert "restored" in [event["what"] for event in here.own.happenings]
    here.guest.booted()


def test_a_move_by_somebody_else_is_heard_at_both_ends(here: Here) -> None:
    migrate(here.guest, here.to)
    here.hear(STOPPED, ("gone", True, "migrated"), ("measured", True, ""))
    assert here.far.words(here.vm) == [("running", True, "QEMU runs")]
    assert (here.state(), here.far.call("state", vm=here.vm)) == (None, "running")
    stopped, _, measured = here.own.events
    resumed = here.far.events[0]
    assert 0 < resumed["time"] - stopped["time"] < PATIENT_S, "QEMU's own times, on one clock"
    assert measured["memory"]["passes"] <= 3 and measured["memory"]["downtime_ms"] > 0
    assert [e["what"] for e in here.own.happenings] == ["stopped"]
    assert [e["detail"] for e in here.far.happenings] == ["migrated"]


def test_the_agent_moves_and_leads(here: Here, bridged: LibvirtLab, options: dict[str, Any]) -> None:
    """It stops the guest before QEMU would, in the first pass; libvirt does the rest."""
    allow_downtime(here.guest)
    with driven({**options, "uri": bridged.hosts[here.place].uri, "bandwidth_mib_s": LEISURELY_MIB_S}) as driver:
        driver.call("migrate", vm=here.vm, to=here.to)
        driver.call("lead", vm=here.vm)
        here.hear(STOPPED, ("gone", True, "migrated"), ("measured", True, ""))
    wait_until("it runs there", lambda: here.guest.place() == here.to)
    assert last_move(here.guest).passes <= 3
    here.guest.booted()


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("who", ["operator", "agent"])
def test_a_move_is_aborted(
    bridged: LibvirtLab, guest: GuestMachine, options: dict[str, Any], stopped: bool, who: str
) -> None:
    """Before and after the pause; libvirt starts the guest again."""
    place = wait_until("the guest runs", guest.place)
    slow = {**options, "uri": bridged.hosts[place].uri, "bandwidth_mib_s": SLOW_MIB_S}
    with driven(slow) as driver:
        driver.call("migrate", vm=guest.uuid, to=OTHER[place])
        copies = partial(driver.call, "remaining", vm=guest.uuid, downtime_ms=1)
        wait_until("QEMU copies", lambda: copies()["converged"])
        driver.events.clear()
        if stopped:
            driver.call("suspend", vm=guest.uuid)
            driver.until("it stands", lambda: STOPPED in driver.words(guest.uuid))
        if who == "agent":
            assert driver.call("cancel", vm=guest.uuid, certain=True) is True
        else:
            domain = bridged.hosts[place].domain(guest.uuid)
            assert domain is not None
            domain.abortJob()
        wait_until("it runs here", lambda: driver.call("state", vm=guest.uuid) == "running")
        wait_until("nothing moves it", lambda: not driver.call("leaving", vm=guest.uuid))
        said = [what for what, _, _ in driver.words(guest.uuid)]
        assert said == (["paused", "running"] if stopped else ["failed"] if who == "operator" else [])
    guest.booted()
    assert guest.place() == place


def test_why_a_move_failed_is_told(here: Here, bridged: LibvirtLab, options: dict[str, Any]) -> None:
    nowhere = {**options, "uri": bridged.hosts[here.place].uri, "uris": {here.to: "qemu+tcp://127.0.0.1:1/system"}}
    with driven(nowhere) as driver:
        driver.events.clear()
        driver.call("migrate", vm=here.vm, to=here.to)
        driver.until("it failed", lambda: [e for e in driver.events if e["what"] == "failed"])
        assert "unable to connect to server" in driver.events[-1]["reason"]
        assert driver.call("state", vm=here.vm) == "running"


def test_a_move_that_ends_before_qemu_has_a_part_in_it_is_told(here: Here, bridged: LibvirtLab) -> None:
    """libvirtd at the destination is not found: QEMU never says a word, and no event comes."""
    nobody = bridged.hosts[here.place].address.rpartition(".")[0] + ".99"
    errors: list[str] = []

    def move() -> None:
        try:
            domain.migrateToURI3(f"qemu+tcp://{nobody}/system", {}, LIVE)
        except libvirt.libvirtError as error:
            errors.append(str(error))

    domain = here.guest.domain()
    mover = threading.Thread(target=move)
    mover.start()
    wait_until("it is to leave", lambda: here.own.call("leaving", vm=here.vm))
    here.own.call("accompany", vm=here.vm)
    mover.join(30)
    assert errors
    here.hear(("failed", True, "it ended without QEMU's part of it"))
    assert here.state() == "running"


@contextlib.contextmanager
def silent(daemon: HostDaemon) -> Iterator[None]:
    """A process that is there and does nothing; nsenter, which waits for it, stops with it."""
    assert daemon.process is not None
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in (daemon.process.pid, daemon.pid):
            os.kill(pid, signal.SIGCONT)


def test_a_libvirtd_that_does_not_answer_holds_nobody_up(here: Here, bridged: LibvirtLab) -> None:
    host = bridged.hosts[here.place]
    with driven({"uri": host.uri}) as driver:
        with silent(host.libvirtd):
            waiting = driver.ask("suspend", vm=here.vm)
            assert driver.call("state", vm=here.vm) == "running", "events and questions of the agent go on"
            with pytest.raises(AssertionError, match="did not answer within 5 s"):
                driver.answer(waiting)
        here.hear(("paused", False, "suspended"))  # it obeys when it wakes up
        driver.call("resume", vm=here.vm)
        wait_until("it runs", lambda: here.state() == "running")
        with silent(host.libvirtd):
            driver.ask("leaving", vm=here.vm)
            assert driver.process.stdin is not None
            driver.process.stdin.close()
            assert driver.process.wait(10) == 0, "the agent ends without libvirt's answer"


def test_a_paused_guest_moves_and_stays_paused(here: Here) -> None:
    allow_downtime(here.guest)
    here.guest.domain().suspend()
    here.hear(("paused", False, "suspended"))
    here.own.call("migrate", vm=here.vm, to=here.to)
    assert here.own.call("remaining", vm=here.vm, downtime_ms=1)["converged"], "there is nothing to wait for"
    assert "paused already" in here.own.refusal("suspend", vm=here.vm)
    here.hear(("paused", False, "suspended"), ("gone", True, "migrated"), ("measured", True, ""))
    here.far.until("it has arrived", lambda: here.far.words(here.vm) == [("paused", True, "arrived")])
    assert here.far.call("state", vm=here.vm) == "paused"
    here.far.call("resume", vm=here.vm)
    wait_until("it runs", lambda: here.guest.place() == here.to)
    here.guest.booted()


def test_post_copy_is_followed(here: Here, bridged: LibvirtLab) -> None:
    """The guest runs there while most of its memory is still here."""
    destination = bridged.hosts[here.to]
    parameters = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{destination.address}", libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 8}
    domain = here.guest.domain()
    order = (destination.remote_uri, parameters, LIVE | libvirt.VIR_MIGRATE_POSTCOPY)
    mover = threading.Thread(target=domain.migrateToURI3, args=order)
    mover.start()
    here.copies()
    assert here.own.call("leaving", vm=here.vm) is True
    domain.migrateStartPostCopy()
    here.far.until("it runs there", lambda: ("running", True, "QEMU runs") in here.far.words(here.vm))
    assert here.own.call("cancel", vm=here.vm, certain=True) is False, "it never comes back"
    mover.join(30)
    here.hear(STOPPED, ("paused", True, "post-copy"), ("gone", True, "migrated"), ("measured", True, ""))
    here.guest.booted()


def test_a_restart_of_libvirtd_is_survived(here: Here, bridged: LibvirtLab) -> None:
    host = bridged.hosts[here.place]
    host.disconnect()
    host.libvirtd.stop()
    wait_until("the driver misses it", lambda: not here.own.call("speaks"))
    assert here.state() == "running", "the last word counts"
    assert "libvirt is not reached" in here.own.refusal("suspend", vm=here.vm)
    host.start_libvirtd()
    wait_until("the driver is back", lambda: here.own.call("speaks"))
    assert [event["what"] for event in here.own.happenings] == ["up"]
    assert here.own.words(here.vm) == [], "nothing has changed"
    domain = here.guest.domain()
    domain.suspend()
    here.hear(("paused", False, "suspended"))
    domain.resume()
    wait_until("it runs", lambda: here.state() == "running")


def test_what_happened_while_libvirtd_was_away_is_told(here: Here, bridged: LibvirtLab) -> None:
    """The last test of this guest: it dies."""
    host = bridged.hosts[here.place]
    host.disconnect()
    host.libvirtd.kill()
    wait_until("the driver misses it", lambda: not here.own.call("speaks"))
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        if here.vm in entry.read_bytes().decode(errors="replace"):
            os.kill(int(entry.parent.name), signal.SIGKILL)
    host.start_libvirtd()
    here.own.until("it is gone", lambda: here.own.words(here.vm))
    assert here.own.words(here.vm)[0][0] == "gone"
    assert here.state() is None
