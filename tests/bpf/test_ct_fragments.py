# SPDX-License-Identifier: GPL-2.0-only
"""Packets in pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import frames
from .frames import UDP, mac_bytes
from .model import MODEL
from .packets import FRAGMENT, MORE, fragment, pair, v4, wrap
from .probe import BOTH, FROM, FROM_ONLY, ICMP, TO, Probe, icmp, rule

Ports = Callable[..., Probe]


def pieces(direction: int, v6: bool, number: int = 77, count: int = 3, identifier: int = 40000) -> list[bytes]:
    """A UDP datagram in `count` fragments."""
    data = frames.udp(*((53, identifier) if direction else (identifier, 53)), bytes(count * 64 - 8))
    made = []
    for index in range(count):
        part, more = data[index * 64 : index * 64 + 64], index < count - 1
        if v6:
            body = fragment(UDP, index * 8, more, number << 16 | 5) + part
            made.append(wrap(direction, frames.ipv6(*pair(direction, True), FRAGMENT, body)))
        else:
            made.append(wrap(direction, v4(direction, UDP, part, offset=index * 8 | more * MORE, number=number)))
    return made


def record_key(port: Probe, direction: int, v6: bool, number: int = 77) -> bytes:
    high, low = (number, 5) if v6 else (0, number)
    return port.key(UDP, high, low, v6=v6, type=MODEL.CT_TYPE_FRAGMENT, side=1 - direction)


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("opener", [FROM, TO])
def test_fragments_follow_their_first(ports: Ports, opener: int, v6: bool) -> None:
    port = ports(BOTH)
    port.track()
    for fragment_frame in pieces(opener, v6):
        assert port.send(opener, fragment_frame) == MODEL.DROP_NONE
    key = port.key(UDP, rport=53, v6=v6)
    record = record_key(port, opener, v6)
    assert set(port.table.keys()) == port.drain() == {key, record}
    assert port.entry(key).packets[opener] == 3
    assert port.entry(key).bytes[opener] == 3 * (48 if v6 else 20) + 3 * 64
    assert port.entry(record).mark == 40000 << 16 | 53


@pytest.mark.parametrize("v6", [False, True])
def test_fragments_of_an_answer(ports: Ports, v6: bool) -> None:
    port = ports(FROM_ONLY)
    first, *later = pieces(TO, v6)
    assert port.send(TO, first) == MODEL.DROP_POLICY
    assert [port.send(TO, each) for each in later] == [MODEL.DROP_FRAGMENT] * 2
    assert port.udp(FROM, v6=v6) == MODEL.DROP_NONE
    assert [port.send(TO, each) for each in (first, *later)] == [MODEL.DROP_NONE] * 3


def test_a_fragment_before_its_first(ports: Ports) -> None:
    port = ports(BOTH)
    first, second, third = pieces(FROM, False)
    assert port.send(FROM, second) == MODEL.DROP_FRAGMENT
    assert port.send(FROM, first) == MODEL.DROP_NONE
    assert port.send(FROM, third) == MODEL.DROP_NONE


def test_fragments_of_another_packet_or_side(ports: Ports) -> None:
    port = ports(BOTH)
    assert port.send(FROM, pieces(FROM, False)[0]) == MODEL.DROP_NONE
    assert port.send(FROM, pieces(FROM, False, number=78)[1]) == MODEL.DROP_FRAGMENT
    assert port.send(TO, pieces(TO, False)[1]) == MODEL.DROP_FRAGMENT


def test_an_old_record_does_not_count(ports: Ports) -> None:
    port = ports(BOTH)
    first, second, _ = pieces(FROM, False)
    assert port.send(FROM, first) == MODEL.DROP_NONE
    port.pass_time(31)
    assert port.send(FROM, second) == MODEL.DROP_FRAGMENT


def test_a_record_is_used_again(ports: Ports) -> None:
    """The same id some packets later, from another port."""
    port = ports(BOTH)
    port.track()
    assert port.send(FROM, pieces(FROM, False)[0]) == MODEL.DROP_NONE
    port.drain()
    first, second, _ = pieces(FROM, False, identifier=50000)
    assert port.send(FROM, first) == MODEL.DROP_NONE
    assert record_key(port, FROM, False) in port.drain()
    assert port.send(FROM, second) == MODEL.DROP_NONE
    assert port.entry(port.key(UDP, 50000, 53)).packets[0] == 2
    assert port.entry(port.key(UDP, 40000, 53)).packets[0] == 1


@pytest.mark.parametrize("flag", ["CT_F_DYING", "CT_F_DEAD"])
def test_an_expired_record_is_absent(ports: Ports, flag: str) -> None:
    port = ports(BOTH)
    first, second, _ = pieces(FROM, False)
    port.put(port.key(UDP, rport=53), MODEL.CT_NEW)
    port.put(record_key(port, FROM, False), MODEL.CT_NEW, getattr(MODEL, flag), mark=40000 << 16 | 53)
    assert port.send(FROM, second) == MODEL.DROP_FRAGMENT
    assert port.send(FROM, first) == MODEL.DROP_NONE
    revived = flag == "CT_F_DYING"
    assert port.send(FROM, second) == (MODEL.DROP_NONE if revived else MODEL.DROP_FRAGMENT)


def test_fragments_end_with_their_connection(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    first, second, third = pieces(FROM, False)
    assert port.send(FROM, first) == MODEL.DROP_NONE
    port.set_policy([rule(3, "from", "drop")])
    assert port.send(FROM, second) == MODEL.DROP_POLICY
    assert port.send(FROM, third) == MODEL.DROP_FRAGMENT


def test_fragments_of_an_echo(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    data = icmp(8, 0, 7, bytes(56))
    first, second = (
        wrap(FROM, v4(FROM, ICMP, part, offset=offset, number=3)) for part, offset in ((data, MORE), (bytes(64), 8))
    )
    assert [port.send(FROM, first), port.send(FROM, second)] == [MODEL.DROP_NONE] * 2
    assert port.entry(port.key(ICMP, 7, 0)).packets[0] == 2


def test_fragments_to_a_group(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    first, second, _ = (mac_bytes(frames.BROADCAST) + each[6:] for each in pieces(FROM, False))
    assert port.send(FROM, second) == MODEL.DROP_FRAGMENT
    assert [port.send(FROM, first), port.send(FROM, second)] == [MODEL.DROP_NONE] * 2
