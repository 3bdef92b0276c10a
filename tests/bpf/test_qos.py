# SPDX-License-Identifier: GPL-2.0-only
"""Token buckets, code points and the way through the shaper: what leaves each wire."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from .frames import IPV4, IPV6, UDP, checksum, datagram, ethernet, ipv4, ipv6, mac, udp
from .lab import Lab, Wire, wait_for
from .model import MODEL
from .sysbpf import TCX_INGRESS

A, B = mac(1), mac(2)
SECOND = 1_000_000_000
FROM, TO = 0, 1


def ports(lab: Lab, **fields: int) -> list[Wire]:
    """Port 1 with fields of struct port, and port 2; each knows where the other is."""
    lab.network(1, [(MODEL.L2_PORT, slot, 0) for slot in (1, 2)])
    made = [lab.port(1, A, **fields), lab.port(2, B)]
    for slot in (1, 2):
        lab.place(mac(slot), MODEL.L2_PORT, slot)
    return made


def bucket(lab: Lab, direction: int, size: int, *, flags: int = 0, **fields: int) -> None:
    """Of port 1: `size` bytes, refilled by a byte a second."""
    rate = SECOND << MODEL.ABI_QOS_SHIFT
    given = {"flags": MODEL.QOS_F_LIMIT | flags, "interval": rate, "burst": size * SECOND} | fields
    lab.switch.put("qos", 2 + direction, MODEL.qos(**given))


def numbered(target: str, source: str, number: int, size: int = 100) -> bytes:
    return datagram(target, source, struct.pack("!I", number).ljust(size - 42, b"\0"))


@pytest.mark.parametrize(("direction", "feature"), [(FROM, "FEATURE_POLICE_FROM"), (TO, "FEATURE_POLICE_TO")])
@pytest.mark.parametrize(("flag", "reason"), [(0, "DROP_POLICED"), ("QOS_F_SHAPE", "DROP_SHAPE")])
def test_a_bucket_passes_its_size_and_no_more(
    lab: Lab, direction: int, feature: str, flag: int | str, reason: str
) -> None:
    a, b = ports(lab, features=getattr(MODEL, feature))
    bucket(lab, direction, 350, flags=getattr(MODEL, str(flag), 0))
    sender, receiver, target, source = (a, b, B, A) if direction == FROM else (b, a, A, B)
    for number in range(5):
        sender.send(numbered(target, source, number))
    wait_for(lambda: lab.drops(1) == {getattr(MODEL, reason): 2}, "two are dropped")
    assert receiver.waiting() == [numbered(target, source, number) for number in range(3)]
    found = lab.switch.get("qos", "qos", 2 + direction)
    assert (found.dropped_packets, found.dropped_bytes) == (2, 200)
    assert lab.counted(1, "packets", direction) == 3


def test_the_other_direction_and_other_ports_are_free(lab: Lab) -> None:
    a, b = ports(lab, features=MODEL.FEATURE_POLICE_FROM)
    bucket(lab, FROM, 50)
    lab.switch.put("qos", 3, lab.switch.get("qos", "qos", 2))  # of the direction whose bit is not set
    for number in range(3):
        b.send(numbered(A, B, number))
        assert a.receive() == numbered(A, B, number)


def test_a_debt_is_paid_by_time(lab: Lab) -> None:
    a, b = ports(lab, features=MODEL.FEATURE_POLICE_FROM)
    bucket(lab, FROM, 350, due=time.monotonic_ns() + 3600 * SECOND)
    a.send(numbered(B, A, 1))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_POLICED: 1}, "nothing is in the bucket")
    bucket(lab, FROM, 350, due=time.monotonic_ns() - 3600 * SECOND)  # and more than full it is never
    for number in range(5):
        a.send(numbered(B, A, number))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_POLICED: 3}, "a full one has three")
    assert b.waiting() == [numbered(B, A, number) for number in range(3)]


def test_a_frame_larger_than_the_bucket_needs_a_full_one(lab: Lab) -> None:
    a, b = ports(lab, features=MODEL.FEATURE_POLICE_FROM)
    bucket(lab, FROM, 350)
    a.send(numbered(B, A, 1, 1000))
    assert b.receive() == numbered(B, A, 1, 1000)
    bucket(lab, FROM, 350)
    a.send(numbered(B, A, 2))
    a.send(numbered(B, A, 3, 1000))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_POLICED: 1}, "a part of it is gone")
    assert b.waiting() == [numbered(B, A, 2)]


def test_a_gso_frame_costs_what_its_segments_are(lab: Lab) -> None:
    ports(lab, features=MODEL.FEATURE_POLICE_FROM)
    bucket(lab, FROM, 10_000, interval=SECOND // 1000 << MODEL.ABI_QOS_SHIFT)
    ifindex = lab.switch.get("ports", "port", 1).ifindex
    before = time.monotonic_ns()
    assert lab.switch.run("from_port", datagram(B, A, bytes(3500)), ifindex, gso_size=1000).verdict == 7
    due = lab.switch.get("qos", "qos", 2).due
    bytes_taken = 3500 + 4 * (14 + 20 + 8)
    assert 0 <= due - bytes_taken * SECOND // 1000 - before <= time.monotonic_ns() - before


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("tos", [0x03, 0x88])
def test_marks_the_code_point_and_keeps_congestion_bits(lab: Lab, family: int, tos: int) -> None:
    a, b = ports(lab, features=MODEL.FEATURE_POLICE_FROM)
    lab.switch.put("qos", 2, MODEL.qos(flags=MODEL.QOS_F_MARK, dscp=34))

    def frame(traffic_class: int) -> bytes:
        body = udp(1000, 2000, b"x" * 40)
        if family == 6:
            packet = ipv6("2001:db8::1", "2001:db8::2", UDP, body)
            return ethernet(B, A, IPV6, struct.pack("!I", 6 << 28 | traffic_class << 20) + packet[4:])
        packet = ipv4("10.0.0.1", "10.0.0.2", UDP, body)
        head = packet[:1] + bytes([traffic_class]) + packet[2:10] + b"\0\0" + packet[12:20]
        return ethernet(B, A, IPV4, head[:10] + struct.pack("!H", checksum(head)) + head[12:] + packet[20:])

    a.send(frame(tos))
    assert b.receive() == frame(34 << 2 | tos & 3)


def test_what_is_no_ip_is_not_marked(lab: Lab) -> None:
    a, b = ports(lab, features=MODEL.FEATURE_POLICE_FROM)
    lab.switch.put("qos", 2, MODEL.qos(flags=MODEL.QOS_F_MARK, dscp=34))
    frame = ethernet(B, A, 0x88B5, bytes(range(50)))
    a.send(frame)
    assert b.receive() == frame


# ---- through the shaper ----


def shaper(lab: Lab) -> tuple[int, int]:
    """(device that frames wait in, the one behind it), with the program there."""
    near, far = lab.veth()
    far.close()
    behind = socket.if_nametoindex(socket.if_indextoname(near).replace("near", "far"))
    lab.attach("from_shaper", behind, TCX_INGRESS)
    lab.switch.put("devices", behind, MODEL.device(slot=0, role=MODEL.DEVICE_SHAPER))
    return near, behind


def shaped(lab: Lab, **fields: int) -> list[Wire]:
    made = ports(lab, features=MODEL.FEATURE_POLICE_FROM | MODEL.FEATURE_SHAPE, **fields)
    bucket(lab, FROM, 10_000, flags=MODEL.QOS_F_SHAPE, shaper=shaper(lab)[0], priority=5)
    return made


def test_a_shaped_frame_goes_the_same_way(lab: Lab) -> None:
    a, b = shaped(lab)
    for number in range(20):
        a.send(numbered(B, A, number))
        assert b.receive() == numbered(B, A, number)
    assert lab.counted(1, "packets", FROM) == lab.counted(2, "packets", TO) == 20
    assert lab.drops(1) == {}


def test_a_shaped_frame_keeps_its_tag_and_finds_its_network(lab: Lab) -> None:
    a, b = shaped(lab, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRUNK)
    lab.network(2, [])
    lab.switch.put("trunks", MODEL.trunk_key(slot=1, vid=7), 2)
    lab.place(B, MODEL.L2_PORT, 2, network=2)
    a.send(datagram(B, A, b"tagged", vlan=7))
    assert b.receive() == datagram(B, A, b"tagged")
    a.send(datagram(B, A, b"elsewhere", vlan=8))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_VLAN: 1}, "a tag that is not the port's")


def test_a_tag_that_was_taken_from_the_port_while_it_waited(lab: Lab) -> None:
    shaped(lab, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRUNK)
    frame = datagram(B, A, b"late", vlan=8)
    run = lab.switch.run("from_shaper", frame, socket.if_nametoindex("far3"), mark=MODEL.ABI_QOS_CLASS | 1)
    assert (run.verdict, lab.drops(1)) == (2, {MODEL.DROP_VLAN: 1})


def test_where_it_goes_is_looked_up_behind_the_shaper(lab: Lab) -> None:
    """What has waited while its destination moved goes to the new place."""
    a, b = shaped(lab)
    behind = socket.if_nametoindex("far3")
    frame = numbered(B, A, 1)
    mark = MODEL.ABI_QOS_CLASS | 1
    lab.place(B, MODEL.L2_PORT, 1)  # back to where it came from
    lab.switch.run("from_shaper", frame, behind, mark=mark)
    assert lab.drops(1) == {MODEL.DROP_LOOP: 1}
    assert a.waiting() == b.waiting() == []


@pytest.mark.parametrize(
    ("state", "gate", "passes"),
    [
        ("PORT_ACTIVE", "GATE_LOCAL", True),
        ("PORT_QUIESCED", "GATE_LOCAL", True),
        ("PORT_QUIESCED", "GATE_REDIRECT", False),
        ("PORT_STUB", "GATE_REDIRECT", False),
    ],
)
def test_frames_of_a_guest_that_has_left_end_behind_the_shaper(lab: Lab, state: str, gate: str, passes: bool) -> None:
    shaped(lab)
    flags, states = MODEL.PORT_F_STATELESS, getattr(MODEL, state)
    lab.change_port(1, word=1 << 32 | flags << 8 | states, gate=getattr(MODEL, gate))
    run = lab.switch.run("from_shaper", numbered(B, A, 1), socket.if_nametoindex("far3"), mark=MODEL.ABI_QOS_CLASS | 1)
    assert run.verdict == (7 if passes else 2)
    assert lab.drops(1) == ({} if passes else {MODEL.DROP_SHAPE: 1})


@pytest.mark.parametrize("mark", [5, 0x6D710000, 0x6D71FFFF])
def test_a_frame_that_no_port_sent_ends_behind_the_shaper(lab: Lab, mark: int) -> None:
    shaped(lab)
    run = lab.switch.run("from_shaper", numbered(B, A, 1), socket.if_nametoindex("far3"), mark=mark)
    assert (run.verdict, lab.drops(0)) == (2, {MODEL.DROP_NO_PORT: 1})
