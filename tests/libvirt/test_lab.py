# SPDX-License-Identifier: GPL-2.0-only
"""The lab itself: hosts that are apart, guests that are reached, counted and moved by libvirt over plain bridges."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest

from migrator.lab import netns
from migrator.lab.errors import LabError
from migrator.lab.machines import Machine, Port
from migrator.lab.processes import PATIENT_S, wait_until
from migrator.lab.topology import Lab
from migrator.lab.workers.probe import FORMAT, MAGIC

from .lab import GuestMachine, LibvirtLab, Wiring, add_guest, guests, last_move, migrate

SERVICE, NUMBERS = 7000, 9000


def test_hosts_are_apart(bridged: LibvirtLab, guest: GuestMachine) -> None:
    here, there = (bridged.hosts[name] for name in ("h1", "h2"))
    assert here.connection().getHostname() == "h1" and there.connection().getHostname() == "h2"
    assert here.uuid in here.connection().getCapabilities()
    place = guest.place()
    other = bridged.hosts["h2" if place == "h1" else "h1"]
    assert other.connection().listAllDomains() == []
    assert "qemu-system" in bridged.hosts[place].run_inside("ps", "-A", "-o", "comm")
    assert "qemu-system" not in other.run_inside("ps", "-A", "-o", "comm")


@pytest.mark.slow
def test_a_guest_moves_there_and_back_and_keeps_its_connections(
    clean_guest: GuestMachine, outsider: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    talkers = []
    for server, client in ((clean_guest, outsider), (outsider, clean_guest)):
        server.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
        talker = client.worker("tcp")
        assert talker.call("connect", address=server.address, port=SERVICE, count=20)["connected"] == 20
        talker.call("flow", every_ms=200, size=64)
        talkers.append(talker)
    start = clean_guest.place()
    for to in ("h2", "h1") if start == "h1" else ("h1", "h2"):
        assert migrate(clean_guest, to).passes <= 3
        assert clean_guest.place() == to
        for talker in talkers:
            checked = talker.call("check", size=2000, timeout_s=PATIENT_S)
            assert (checked["total"], checked["lost"]) == (20, 0), checked["reasons"]
    monkeypatch.setattr(guests, "MAX_PASSES", 0)
    with pytest.raises(LabError, match="corrupts"):
        last_move(clean_guest)


def test_numbers_are_counted_inside(clean_guest: GuestMachine, outsider: Machine) -> None:
    worker = clean_guest.worker("probe")
    worker.call("receive", address="0.0.0.0", port=NUMBERS)
    with netns.entered(outsider.lab.path(outsider.name)):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        for number in (0, 1, 1, 5, 3):
            sender.sendto(FORMAT.pack(MAGIC, 7, number), (clean_guest.address, NUMBERS))
    found = wait_until("five came", lambda: _counted(worker.call("report")["flows"].get("7"), 5))
    assert found == {
        "received": 4,
        "newest": 5,
        "missing": [2, 4],
        "missing_count": 2,
        "doubled": 1,
        "overtaken": 1,
        "beyond": 0,
    }


def _counted(flow: dict[str, int] | None, count: int) -> dict[str, int] | None:
    return flow if flow and flow["received"] + flow["doubled"] == count else None


@pytest.mark.parametrize("ipv6", [False, True], ids=["v4", "v6"])
def test_numbers_flow_both_ways(clean_guest: GuestMachine, outsider: Machine, ipv6: bool) -> None:
    inside, outside = clean_guest.worker("probe"), outsider.worker("probe")
    addresses = (clean_guest.address6, outsider.address6) if ipv6 else (clean_guest.address, outsider.address)
    port = NUMBERS + 1 + ipv6
    for end in (inside, outside):
        end.call("receive", address="::" if ipv6 else "0.0.0.0", port=port)
    outside.call("send", flow=1, address=addresses[0], port=port, every_ms=2)
    inside.call("send", flow=2, address=addresses[1], port=port, every_ms=2)
    for receiver, sender, flow in ((inside, outside, 1), (outside, inside, 2)):
        wait_until(f"flow {flow}", partial(_reached, receiver, flow, 300))
        sent = sender.call("stop", flow=flow)["sent"]
        report = wait_until("the last came", partial(_reached, receiver, flow, sent - 1))
        assert (report["missing_count"], report["doubled"], report["overtaken"]) == (0, 0, 0)


def _reached(worker: Any, flow: int, number: int) -> dict[str, Any] | None:
    """A flow's report once a number has come."""
    report: dict[str, Any] = worker.call("report")["flows"].get(str(flow), {"newest": -1})
    return report if report["newest"] >= number else None


def test_a_guest_outlives_its_libvirtd(bridged: LibvirtLab, clean_guest: GuestMachine) -> None:
    host = bridged.hosts[clean_guest.place()]
    before = host.domain(clean_guest.uuid)
    assert before is not None
    number = before.ID()
    host.libvirtd.kill()
    host.start_libvirtd()
    after = host.domain(clean_guest.uuid)
    assert after is not None and after.ID() == number
    clean_guest.control.call("ping")


def test_wrong_bytes_are_seen_inside(clean_guest: GuestMachine, outsider: Machine) -> None:
    with netns.entered(outsider.lab.path(outsider.name)):
        listener = socket.create_server(("0.0.0.0", SERVICE + 1))
    with listener:
        worker = clean_guest.worker("tcp")
        assert worker.call("connect", address=outsider.address, port=SERVICE + 1, count=1)["connected"] == 1
        listener.settimeout(10)
        served, _ = listener.accept()
        with served:
            served.settimeout(10)
            worker.ask("check", size=64, timeout_s=PATIENT_S)
            data = bytearray(served.recv(64, socket.MSG_WAITALL))
            data[40] ^= 1
            served.sendall(data)
            verdict = worker.answer("check")
    assert (verdict["lost"], verdict["bytes"], verdict["reasons"]) == (1, 41, ["wrong bytes"])


HOOK = """#!/bin/sh
echo "$(hostname) $2 $3" >> {log}
! {{ [ -e {refuse} ] && [ "$2" = start ] && echo "refused by the test" >&2; }}
"""


def test_hooks_are_called_and_may_refuse(bridged: LibvirtLab) -> None:
    host = bridged.hosts["h1"]
    log, refuse = (bridged.directory / name for name in ("hooks.log", "refuse"))
    script = host.hooks / "probe"
    script.write_text(HOOK.format(log=log, refuse=refuse))
    script.chmod(0o755)
    host.restart_libvirtd()  # it looks for the first hook only when it starts
    with bridged.scope():
        guest = add_guest(bridged, "vm2", "h1", [Port("52:54:00:00:00:12", "", ())], Wiring("bridge", bridge="br0"))
        guest.destroy()
        lines = log.read_text().splitlines()
        wanted = ["prepare begin", "start begin", "started begin", "stopped end", "release end"]
        assert [line for line in lines if "reconnect" not in line] == [f"h1 {word}" for word in wanted]
        refuse.touch()
        with pytest.raises(libvirt.libvirtError, match="refused by the test"):
            host.create(guest.xml)
    script.unlink()
    host.restart_libvirtd()


def test_a_tap_that_is_there_already(bridged: LibvirtLab) -> None:
    host = bridged.hosts["h2"]
    host.make_tap("ready")
    with bridged.scope():
        port = Port("52:54:00:00:00:13", "", (), device="ready")
        guest = add_guest(bridged, "vm3", "h2", [port], Wiring(managed=False), metadata="<x:t xmlns:x='urn:test'/>")
        assert "urn:test" in guest.domain().XMLDesc()
        assert "LOWER_UP" in netns.ip("link", "show", "ready", namespace=bridged.name("h2"))
    assert "NO-CARRIER" in netns.ip("link", "show", "ready", namespace=bridged.name("h2"))


def test_a_host_without_power() -> None:
    with LibvirtLab(("h1",)) as lab:
        add_guest(lab, "vm", "h1", [Port("52:54:00:00:00:14", "", ())])
        assert len(_of(str(lab.directory))) > 2
        lab.hosts["h1"].power_off()
        wait_until("nothing runs", lambda: not _of(str(lab.directory)), explain=lambda: _of(str(lab.directory)))


SCRIPT = """
import sys
from migrator.lab.machines import Port
from tests.libvirt.lab import LibvirtLab, Wiring, add_guest
with LibvirtLab() as lab:
    guest = add_guest(lab, "vm", "h1", [Port("52:54:00:00:00:11", "", ("10.1.0.1",))])
    print(lab.prefix, lab.directory, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_nothing_is_left(end: signal.Signals) -> None:
    lab = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with lab:
        assert lab.stdout is not None
        prefix, directory = lab.stdout.readline().split()
        assert _of(directory), "the lab has no processes that one could find"
        lab.send_signal(end)
    wait_until("its processes have ended", lambda: not _of(directory), explain=lambda: _of(directory))
    if end == signal.SIGKILL:  # the kernel ended the hosts; the next lab removes what is no process
        with Lab(("h1",)):
            pass
    assert not Path(directory).exists()
    assert not list(netns.RUN.glob(f"{prefix}*"))
    mounts = Path("/proc/self/mounts").read_text()
    assert prefix not in mounts and directory not in mounts


def _of(directory: str) -> list[str]:
    """Processes that name the lab's directory, on their command line or as a mount of theirs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace")
            if directory in words or directory in (process / "mountinfo").read_text():
                found.append(words.replace("\0", " "))
    return found
