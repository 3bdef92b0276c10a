# SPDX-License-Identifier: GPL-2.0-only
"""What a rejecting rule answers, byte for byte, on the wires of both sides, with and without checksum offload."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterator

import pytest

from datapath.drivers.ebpf.acl import compile_rules

from . import frames
from .frames import ICMP6, IPV4, IPV6, TCP, UDP, checksum, mac
from .lab import Lab, Wire, wait_for
from .model import MODEL
from .probe import ACK, FIN, FROM, GUEST, GUEST6, ICMP, PEER, PEER6, RST, SYN, TO, icmp, load_policy, rule

A, B = mac(1), mac(2)
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15


def guarded(lab: Lab, direction: int = FROM, trunk: bool = False) -> tuple[Wire, Wire]:
    """Port 1 with a policy that rejects everything in one direction, beside port 2, which has none."""
    lab.network(1, [(MODEL.L2_PORT, 1, 7 if trunk else 0), (MODEL.L2_PORT, 2, 0)])
    flags = MODEL.PORT_F_TRUNK if trunk else 0
    wires = lab.port(1, A, flags=flags, policy=1), lab.port(2, B)
    lab.place(A, MODEL.L2_PORT, 1, vlan=7 if trunk else 0)
    lab.place(B, MODEL.L2_PORT, 2)
    lab.switch.inner("conntracks", 1, "ct_table", 64)
    rules = [rule(9, "from" if direction == FROM else "to", "reject"), rule(10, "from"), rule(11, "to")]
    compiled = compile_rules(rules)
    load_policy(lab.switch, 1, compiled)
    lab.switch.put("policies", 1, compiled.digest << 32 | 1)
    return wires


def no_offload(name: str) -> None:
    """The device finishes no checksum: the kernel does, before it transmits."""
    value = (ctypes.c_uint32 * 2)(_ETHTOOL_STXCSUM, 0)
    request = struct.pack("16sQ16x", name.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCETHTOOL, request)


@contextlib.contextmanager
def offloading(name: str) -> Iterator[socket.socket]:
    """A socket whose frames carry a virtio header, as those of a guest do."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sender.bind((name, 3))
        yield sender


def send_unfinished(name: str, frame: bytes, start: int, offset: int, gso: tuple[int, int] = (0, 0)) -> None:
    """The checksum at start + offset holds the sum of the pseudo-header only; gso: (type, size)."""
    headers = start + (20 if offset == 16 else 8) if gso[0] else 0
    with offloading(name) as sender:
        sender.send(struct.pack("=BBHHHH", 1, gso[0], headers, gso[1], start, offset) + frame)


def pseudo_sum(packet: bytes, length: int) -> int:
    if packet[0] >> 4 == 4:
        return ~checksum(packet[12:20] + struct.pack("!HH", packet[9], length)) & 0xFFFF
    return ~checksum(packet[8:40] + struct.pack("!IHBB", length, 0, 0, packet[6])) & 0xFFFF


def verify(packet: bytes) -> bytes:
    """Check length and every checksum of an IP packet; returns what is behind its header."""
    if packet[0] >> 4 == 4:
        assert checksum(packet[:20]) == 0
        assert struct.unpack_from("!H", packet, 2)[0] == len(packet)
        body, proto = packet[20:], packet[9]
    else:
        assert struct.unpack_from("!H", packet, 4)[0] == len(packet) - 40
        body, proto = packet[40:], packet[6]
    start = 0 if proto == ICMP else pseudo_sum(packet, len(body))
    assert checksum(body + struct.pack("!H", start)[: 2 if len(body) % 2 == 0 else 0]) == 0
    return body


def ends(v6: bool) -> tuple[str, str]:
    return (GUEST6, PEER6) if v6 else (GUEST, PEER)


def wrap(direction: int, v6: bool, proto: int, body: bytes) -> bytes:
    own, other = ends(v6)
    pair = (own, other) if direction == FROM else (other, own)
    macs = (B, A) if direction == FROM else (A, B)
    packet = frames.ipv6(*pair, proto, body) if v6 else frames.ipv4(*pair, proto, body)
    return frames.ethernet(*macs, IPV6 if v6 else IPV4, packet)


def finished(frame: bytes, v6: bool, offset: int, complete: bool = True) -> bytes:
    """The frame with its transport checksum, or with the sum of the pseudo-header alone."""
    start = 54 if v6 else 34
    packet = frame[14:]
    length = struct.unpack_from("!H", packet, 4)[0] if v6 else struct.unpack_from("!H", packet, 2)[0] - 20
    value = pseudo_sum(packet, length)
    if complete:
        body = frame[start : start + length] + b"\0" * (length % 2)
        value = checksum(body + struct.pack("!H", value))
    return frame[: start + offset] + struct.pack("!H", value) + frame[start + offset + 2 :]


def check_back(answer: bytes, direction: int, v6: bool) -> bytes:
    """From whom and to whom an answer is; returns its IP packet."""
    macs = (A, B) if direction == FROM else (B, A)
    assert answer[:12] == frames.mac_bytes(macs[0]) + frames.mac_bytes(macs[1])
    own, other = ends(v6)
    source, target = (other, own) if direction == FROM else (own, other)
    packet = answer[14:]
    addresses = packet[8:40] if v6 else packet[12:20]
    kind = socket.AF_INET6 if v6 else socket.AF_INET
    assert addresses == socket.inet_pton(kind, source) + socket.inet_pton(kind, target)
    return packet


SEGMENTS = [
    # flags, data, expected flags, sequence, acknowledgement
    (SYN, b"", RST | ACK, 0, 1001),
    (SYN, b"fast open", RST | ACK, 0, 1010),
    (SYN | 8, b"", RST | ACK, 0, 1001),
]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("direction", [FROM, TO])
@pytest.mark.parametrize(("flags", "data", "expected", "sequence", "acknowledged"), SEGMENTS)
def test_reset(
    lab: Lab, direction: int, v6: bool, flags: int, data: bytes, expected: int, sequence: int, acknowledged: int
) -> None:
    wires = guarded(lab, direction)
    segment = struct.pack("!HHIIBBHHH", 1111, 2222, 1000, 77, 5 << 4, flags, 1024, 0, 0) + data
    wires[direction].send(finished(wrap(direction, v6, TCP, segment), v6, 16))
    body = verify(check_back(wires[direction].receive(), direction, v6))
    fields = struct.unpack("!HHIIBBHHH", body)
    assert fields[:6] == (2222, 1111, sequence, acknowledged, 5 << 4, expected)
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REJECT: 1}, "drop counted")
    assert [wire.waiting() for wire in wires] == [[], []]
    assert lab.counted(1, "packets", 0) == lab.counted(1, "packets", 1) == 0


@pytest.mark.parametrize("direction", [FROM, TO])
def test_reset_of_a_connection_that_a_new_policy_rejects(lab: Lab, direction: int) -> None:
    wires = guarded(lab)
    ports = (1111, 2222) if direction == FROM else (2222, 1111)
    key = frames.address(GUEST) + frames.address(PEER) + struct.pack("!HHBBBB", 1111, 2222, TCP, 0, 0, 0)
    entry = MODEL.ct_entry(word=5 << 32 | MODEL.CT_ESTABLISHED, id=5, judged=1)
    table = lab.switch.inner("conntracks", 1, "ct_table", 64)
    table.update(key, bytes(entry))
    segment = struct.pack("!HHIIBBHHH", *ports, 1000, 77, 5 << 4, ACK, 1024, 0, 0) + b"data"
    wires[direction].send(finished(wrap(direction, False, TCP, segment), False, 16))
    body = verify(check_back(wires[direction].receive(), direction, False))
    assert struct.unpack("!HHIIBBHHH", body)[2:6] == (77, 0, 5 << 4, RST)
    assert table.keys() == []


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("direction", [FROM, TO])
@pytest.mark.parametrize("size", [0, 1, 300])
def test_unreachable(lab: Lab, direction: int, v6: bool, size: int) -> None:
    wires = guarded(lab, direction)
    sent = finished(wrap(direction, v6, UDP, frames.udp(1111, 2222, bytes(range(256))[:1] * size)), v6, 6)
    wires[direction].send(sent)
    body = verify(check_back(wires[direction].receive(), direction, v6))
    assert body[:2] == (b"\x01\x04" if v6 else b"\x03\x03")
    header = 40 if v6 else 20
    assert body[8 : 8 + header + 6] == sent[14 : 14 + header + 6]  # the datagram's headers but for its checksum
    assert len(body) == 8 + header + 8
    assert [wire.waiting() for wire in wires] == [[], []]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("direction", [FROM, TO])
def test_prohibited(lab: Lab, direction: int, v6: bool) -> None:
    wires = guarded(lab, direction)
    wires[direction].send(wrap(direction, v6, ICMP6 if v6 else ICMP, icmp(128 if v6 else 8, 0, 5, b"data")))
    body = verify(check_back(wires[direction].receive(), direction, v6))
    assert body[:2] == (b"\x01\x01" if v6 else b"\x03\x0d")


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("gso", [False, True])
def test_reset_of_a_segment_without_its_checksum(lab: Lab, v6: bool, gso: bool, offload: bool) -> None:
    wires = guarded(lab)
    if not offload:
        no_offload("near1")
    size = 4000 if gso else 0
    segment = struct.pack("!HHIIBBHHH", 1111, 2222, 1000, 77, 5 << 4, SYN, 1024, 0, 0) + bytes(size)
    frame = finished(wrap(FROM, v6, TCP, segment), v6, 16, complete=False)
    send_unfinished("far1", frame, 54 if v6 else 34, 16, (4 if v6 else 1, 1000) if gso else (0, 0))
    body = verify(check_back(wires[FROM].receive(), FROM, v6))
    assert struct.unpack("!HHIIBBHHH", body)[2:6] == (0, 1001 + size, 5 << 4, RST | ACK)


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("v6", [False, True])
def test_unreachable_for_a_datagram_without_its_checksum(lab: Lab, v6: bool, offload: bool) -> None:
    wires = guarded(lab)
    if not offload:
        no_offload("near1")
    frame = finished(wrap(FROM, v6, UDP, frames.udp(1111, 2222, b"payload")), v6, 6, complete=False)
    send_unfinished("far1", frame, 54 if v6 else 34, 6)
    body = verify(check_back(wires[FROM].receive(), FROM, v6))
    assert body[:2] == (b"\x01\x04" if v6 else b"\x03\x03")


def test_answer_has_the_tag_of_the_guest(lab: Lab) -> None:
    wires = guarded(lab, trunk=True)
    lab.switch.put("trunks", MODEL.trunk_key(slot=1, vid=7), 1)
    plain = finished(wrap(FROM, False, UDP, frames.udp(1111, 2222, bytes(30))), False, 6)
    wires[FROM].send(plain[:12] + struct.pack("!HH", 0x8100, 7) + plain[12:])
    answer = wires[FROM].receive()
    assert answer[12:16] == struct.pack("!HH", 0x8100, 7)
    verify(check_back(answer[:12] + answer[16:], FROM, False))


@pytest.mark.parametrize(
    ("proto", "body"),
    [
        (TCP, struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 5 << 4, RST, 0, 0, 0)),
        (TCP, struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 5 << 4, FIN | ACK, 0, 0, 0)),
        (ICMP, icmp(3, 3) + frames.ipv4(PEER, GUEST, UDP, frames.udp(1, 2))),
    ],
)
def test_no_answer_to_what_is_one(lab: Lab, proto: int, body: bytes) -> None:
    wires = guarded(lab)
    wires[FROM].send(wrap(FROM, False, proto, body))
    wait_for(lambda: lab.drops(1), "drop counted")
    assert wires[FROM].waiting() == []


def test_no_answer_to_a_group(lab: Lab) -> None:
    wires = guarded(lab)
    wires[FROM].send(frames.datagram(frames.BROADCAST, A, ip=(GUEST, "255.255.255.255")))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REJECT: 1}, "drop counted")
    assert wires[FROM].waiting() == []


def test_answers_are_limited(lab: Lab) -> None:
    wires = guarded(lab)
    frame = finished(wrap(FROM, False, UDP, frames.udp(1111, 2222)), False, 6)
    sent = 400
    with offloading("far1") as burst:
        for _ in range(sent):
            burst.send(bytes(10) + frame)
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REJECT: sent}, "drops counted")
    answers = len(wires[FROM].waiting())
    assert 64 <= answers < sent
