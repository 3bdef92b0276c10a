# SPDX-License-Identifier: GPL-2.0-only
"""Between ports of one host: what leaves each wire, byte for byte, and what must not."""

from __future__ import annotations

from .frames import BROADCAST, datagram, mac
from .lab import Lab, wait_for
from .model import MODEL

A, B, C = mac(1), mac(2), mac(3)


def three_ports(lab: Lab, **fields: int) -> list:
    lab.network(1, [(MODEL.L2_PORT, slot, 0) for slot in (1, 2, 3)])
    return [lab.port(slot, mac(slot), **fields) for slot in (1, 2, 3)]


def test_unknown_unicast_floods_and_the_answer_does_not(lab: Lab) -> None:
    a, b, c = three_ports(lab)
    behind_a, behind_b = mac(0x11), mac(0x12)  # further MACs of the guests: places are learned
    there = datagram(behind_b, behind_a, b"there")
    a.send(there)
    assert b.receive() == there
    assert c.receive() == there
    back = datagram(behind_a, behind_b, b"back")
    b.send(back)
    assert a.receive() == back
    assert c.waiting() == []
    assert lab.placed(behind_a) == (MODEL.L2_PORT, 1)
    assert lab.placed(behind_b) == (MODEL.L2_PORT, 2)


def test_broadcast_reaches_all_but_its_sender(lab: Lab) -> None:
    a, b, c = three_ports(lab)
    frame = datagram(BROADCAST, A)
    a.send(frame)
    assert [b.receive(), c.receive()] == [frame, frame]
    assert [a.waiting(), b.waiting(), c.waiting()] == [[], [], []]


def test_counts_frames_and_bytes_on_both_sides(lab: Lab) -> None:
    a, b, _ = three_ports(lab)
    lab.place(B, MODEL.L2_PORT, 2)
    frames = [datagram(B, A, bytes(size)) for size in (10, 100, 1000)]
    for frame in frames:
        a.send(frame)
        assert b.receive() == frame
    size = sum(len(frame) for frame in frames)
    assert (lab.counted(1, "packets", 0), lab.counted(1, "bytes", 0)) == (3, size)
    assert (lab.counted(2, "packets", 1), lab.counted(2, "bytes", 1)) == (3, size)
    assert lab.drops(1) == lab.drops(2) == {}


def test_never_back_to_the_port_it_came_from(lab: Lab) -> None:
    a, b, c = three_ports(lab)
    lab.place(B, MODEL.L2_PORT, 1)
    a.send(datagram(B, A))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_LOOP: 1}, "drop counted")
    assert [a.waiting(), b.waiting(), c.waiting()] == [[], [], []]


def test_a_gso_frame_counts_as_its_segments(lab: Lab) -> None:
    a, b, _ = three_ports(lab)
    ifindex = lab.switch.get("ports", "port", 1).ifindex
    lab.place(B, MODEL.L2_PORT, 2)
    frame = datagram(B, A, bytes(3500))
    run = lab.switch.run("from_port", frame, ifindex, gso_size=1000)
    assert run.verdict == 7
    headers = 14 + 20 + 8
    assert (lab.counted(1, "packets", 0), lab.counted(1, "bytes", 0)) == (4, 3500 + 4 * headers)
    assert a.waiting() == b.waiting() == []


def test_a_device_goes_to_another_port_at_once(lab: Lab) -> None:
    """In the agent's order: taken from the port, given in `devices`, told to the other port."""
    lab.network(1)
    lab.port(1, A)
    lab.place(B, MODEL.L2_PORT, 2)
    lab.set_port(2, B, ifindex=lab.veth()[0])
    lab.set_port(3, C)
    ifindex = lab.switch.get("ports", "port", 1).ifindex
    lab.switch.run("from_port", datagram(B, A), ifindex, repeat=3)
    assert lab.counted(1, "packets", 0) == 3
    lab.change_port(1, ifindex=0)
    lab.switch.put("devices", ifindex, MODEL.device(slot=3, role=MODEL.DEVICE_PORT))
    lab.switch.run("from_port", datagram(B, C), ifindex)
    lab.change_port(3, ifindex=ifindex)
    lab.switch.run("from_port", datagram(B, C), ifindex, repeat=2)
    assert (lab.counted(1, "packets", 0), lab.counted(3, "packets", 0)) == (3, 3)
