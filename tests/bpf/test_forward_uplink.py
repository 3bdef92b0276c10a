# SPDX-License-Identifier: GPL-2.0-only
"""Between ports and a physical interface, which stays the host's own."""

from __future__ import annotations

import socket

import pytest

from .frames import BROADCAST, datagram, mac
from .harness import Switch
from .lab import Lab, Wire, wait_for
from .model import MODEL
from .sysbpf import TCX_INGRESS

A, B, OUTSIDE, OTHER, HOST = mac(1), mac(2), mac(0x77), mac(0x78), mac(0x99)
PASS, SHOT, REDIRECT = 0, 2, 7


def on_uplink(lab: Lab, vid: int, **fields: int) -> tuple[int, Wire, Wire]:
    """An uplink with one network on it and port 1: (ifindex, the outside, the guest)."""
    uplink, outside = lab.uplink(HOST)
    members = [(MODEL.L2_PORT, 1, 0), (MODEL.L2_UPLINK, uplink, 0)]
    if not vid:
        members.append((MODEL.L2_HOST, uplink, 0))
        lab.place(HOST, MODEL.L2_HOST, uplink, flags=MODEL.L2_F_STATIC)
    lab.network(1, members, kind=MODEL.NETWORK_UPLINK, uplink=uplink, vid=vid, **fields)
    lab.vlan(uplink, vid, 1)
    return uplink, outside, lab.port(1, A)


@pytest.mark.parametrize("vid", [0, 100])
def test_there_and_back(lab: Lab, vid: int) -> None:
    uplink, outside, a = on_uplink(lab, vid)
    a.send(datagram(OUTSIDE, A, b"unknown"))
    assert outside.receive() == datagram(OUTSIDE, A, b"unknown", vlan=vid)
    outside.send(datagram(A, OUTSIDE, b"answer", vlan=vid))
    assert a.receive() == datagram(A, OUTSIDE, b"answer")
    assert lab.placed(OUTSIDE) == (MODEL.L2_UPLINK, uplink)
    a.send(datagram(OUTSIDE, A, b"known"))
    assert outside.receive() == datagram(OUTSIDE, A, b"known", vlan=vid)
    assert a.waiting() == outside.waiting() == []


@pytest.mark.parametrize("vid", [0, 100])
def test_what_came_in_never_goes_out_again(lab: Lab, vid: int) -> None:
    uplink, outside, a = on_uplink(lab, vid)
    outside.send(datagram(BROADCAST, OUTSIDE, vlan=vid))
    assert a.receive() == datagram(BROADCAST, OUTSIDE)
    lab.place(OTHER, MODEL.L2_UPLINK, uplink)
    outside.send(datagram(OTHER, OUTSIDE, vlan=vid))
    outside.send(datagram(A, OUTSIDE, b"last", vlan=vid))
    assert a.receive() == datagram(A, OUTSIDE, b"last")
    assert outside.waiting() == []


def test_frames_of_no_network_pass_up(lab: Lab) -> None:
    uplink, _, a = on_uplink(lab, 100)
    for frame in (datagram(A, OUTSIDE), datagram(A, OUTSIDE, vlan=101)):
        assert lab.switch.run("from_uplink", frame, uplink).verdict == PASS
    assert a.waiting() == []


def test_the_host_gets_its_own_and_the_broadcast_of_an_untagged_network(lab: Lab) -> None:
    uplink, _, a = on_uplink(lab, 0)
    assert lab.switch.run("from_uplink", datagram(HOST, OUTSIDE), uplink).verdict == PASS
    assert lab.switch.run("from_uplink", datagram(BROADCAST, OUTSIDE), uplink).verdict == PASS
    assert a.receive() == datagram(BROADCAST, OUTSIDE)
    lab.place(A, MODEL.L2_PORT, 1)
    assert lab.switch.run("from_uplink", datagram(A, OUTSIDE), uplink).verdict == REDIRECT
    assert a.waiting() == []


def test_a_tagged_frame_ends_in_the_switch(lab: Lab) -> None:
    uplink, _, a = on_uplink(lab, 100)
    assert lab.switch.run("from_uplink", datagram(BROADCAST, OUTSIDE, vlan=100), uplink).verdict == SHOT
    assert a.receive() == datagram(BROADCAST, OUTSIDE)
    lab.place(A, MODEL.L2_PORT, 1)
    run = lab.switch.run("from_uplink", datagram(A, OUTSIDE, vlan=100), uplink)
    assert (run.verdict, run.frame) == (REDIRECT, datagram(A, OUTSIDE))


def test_a_guest_reaches_the_host_behind_the_uplink(lab: Lab) -> None:
    uplink, outside, a = on_uplink(lab, 0)
    host = Wire(socket.if_indextoname(uplink))
    try:
        a.send(datagram(HOST, OTHER, b"to the host"))
        assert host.receive() == datagram(HOST, OTHER, b"to the host")
        a.send(datagram(BROADCAST, OTHER, b"to all"))
        assert host.receive() == datagram(BROADCAST, OTHER, b"to all")
    finally:
        host.close()
    assert outside.receive() == datagram(BROADCAST, OTHER, b"to all")
    assert outside.waiting() == []
    assert lab.placed(OTHER) == (MODEL.L2_PORT, 1)  # the uplink's program saw it and learned nothing from it


def test_a_frame_too_large_for_the_network_is_dropped(lab: Lab) -> None:
    _, outside, a = on_uplink(lab, 100, mtu=1000)
    fits = datagram(OUTSIDE, A, bytes(1000 - 28))
    a.send(datagram(OUTSIDE, A, bytes(1000 - 27)))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_MTU: 1}, "drop counted")
    a.send(fits)
    assert outside.receive() == datagram(OUTSIDE, A, bytes(1000 - 28), vlan=100)


def test_control_frames_of_the_link_end_here(lab: Lab) -> None:
    uplink, outside, a = on_uplink(lab, 0)
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_PORT, 2, 0), (MODEL.L2_UPLINK, uplink, 0)], uplink=uplink)
    b = lab.port(2, B)
    spanning_tree, beyond = "01:80:c2:00:00:00", "01:80:c2:00:00:10"
    assert lab.switch.run("from_uplink", datagram(spanning_tree, OUTSIDE), uplink).verdict == PASS  # the host's own
    a.send(datagram(spanning_tree, A))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_UNKNOWN_UNICAST: 1}, "drop counted")
    a.send(datagram(beyond, A))
    assert [b.receive(), outside.receive()] == [datagram(beyond, A)] * 2
    assert a.waiting() == b.waiting() == outside.waiting() == []


def test_learning_moves_what_was_learned_and_not_what_is_pinned(lab: Lab) -> None:
    uplink, outside, a = on_uplink(lab, 100)
    dirty = lab.switch.inner("dirty", 1, "dirty_set")
    lab.place(B, MODEL.L2_PORT, 1, flags=MODEL.L2_F_LOCATION)
    lab.place(OTHER, MODEL.L2_PORT, 1)
    for source in (B, OTHER):
        outside.send(datagram(A, source, vlan=100))
        assert a.receive() == datagram(A, source)
    assert lab.placed(B) == (MODEL.L2_PORT, 1)
    assert lab.placed(OTHER) == (MODEL.L2_UPLINK, uplink)
    keys = [MODEL.ct_key.from_buffer_copy(key) for key, _ in dirty.items()]
    assert [(key.type, bytes(key.laddr)[:6].hex(":"), key.raddr[0]) for key in keys] == [(MODEL.CT_TYPE_L2, OTHER, 1)]


def test_an_unknown_device_is_no_port(switch: Switch, lab: Lab) -> None:
    ifindex, _ = lab.veth()
    lab.attach("from_port", ifindex, TCX_INGRESS)
    for program in ("from_port", "to_port", "from_hold"):
        assert switch.run(program, datagram(A, B), ifindex).verdict == SHOT
    assert lab.drops(0) == {MODEL.DROP_NO_PORT: 3}
