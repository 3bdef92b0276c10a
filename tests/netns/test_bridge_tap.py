# SPDX-License-Identifier: GPL-2.0-only
"""Ports whose devices are in a Linux bridge, as libvirt leaves them for `type='bridge'`: the switch has them alone.

The bridge sees nothing of what guests send, and what it floods into their devices reaches no guest: each frame comes
once, by the switch, judged.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Iterator
from time import monotonic

import pytest
from pyroute2 import IPRoute

from datapath.provider import Network, NetworkKind
from migrator.lab.processes import PATIENT_S

from .driver_lab import Guest, Host, Place, connect, give_address, hosts
from .test_driver_forward import talk

LOCAL = 0x88B5  # EtherType for experiments (IEEE 802)
BROADCAST = "ff:ff:ff:ff:ff:ff"
STRANGER = "02:00:00:00:99:01"


def bridge(host: Host, *devices: str) -> None:
    """A bridge with these devices, up."""

    def make() -> None:
        with IPRoute() as route:
            if not route.link_lookup(ifname="br0"):
                route.link("add", ifname="br0", kind="bridge")
            index = socket.if_nametoindex("br0")
            for device in devices:
                route.link("set", index=socket.if_nametoindex(device), master=index)
            route.link("set", index=index, state="up")

    host.run(make)


@pytest.fixture
def host() -> Iterator[Host]:
    with hosts(1) as made:
        yield made[0]


@pytest.fixture
def stranger(host: Host) -> Iterator[Place]:
    """A machine on the bridge that no switch of ours knows."""
    made = Place()
    try:
        connect(host, "wild", made, "eth0", STRANGER)
        give_address(made, "eth0", "10.0.0.99")
        bridge(host, "wild")
        yield made
    finally:
        made.close()


class Ear:
    """A socket that hears all frames of our EtherType at a place's eth0, and sends."""

    def __init__(self, place: Place) -> None:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(LOCAL))
            made.bind(("eth0", LOCAL))
            return made

        self.socket = place.run(make)

    def send(self, to: str, source: str, number: int) -> None:
        head = bytes.fromhex(to.replace(":", "") + source.replace(":", ""))
        self.socket.send(head + struct.pack("!HI", LOCAL, number) + bytes(46))

    def heard(self, last: int, seconds: float = PATIENT_S) -> list[int]:
        """Numbers of the frames that came until `last` did."""
        found: list[int] = []
        deadline = monotonic() + seconds
        while last not in found:
            ready, _, _ = select.select([self.socket], [], [], max(0.0, deadline - monotonic()))
            assert ready, f"only {found} came"
            found.append(struct.unpack_from("!I", self.socket.recv(200), 14)[0])
        return found

    def rest(self) -> list[int]:
        """What waits now."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(struct.unpack_from("!I", self.socket.recv(200, socket.MSG_DONTWAIT), 14)[0])
        return found


@pytest.fixture
def ear() -> Iterator[Callable[[Place], Ear]]:
    with contextlib.ExitStack() as stack:

        def make(place: Place) -> Ear:
            made = Ear(place)
            stack.callback(made.socket.close)
            return made

        yield make


def guests(host: Host, count: int) -> list[Guest]:
    made = [host.guest(f"10.0.0.{number}") for number in range(1, count + 1)]
    bridge(host, *(guest.device for guest in made))
    return made


def test_what_guests_send_comes_once_and_the_bridge_sees_none(
    host: Host, stranger: Place, ear: Callable[[Place], Ear]
) -> None:
    one, two, three = guests(host, 3)
    first, second, third, outside = (ear(place) for place in (one, two, three, stranger))
    first.send(BROADCAST, one.ref.mac, 1)
    first.send("02:00:00:00:00:77", one.ref.mac, 2)  # unknown: flooded
    first.send(two.ref.mac, one.ref.mac, 3)
    first.send(BROADCAST, one.ref.mac, 4)
    assert second.heard(4) == [1, 2, 3, 4] and third.heard(4) == [1, 2, 4]
    assert not second.rest() and not third.rest() and not first.rest()
    assert not outside.rest(), "the bridge would have learned where guests are, and flooded"
    talk(one, two)


def test_what_the_bridge_floods_reaches_no_guest(host: Host, stranger: Place, ear: Callable[[Place], Ear]) -> None:
    one, two = guests(host, 2)
    first, second, outside = (ear(place) for place in (one, two, stranger))
    outside.send(BROADCAST, STRANGER, 1)
    outside.send(one.ref.mac, STRANGER, 2)
    outside.send("02:00:00:00:00:77", STRANGER, 3)
    host.run(lambda: _ping("br0", "10.0.0.1"))  # the host's own frames, by the bridge's device
    first.send(BROADCAST, one.ref.mac, 9)
    assert second.heard(9) == [9]
    second.send(BROADCAST, two.ref.mac, 10)
    assert first.heard(10) == [10]
    drops = host.run(lambda: host.driver.port(one.ref)).drops
    assert drops["not-ours"] >= 3


def _ping(device: str, address: str) -> None:
    """Have the host's own stack look for a guest through the bridge."""
    with IPRoute() as route:
        route.addr("add", index=socket.if_nametoindex(device), address="10.0.0.200", prefixlen=24)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (address, 9))


def test_an_uplink_in_the_same_bridge_brings_each_frame_once(ear: Callable[[Place], Ear]) -> None:
    """A host as it was before: uplink and taps in one bridge. The switch takes the VMs' frames at the uplink."""
    with hosts(2) as (host, other):
        for place in (host, other):
            place.run(lambda place=place: place.driver.set_network(Network("flat", NetworkKind.UPLINK, uplink="up0")))
        here = [host.guest(f"10.0.0.{number}", network="flat") for number in (1, 2)]
        away = other.guest("10.0.0.3", network="flat")
        bridge(host, "up0", *(guest.device for guest in here))
        first, second, far = (ear(place) for place in (*here, away))
        far.send(BROADCAST, away.ref.mac, 1)
        far.send(here[0].ref.mac, away.ref.mac, 2)
        far.send(BROADCAST, away.ref.mac, 3)
        assert first.heard(3) == [1, 2, 3] and second.heard(3) in ([1, 3], [1, 2, 3])
        first.send(BROADCAST, here[0].ref.mac, 4)
        first.send(away.ref.mac, here[0].ref.mac, 5)
        assert far.heard(5) == [4, 5] and second.heard(4) == [4]
        assert not first.rest() and not second.rest() and not far.rest()
        talk(here[0], away)
