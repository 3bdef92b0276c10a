# SPDX-License-Identifier: GPL-2.0-only
"""A hostile machine on the wires of two real hosts: on the uplink beside their VMs, on the underlay between them."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.pathprobe import _BODY, _ETHERNET, _MAGIC, _REQUEST
from datapath.provider import PortStatus

from .driver_lab import Guest, Host, hosts, wait_until
from .test_driver_forward import talk
from .test_security_guest import datagram, macs, places, running

CHANNEL, ROOM = 0xABCDEF, 4096
FLOOD, BATCH = 3 * ROOM, 256


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    with hosts(2) as made:
        yield made


@contextlib.contextmanager
def cable(host: Host, device: str = "up0") -> Iterator[socket.socket]:
    """Frames that leave `host` by a device as if somebody beside it had sent them."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        made.bind((device, 0))
        return made

    with host.run(make) as made:
        yield made


def tagged(frame: bytes, vid: int = 7) -> bytes:
    return frame[:12] + struct.pack("!HH", 0x8100, vid) + frame[12:]


def announcement(mac: str, address: str) -> bytes:
    """Gratuitous ARP (RFC 5227)."""
    own = bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(address)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own + bytes(6) + socket.inet_aton(address)
    return (macs("ff:ff:ff:ff:ff:ff", mac) + b"\x08\x06" + body).ljust(60, b"\0")


def status(host: Host, guest: Guest) -> PortStatus:
    return host.run(lambda: host.driver.port(guest.ref))


def dropped(host: Host) -> dict[int, int]:
    """Frames of no port, by drop reason."""
    counters = running(host).kernel.counters.get(0)
    assert counters is not None
    return {reason: int(count) for reason, count in enumerate(counters["drops"].sum(axis=0)) if count}


def test_a_forged_announcement_moves_no_vm(pair: list[Host]) -> None:
    """It is passed on to the network, as any broadcast; the switch learns nothing of it."""
    near, far = pair
    vm, beside = near.guest("10.0.1.1", network="vlan"), near.guest("10.0.1.2", network="vlan")
    before = status(near, beside).counters
    with cable(far) as attacker:
        attacker.send(tagged(announcement(vm.ref.mac, vm.address)))
    wait_until(lambda: status(near, beside).counters != before, "it was passed on")
    assert places(near, vm) == ["port"]
    talk(vm, beside)


def test_invented_sources_keep_no_vm_from_coming(pair: list[Host]) -> None:
    """More of them than the table has room for; then VMs still come, and talk."""
    near, far = pair
    kernel = running(near).kernel
    vm = near.guest("10.0.2.1", network="vlan")
    wait_until(lambda: int(kernel.learning.get(0)["max"]) == ROOM // 2, "the sweeper has set the limits")  # type: ignore[index]
    frame = tagged(datagram(vm, vm, 1, 1))
    with cable(far) as attacker:
        for first in range(0, FLOOD, BATCH):
            for number in range(first, first + BATCH):
                attacker.send(frame[:6] + struct.pack("!HI", 0x0299, number) + frame[12:])
    wait_until(lambda: int(kernel.learning.get(0)["count"]) >= ROOM // 4, "as many are learned as may be")  # type: ignore[index]
    _, entries = kernel.l2.read()
    learned = int((entries["kind"] == C.L2_UPLINK).sum())
    assert learned <= ROOM // 4, "a network's part of the table"
    other = near.guest("10.0.2.2", network="vlan")
    assert places(near, other) == ["port"]
    talk(vm, other)


def test_a_table_that_is_full_of_places_is_said_and_floods(pair: list[Host], caplog: pytest.LogCaptureFixture) -> None:
    """What no attacker can bring about, more VMs than the table has room for can."""
    near, _ = pair
    l2 = running(near).kernel.l2
    vm = near.guest("10.0.5.1", network="vlan")
    keys, entries = np.zeros(ROOM, l2.key), np.zeros(ROOM, l2.value)
    keys["network"] = 63
    keys["mac"][:, 4], keys["mac"][:, 5] = np.divmod(np.arange(ROOM), 256)
    entries["flags"] = C.L2_F_LOCATION
    try:
        assert l2.load(keys, entries).refused
        other = near.guest("10.0.5.2", network="vlan")
        assert "the L2 table is full" in caplog.text
        assert places(near, other) == []
        talk(vm, other)
    finally:
        l2.delete_many(keys)


def probe(nonce: int, size: int = 200) -> bytes:
    return (_ETHERNET + _BODY.pack(_MAGIC, _REQUEST, nonce, size)).ljust(size, b"\0")


def forge(host: Host, channel: int, mark: int, inner: bytes) -> None:
    """A tunnel packet from `host`, of a process that is not its agent."""
    packet = struct.pack("!BxHI", 0x88, mark, channel << 8) + inner
    with host.socket(socket.SOCK_DGRAM) as sender:
        sender.sendto(packet, (other(host), 4789))


def other(host: Host) -> str:
    own = str(host.options["underlay"])
    return "192.0.2.1" if own.endswith("2") else "192.0.2.2"


def test_a_forged_probe_is_not_answered(pair: list[Host]) -> None:
    near, far = pair
    vm = near.guest("10.0.3.1", network="vlan")
    before = dropped(near).get(C.DROP_CHANNEL, 0)
    for _ in range(3):
        forge(far, CHANNEL, C.MARK_PROBE, probe(7))
    wait_until(lambda: dropped(near).get(C.DROP_CHANNEL, 0) == before + 3, "they end in the switch")
    assert running(near).kernel.channels.get(CHANNEL) is None
    assert near.run(lambda: near.driver.passed_on(vm.ref))[1] == 0


def test_a_channel_goes_with_its_port(pair: list[Host]) -> None:
    """While it is open the source is heard, and nobody else; then nobody."""
    near, far = pair
    vm = near.guest("10.0.4.1", network="vlan")
    frame = datagram(vm, vm, 1, 1, "02:aa:aa:aa:aa:aa")
    own = {host: host.options["underlay"] for host in pair}
    name = {f"192.0.2.{number}": f"h{number}" for number in (1, 2)}
    near.run(lambda: near.driver.accept_redirect(vm.ref, CHANNEL, name[own[far]]))
    before = dropped(near).get(C.DROP_CHANNEL, 0)
    forge(far, CHANNEL, C.MARK_REDIRECT, frame)
    wait_until(lambda: near.run(lambda: near.driver.passed_on(vm.ref))[1] == 1, "the source is heard")
    forge(far, CHANNEL + 1, C.MARK_REDIRECT, frame)
    wait_until(lambda: dropped(near).get(C.DROP_CHANNEL, 0) == before + 1, "another channel is not")
    near.run(lambda: near.driver.quiesce(vm.ref))
    near.run(lambda: near.driver.purge(vm.ref))
    forge(far, CHANNEL, C.MARK_REDIRECT, frame)
    wait_until(lambda: dropped(near).get(C.DROP_CHANNEL, 0) == before + 2, "nor the source any more")
