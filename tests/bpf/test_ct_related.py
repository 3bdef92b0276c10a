# SPDX-License-Identifier: GPL-2.0-only
"""ICMP errors about a connection."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from . import frames
from .frames import ICMP6, IPV4, TCP, UDP, mac_bytes
from .model import MODEL
from .packets import DESTINATION, extension, pair, v4, wrap
from .probe import (
    ACK,
    BOTH,
    FROM,
    FROM_ONLY,
    GUEST,
    GUEST6,
    GUEST_MAC,
    ICMP,
    PEER,
    PEER6,
    PEER_MAC,
    SYN,
    TO,
    Probe,
    icmp,
    tcp,
)

Ports = Callable[..., Probe]
ROUTER = "198.51.100.1"
ROUTER6 = "2001:db8:aa::1"


def error(
    port: Probe, direction: int, inner: bytes, *, kind: int | None = None, guest: str = "", sender: str = ""
) -> int:
    v6 = inner[0] >> 4 == 6
    kind = kind if kind is not None else (1 if v6 else 3)
    own, far = (guest or GUEST6, sender or ROUTER6) if v6 else (guest or GUEST, sender or ROUTER)
    source, target = (far, own) if direction else (own, far)
    build, proto = (frames.ipv6, ICMP6) if v6 else (frames.ipv4, ICMP)
    return port.send(direction, wrap(direction, build(source, target, proto, icmp(kind, 1) + inner)))


def sent(direction: int, proto: int, body: bytes, v6: bool) -> bytes:
    return frames.ipv6(*pair(direction, True), proto, body) if v6 else v4(direction, proto, body)


@pytest.mark.parametrize("v6", [False, True])
def test_an_error_about_a_connection_passes(ports: Ports, v6: bool) -> None:
    port = ports(FROM_ONLY)
    key = port.key(TCP, v6=v6)
    inner = sent(FROM, TCP, tcp(40000, 80, SYN)[:8], v6)
    assert error(port, TO, inner) == MODEL.DROP_CT_INVALID
    port.put(key, MODEL.CT_SYN_SENT, seen=1)
    before = bytes(port.entry(key))
    for kind in (1, 2, 3, 4) if v6 else (3, 4, 5, 11, 12):
        assert error(port, TO, inner, kind=kind) == MODEL.DROP_NONE
    assert bytes(port.entry(key)) == before
    assert port.table.keys() == [key]
    # what the guest did not send, and what it sent to somebody else
    assert error(port, TO, sent(TO, TCP, tcp(80, 40000, ACK)[:8], v6)) == MODEL.DROP_CT_INVALID
    assert error(port, TO, sent(FROM, TCP, tcp(40000, 81, SYN)[:8], v6)) == MODEL.DROP_CT_INVALID
    assert error(port, TO, inner, guest="2001:db8::99" if v6 else "10.0.0.99") == MODEL.DROP_CT_INVALID


@pytest.mark.parametrize("v6", [False, True])
def test_an_error_from_the_guest(ports: Ports, v6: bool) -> None:
    port = ports(BOTH)
    port.put(port.key(UDP, rport=53, v6=v6), MODEL.CT_NEW, MODEL.CT_F_INBOUND)
    inner = sent(TO, UDP, frames.udp(53, 40000), v6)
    peer = PEER6 if v6 else PEER
    assert error(port, FROM, inner, sender=peer) == MODEL.DROP_NONE
    assert error(port, FROM, inner, sender="2001:db8::77" if v6 else "192.0.2.77") == MODEL.DROP_CT_INVALID


@pytest.mark.parametrize("v6", [False, True])
def test_an_error_about_an_echo(ports: Ports, v6: bool) -> None:
    port = ports(FROM_ONLY)
    assert port.icmp(FROM, 128 if v6 else 8, v6=v6) == MODEL.DROP_NONE
    proto, request, answer = (ICMP6, 128, 129) if v6 else (ICMP, 8, 0)
    assert error(port, TO, sent(FROM, proto, icmp(request, 0, 7), v6)) == MODEL.DROP_NONE
    assert error(port, TO, sent(FROM, proto, icmp(request, 0, 8), v6)) == MODEL.DROP_CT_INVALID
    assert error(port, TO, sent(FROM, proto, icmp(answer, 0, 7), v6)) == MODEL.DROP_CT_INVALID
    assert error(port, TO, sent(FROM, proto, icmp(1 if v6 else 3, 0, 7), v6)) == MODEL.DROP_CT_INVALID


def test_an_error_behind_extension_headers(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    port.put(port.key(UDP, rport=53, v6=True), MODEL.CT_NEW)
    inner = frames.ipv6(*pair(FROM, True), DESTINATION, extension(UDP) + frames.udp(40000, 53))
    assert error(port, TO, inner) == MODEL.DROP_NONE


@pytest.mark.parametrize("size", [0, 8, 19, 27])
def test_an_error_that_carries_too_little(ports: Ports, size: int) -> None:
    port = ports(BOTH)
    port.put(port.key(UDP, rport=53), MODEL.CT_NEW)
    packet = frames.ipv4(ROUTER, GUEST, ICMP, icmp(3, 1) + v4(FROM, UDP, frames.udp(40000, 53))[:size])
    frame = mac_bytes(GUEST_MAC) + mac_bytes(PEER_MAC) + struct.pack("!H", IPV4) + packet
    assert port.send(TO, frame) == MODEL.DROP_CT_INVALID


def test_an_error_about_an_expired_connection(ports: Ports) -> None:
    port = ports(BOTH)
    port.put(port.key(UDP, rport=53), MODEL.CT_NEW, MODEL.CT_F_DYING)
    assert error(port, TO, v4(FROM, UDP, frames.udp(40000, 53))) == MODEL.DROP_CT_INVALID
