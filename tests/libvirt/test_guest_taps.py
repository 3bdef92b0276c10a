# SPDX-License-Identifier: GPL-2.0-only
"""The queues of a real QEMU's tap, looked at by whoever has an agent's rights: from inside the host and outside."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import libvirt
import pytest

from migrator.lab import netns
from migrator.lab.machines import Port

from .lab import GuestMachine, LibvirtLab, add_guest

FLOWS = 64
LOOK = """
import json, socket, struct, sys
from datapath.drivers.ebpf import tun
from datapath.drivers.ebpf.taps import GuestTap
from datapath.errors import FeatureMissing

def flow(number):
    udp = struct.pack("!HHHH", 1000 + number, 2000, 28, 0) + bytes(20)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes(4), bytes(4))
    return b"\\xff" * 6 + b"\\x02" + bytes(5) + b"\\x08\\x00" + ip + udp

name, count = sys.argv[1], int(sys.argv[2])
try:
    with GuestTap(name) as tap:
        frames = [bytes(tun.VNET_HEADER) + flow(number) for number in range(count)]
        for _ in range(1 + tap.queues):  # QEMU itself takes one frame of each queue, for a guest that does not run
            tap.drain()
            put = tun.inject(socket.if_nametoindex(name), frames)
            full = tap.readable(1000)
            drained = [frame for frame in tap.drain() if frame in frames]  # the kernel says things, too
        same = sorted(drained) == sorted(frames)
        print(json.dumps([tap.queues, tap.vhost, put, full, same, tap.readable()]))
except FeatureMissing as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LibvirtLab]:
    with LibvirtLab(("h1",)) as made:
        yield made


@pytest.fixture(scope="module", params=[1, 2, 4])
def paused(lab: LibvirtLab, request: pytest.FixtureRequest) -> GuestMachine:
    """A guest with some queues that has not run yet: it reads nothing."""
    queues = request.param
    port = Port(f"52:54:00:00:00:2{queues}", "", (f"10.1.0.{queues}",))
    machine = add_guest(lab, f"vm{queues}", "h1", [port], start=False)
    if queues > 1:
        model = "<model type='virtio'/>"
        machine.xml = machine.xml.replace(model, f"{model}<driver name='qemu' queues='{queues}'/>")
        machine.xml = machine.xml.replace("<vcpu>1</vcpu>", f"<vcpu>{queues}</vcpu>")
    lab.hosts["h1"].connection().createXML(machine.xml, libvirt.VIR_DOMAIN_START_PAUSED)
    return machine


def queues_of(machine: GuestMachine) -> int:
    return int(machine.name.removeprefix("vm"))


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_every_queue_of_qemu_is_seen_and_drained(lab: LibvirtLab, paused: GuestMachine, inside: bool) -> None:
    """The agent may be in libvirtd's process namespace or see it from outside: /proc shows QEMU to both."""
    look = [sys.executable, "-c", LOOK, paused.ports[0].device, str(FLOWS)]
    host = lab.hosts["h1"]
    said = host.run_inside(*look) if inside else netns.run(netns.inside(lab.name("h1"), look))
    assert json.loads(said) == [queues_of(paused), False, FLOWS, True, True, False]


def test_without_the_right_to_look_it_says_so(lab: LibvirtLab, paused: GuestMachine) -> None:
    look = [sys.executable, "-c", LOOK, paused.ports[0].device, str(FLOWS)]
    dropped = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", *look]
    said = json.loads(lab.hosts["h1"].run_inside(*dropped))
    assert "needs CAP_SYS_PTRACE" in said or "no process holds" in said
