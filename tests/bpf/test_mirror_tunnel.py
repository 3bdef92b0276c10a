# SPDX-License-Identifier: GPL-2.0-only
"""Copies between hosts: to a port wherever it is, and to an address that takes VXLAN."""

from __future__ import annotations

import pytest

from .frames import SERVICE_VLAN, datagram, ethernet, mac
from .lab import UNDERLAY, UNDERLAY6, Lab, Wire, wait_for
from .mirrors import FROM, counted, cutter, known, mirror, to_port
from .model import MODEL
from .test_forward_tunnel import CHANNEL, FAR, REMOTE, THIRD, VNI, arrive, leave, left, overlay, redirected

A, B, M = mac(1), mac(2), mac(9)
NAME = (0xABC123, 0x5A5)
MARK = MODEL.MARK_COPY | NAME[1]
PASSED = MARK | MODEL.MARK_COPY_PASSED
EITHER = pytest.mark.parametrize("underlay", [UNDERLAY, UNDERLAY6], ids=["IPv4", "IPv6"])


def mirrored(lab: Lab, underlay: tuple[str, str] = UNDERLAY) -> tuple[Wire, Wire, Wire]:
    """(the underlay, A whose port 1 is to be mirrored, B beside it)."""
    outside = lab.tunnel()
    lab.host(FAR, underlay[1])
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_PORT, 2, 0)])
    guests = lab.port(1, A), lab.port(2, B)
    lab.place(B, MODEL.L2_PORT, 2)
    return outside, *guests


@EITHER
def test_an_address_gets_copies_with_the_mirrors_id(lab: Lab, underlay: tuple[str, str]) -> None:
    outside, a, b = mirrored(lab, underlay)
    mirror(lab, 1, output=MODEL.MIRROR_TUNNEL, id=77, remote=underlay[1])
    a.send(datagram(B, A, b"there"))
    assert leave(outside) == (underlay[1], 77, 0, datagram(B, A, b"there"))
    assert b.receive() == datagram(B, A, b"there")
    assert left(outside) == []
    assert counted(lab, 1) == (1, 60, 0)


def test_a_copy_for_elsewhere_is_cut_too(lab: Lab) -> None:
    cutter(lab)
    outside, a, _ = mirrored(lab)
    mirror(lab, 1, output=MODEL.MIRROR_TUNNEL, id=77, remote=UNDERLAY[1], snap=64)
    frame = datagram(B, A, bytes(range(200)))
    a.send(frame)
    assert leave(outside) == (UNDERLAY[1], 77, 0, frame[:64])


def test_a_port_at_another_host_is_named_in_the_copy(lab: Lab) -> None:
    outside, a, _ = mirrored(lab)
    to_port(lab, 1, NAME, remote=UNDERLAY[1])
    a.send(datagram(B, A))
    assert leave(outside) == (UNDERLAY[1], NAME[0], MARK, datagram(B, A))


def test_a_port_that_is_here_after_all_is_nearer(lab: Lab) -> None:
    """The word of where it is comes later than it."""
    outside, a, _ = mirrored(lab)
    monitor = lab.port(3, M)
    known(lab, NAME, 3)
    to_port(lab, 1, NAME, remote=UNDERLAY[1])
    a.send(datagram(B, A))
    assert monitor.receive() == datagram(B, A)
    assert left(outside) == []


def test_a_copy_arrives_past_the_policy_of_its_port(lab: Lab) -> None:
    outside, _, b = mirrored(lab)
    monitor = lab.port(3, M, flags=0)
    known(lab, NAME, 3)
    arrive(outside, UNDERLAY, NAME[0], MARK, datagram(B, A))
    assert monitor.receive() == datagram(B, A)
    assert b.waiting() == [] and lab.placed(A) is None  # it is no traffic of a network: nothing is learned of it


def test_a_copy_goes_after_a_port_that_moved_on(lab: Lab) -> None:
    outside, a, _ = mirrored(lab)
    lab.host(THIRD, "192.0.2.3")
    lab.neighbour("192.0.2.3")
    gone = redirected(lab, 3, M, remote=THIRD)
    known(lab, NAME, 3)
    arrive(outside, UNDERLAY, NAME[0], MARK, datagram(B, A, b"elsewhere"))
    assert leave(outside) == ("192.0.2.3", NAME[0], PASSED, datagram(B, A, b"elsewhere"))
    to_port(lab, 1, NAME, directions=FROM)
    a.send(datagram(B, A, b"from here"))
    assert leave(outside) == ("192.0.2.3", NAME[0], PASSED, datagram(B, A, b"from here"))
    assert gone.waiting() == []


def test_a_copy_is_sent_on_once(lab: Lab) -> None:
    """Two hosts that each believe that the other one has the port."""
    outside, _, _ = mirrored(lab)
    redirected(lab, 3, M)
    known(lab, NAME, 3)
    arrive(outside, UNDERLAY, NAME[0], PASSED, datagram(B, A))
    wait_for(lambda: lab.drops(0) == {MODEL.DROP_MIRROR: 1}, "drop counted")
    assert left(outside) == []


def test_a_copy_that_came_after_its_port_is_delivered(lab: Lab) -> None:
    outside, _, _ = mirrored(lab)
    monitor = lab.port(3, M)
    known(lab, NAME, 3)
    arrive(outside, UNDERLAY, NAME[0], PASSED, datagram(B, A))
    assert monitor.receive() == datagram(B, A)


@pytest.mark.parametrize("name", [(NAME[0] + 1, NAME[1]), (NAME[0], NAME[1] + 1)], ids=["id", "mark"])
def test_a_copy_for_a_port_that_is_not_here(lab: Lab, name: tuple[int, int]) -> None:
    outside, _, _ = mirrored(lab)
    monitor = lab.port(3, M)
    known(lab, NAME, 3)
    arrive(outside, UNDERLAY, name[0], MODEL.MARK_COPY | name[1], datagram(B, A))
    wait_for(lambda: lab.drops(0) == {MODEL.DROP_MIRROR: 1}, "drop counted")
    assert monitor.waiting() == []


def test_a_copy_from_a_stranger(lab: Lab) -> None:
    outside, _, _ = mirrored(lab)
    monitor = lab.port(3, M)
    known(lab, NAME, 3)
    arrive(outside, ("192.0.2.1", "192.0.2.99"), NAME[0], MARK, datagram(B, A))
    wait_for(lambda: lab.drops(0) == {MODEL.DROP_TUNNEL_PEER: 1}, "drop counted")
    assert monitor.waiting() == []


def test_a_copy_is_no_redirect(lab: Lab) -> None:
    """Whatever its other bits are: nobody can reach a channel by them."""
    outside, _, _ = mirrored(lab)
    known(lab, (CHANNEL, MODEL.MARK_COPY_PORT), 3)
    monitor = lab.port(3, M)
    arrive(outside, UNDERLAY, CHANNEL, 0xFFFF, datagram(B, A))
    wait_for(lambda: sum(lab.drops(0).values()) == 1, "drop counted")
    assert lab.drops(0) == {MODEL.DROP_MIRROR: 1} and monitor.waiting() == []


def test_a_service_tag_is_no_vlan_that_can_be_chosen(lab: Lab) -> None:
    """It comes by an overlay; whoever mirrors all gets it, whoever chooses does not."""
    outside, a = overlay(lab)
    mirror(lab, 1, 0, output=MODEL.MIRROR_NONE, vlans=(0, 7))
    mirror(lab, 1, 1, output=MODEL.MIRROR_NONE)
    frame = ethernet(A, REMOTE, SERVICE_VLAN, b"\0\x07\x12\x34")
    arrive(outside, UNDERLAY, VNI, 0, frame)
    assert a.receive() == frame
    assert (counted(lab, 1, 0), counted(lab, 1, 1)) == ((0, 0, 0), (0, 0, 1))


# ---- ports that move ----


def test_what_waits_is_copied_when_it_passes(lab: Lab) -> None:
    """Held frames are judged, counted and copied once: where they go to the guest."""
    outside, a, b = mirrored(lab)
    hold = lab.tap(1, MODEL.DEVICE_HOLD_TO)
    lab.place(A, MODEL.L2_PORT, 1)
    lab.change_port(1, gate=MODEL.GATE_LOCAL | 1 << 8, hold_to=hold.ifindex)
    mirror(lab, 1, output=MODEL.MIRROR_TUNNEL, id=77, remote=UNDERLAY[1])
    b.send(datagram(A, B, b"waits"))
    wait_for(lambda: lab.counted(1, "held", 1) == 1, "the frame waits")
    assert left(outside) == []
    lab.change_port(1, gate=MODEL.GATE_LOCAL)
    waiting = hold.read()  # it was put there before it was counted
    assert waiting is not None
    hold.write(waiting)
    assert leave(outside) == (UNDERLAY[1], 77, 0, datagram(A, B, b"waits"))
    assert a.receive() == datagram(A, B, b"waits")
    assert left(outside) == []


def test_what_goes_after_the_vm_is_copied_there(lab: Lab) -> None:
    outside, _, b = mirrored(lab)
    redirected(lab, 3, M)
    lab.place(M, MODEL.L2_PORT, 3)
    mirror(lab, 3, output=MODEL.MIRROR_TUNNEL, id=77, remote=UNDERLAY[1])
    b.send(datagram(M, B))
    assert leave(outside) == (UNDERLAY[1], CHANNEL, MODEL.MARK_REDIRECT | MODEL.MARK_LOCAL, datagram(M, B))
    assert left(outside) == [] and counted(lab, 3) == (0, 0, 0)
