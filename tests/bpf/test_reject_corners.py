# SPDX-License-Identifier: GPL-2.0-only
"""What a rejecting rule drops without an answer: nobody would get it, or nobody could read it. By BPF_PROG_RUN."""

from __future__ import annotations

import struct
import time

import pytest

from . import frames
from .frames import IPV4, IPV6, TCP, UDP, mac_bytes
from .lab import Lab
from .model import MODEL
from .packets import HOP_BY_HOP, extension, v4
from .probe import ACK, FROM, GUEST, GUEST6, PEER, PEER6, RST, TO
from .test_acl_reject import A, B, check_back, finished, guarded, verify
from .test_acl_reject import wrap as wrap_addressed

GRE = 47
DATAGRAM = frames.udp(1111, 2222, bytes(20))


def framed(packet: bytes) -> bytes:
    """Not padded: an answer carries what is there."""
    kind = IPV4 if packet[0] >> 4 == 4 else IPV6
    return mac_bytes(B) + mac_bytes(A) + struct.pack("!H", kind) + packet


def drop(lab: Lab, frame: bytes) -> dict[int, int]:
    ifindex = lab.switch.get("ports", "port", 1).ifindex
    lab.switch.run("from_port", frame, ifindex)
    return lab.drops(1)


@pytest.mark.parametrize(
    "packet",
    [
        frames.ipv6(GUEST6, PEER6, HOP_BY_HOP, extension(UDP) + DATAGRAM),
        frames.ipv6("ff02::1", PEER6, UDP, DATAGRAM),
        frames.ipv6("::", PEER6, UDP, DATAGRAM),
        v4(FROM, UDP, DATAGRAM, options=b"\1\1\1\0"),
        frames.ipv4("0.0.0.0", PEER, UDP, DATAGRAM),
        frames.ipv4("224.0.0.1", PEER, UDP, DATAGRAM),
        frames.ipv4("127.0.0.1", PEER, UDP, DATAGRAM),
        frames.ipv4(GUEST, PEER, GRE, bytes(4)),
        frames.ipv4(GUEST, "224.0.0.1", UDP, DATAGRAM),  # RFC 1122, 3.2.2: and whose would the answer be?
        frames.ipv4(GUEST, "255.255.255.255", UDP, DATAGRAM),
        frames.ipv6(GUEST6, "ff02::1", UDP, DATAGRAM),
        frames.ipv6(GUEST6, "::", UDP, DATAGRAM),
    ],
    ids=[
        *("extension", "multicast6", "unspecified6", "options", "unspecified", "multicast", "loopback", "too short"),
        *("to multicast", "to broadcast", "to multicast6", "to unspecified6"),
    ],
)
def test_no_answer_where_there_are_no_two_stations(lab: Lab, packet: bytes) -> None:
    wires = guarded(lab)
    assert drop(lab, framed(packet)) == {MODEL.DROP_REJECT: 1}
    assert [wire.waiting() for wire in wires] == [[], []]


def connected(lab: Lab, proto: int, state: int) -> None:
    """A connection of another policy, and the record of a first fragment of it."""
    table = lab.switch.inner("conntracks", 1, "ct_table", 64)
    ends = frames.address(GUEST) + frames.address(PEER)
    entry = MODEL.ct_entry(word=5 << 32 | state, id=5, judged=1)
    table.update(ends + struct.pack("!HHBBBB", 1111, 2222, proto, 0, 0, 0), bytes(entry))
    record = MODEL.ct_entry(word=6 << 32 | MODEL.CT_NEW, id=6, mark=1111 << 16 | 2222)
    table.update(ends + struct.pack("!HHBBBB", 0, 9, proto, MODEL.CT_TYPE_FRAGMENT, 1, 0), bytes(record))


def test_no_reset_of_a_reset(lab: Lab) -> None:
    wires = guarded(lab)
    connected(lab, TCP, MODEL.CT_ESTABLISHED)
    segment = struct.pack("!HHIIBBHHH", 1111, 2222, 1, 2, 5 << 4, RST | ACK, 0, 0, 0)
    assert drop(lab, framed(frames.ipv4(GUEST, PEER, TCP, segment))) == {MODEL.DROP_REJECT: 1}
    assert wires[FROM].waiting() == []


def test_no_answer_to_a_later_fragment(lab: Lab) -> None:
    wires = guarded(lab)
    connected(lab, UDP, MODEL.CT_NEW)
    lab.change_port(1, time_base=time.monotonic_ns())
    port = lab.switch.get("ports", "port", 1)
    port.timeouts[MODEL.TIMEOUT_FRAGMENT] = 30_000
    lab.switch.put("ports", 1, port)
    assert drop(lab, framed(v4(FROM, UDP, bytes(64), offset=8, number=9))) == {MODEL.DROP_REJECT: 1}
    assert wires[FROM].waiting() == []


def test_the_answer_to_a_frame_with_its_tag_in_the_data(lab: Lab) -> None:
    """As a frame of this host's own has it at the egress of a trunk: the answer goes out by the tag's network."""
    wires = guarded(lab, TO, trunk=True)
    lab.switch.put("trunks", MODEL.trunk_key(slot=1, vid=7), 1)
    plain = finished(wrap_addressed(TO, False, UDP, frames.udp(1111, 2222, bytes(30))), False, 6)
    tagged = plain[:12] + struct.pack("!HH", 0x8100, 7) + plain[12:]
    assert lab.switch.run("to_port", tagged, lab.switch.get("ports", "port", 1).ifindex).verdict == 2
    body = verify(check_back(wires[TO].receive(), TO, False))
    assert body[:2] == b"\x03\x03"
