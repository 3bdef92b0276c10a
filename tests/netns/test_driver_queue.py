# SPDX-License-Identifier: GPL-2.0-only
"""The device of a VM that moves has room for all that was held: it comes at once, perhaps before the guest reads."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.holds import QUEUE_LENGTH
from datapath.drivers.ebpf.tun import open_tap
from datapath.provider import PortRef

from .driver_lab import Guest, Host, shelf, wait_until

CHANNEL = 815
HELD = 4000
USUAL = 1000
RULES = [{"direction": "to", "protocol": "udp", "ports": [[9000, 9000]]}]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with shelf.lend(2) as made:
        yield made


@contextlib.contextmanager
def tap(host: Host, name: str, qdisc: str) -> Iterator[int]:
    """A tap that nobody reads unless the test does. `qdisc` "": the kernel's choice."""
    handle = host.run(lambda: open_tap(name))
    try:
        if qdisc:
            host.run(lambda: run("tc", "qdisc", "replace", "dev", name, "root", qdisc))
        host.run(lambda: run("ip", "link", "set", name, "txqueuelen", str(USUAL), "up"))
        yield handle
    finally:
        os.close(handle)


def length(host: Host, name: str) -> int:
    found = host.run(lambda: devices.link(name))
    assert found is not None
    return found.queue


def numbers(handle: int) -> list[int]:
    """Of the datagrams in the tap's queue, in order."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frame = os.read(handle, 4096)
            ether = frame[len(frame) - 14 - 20 - 8 - 4 :]
            if ether[12:14] == b"\x08\x00":
                found.append(int.from_bytes(ether[-4:], "big"))
    return found


def send_while_held(peer: Guest, vm: Guest, source: Host, count: int) -> None:
    def know() -> None:
        run("ip", "neigh", "replace", vm.address, "lladdr", vm.ref.mac, "dev", "eth0")

    peer.run(know)
    with peer.socket(socket.SOCK_DGRAM) as sender:
        for number in range(count):
            sender.sendto(number.to_bytes(4, "big"), (vm.address, 9000))
    wait_until(lambda: source.run(lambda: source.driver.port(vm.ref)).held_to >= count, "all of them are held")


@pytest.mark.parametrize("appears", ["before", "after"])
@pytest.mark.parametrize(("qdisc", "afterwards"), [("noqueue", USUAL), ("", QUEUE_LENGTH)], ids=["noqueue", "usual"])
def test_a_guest_that_reads_late_gets_all_that_was_held(
    pair: list[Host], appears: str, qdisc: str, afterwards: int
) -> None:
    source, target = pair
    vm, peer = source.guest("10.0.0.1", RULES), source.guest("10.0.0.2")
    moved = PortRef(vm.ref.vm, vm.ref.mac, vm.ref.epoch + 1)

    def stage() -> None:
        target.driver.stage(moved, vm.record, "late0")
        target.driver.accept_redirect(moved, CHANNEL, "h1")

    if appears == "after":
        target.run(stage)
    with tap(target, "late0", qdisc) as handle:
        if appears == "before":
            target.run(stage)
        wait_until(lambda: length(target, "late0") == QUEUE_LENGTH, "the queue is long")
        for table in source.run(lambda: list(source.driver.dump(vm.ref, "acl"))):
            target.run(lambda table=table: target.driver.load(moved, table))  # type: ignore[misc]
        source.run(lambda: source.driver.hold(vm.ref))
        send_while_held(peer, vm, source, HELD)
        source.run(lambda: source.driver.quiesce(vm.ref))
        target.run(lambda: target.driver.commit(moved))
        target.run(lambda: target.driver.open(moved, broadcast=False))
        source.run(lambda: source.driver.redirect(vm.ref, CHANNEL, "h2"))
        sent, _ = source.run(lambda: source.driver.passed_on(vm.ref))
        wait_until(lambda: target.run(lambda: target.driver.passed_on(moved))[1] == sent, "all of them came")
        assert [number for number in numbers(handle) if number < HELD] == list(range(HELD))
        target.run(lambda: target.driver.settled(moved))
        assert length(target, "late0") == afterwards
        target.run(lambda: target.driver.purge(moved))


@pytest.mark.parametrize(("qdisc", "during"), [("noqueue", QUEUE_LENGTH), ("", USUAL)], ids=["noqueue", "usual"])
def test_a_device_with_traffic_is_changed_only_where_that_drops_nothing(
    pair: list[Host], qdisc: str, during: int
) -> None:
    source, _ = pair
    with tap(source, "live0", qdisc):
        ref = PortRef("6f1c0f6e-8a5d-4e0e-9d3e-00000000aaaa", "02:00:00:00:aa:01", 1)
        record = {"mac": ref.mac, "network": "blue", "addresses": ["10.0.0.9"]}
        source.run(lambda: source.driver.stage(ref, record, "live0"))
        source.run(lambda: source.driver.open(ref))
        source.run(lambda: source.driver.track(ref))
        assert length(source, "live0") == during
        source.run(lambda: source.driver.untrack(ref))
        assert length(source, "live0") == USUAL
        source.run(lambda: source.driver.purge(ref))
