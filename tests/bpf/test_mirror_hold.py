# SPDX-License-Identifier: GPL-2.0-only
"""Copies for a monitoring VM that is between two hosts wait as frames for it do, and come as copies."""

from __future__ import annotations

import struct

import pytest

from .frames import BROADCAST, SERVICE_VLAN, datagram, ethernet
from .lab import UNDERLAY, Lab, Tap, Wire, wait_for
from .mirrors import FROM, counted, known, to_port
from .model import MODEL
from .test_forward_tunnel import CHANNEL, FAR, REMOTE, VNI, arrive, leave, left, overlay
from .test_mirror import NAME, A, B, M, converse, trunk, two

SHUT = MODEL.GATE_LOCAL | 1 << 8
PAST = 1  # a ktime
MARK = MODEL.MARK_COPY | NAME[1]
AWAITS = MODEL.PORT_F_STATELESS | MODEL.PORT_F_AWAITS_SOURCE
RESERVED = 0x0FFF


def between_hosts(lab: Lab, **fields: int) -> tuple[Wire, Tap]:
    """Port 3 has no policy, takes copies, and its guest is not there just now: (its wire, its hold tap)."""
    monitor = lab.port(3, M, **({"flags": 0, "gate": SHUT} | fields))
    hold = lab.tap(3, MODEL.DEVICE_HOLD_TO)
    lab.change_port(3, hold_to=hold.ifindex)
    known(lab, NAME, 3)
    return monitor, hold


def waiting(hold: Tap, count: int) -> list[bytes]:
    """As they are in the tap."""
    found: list[bytes] = []

    def enough() -> bool:
        while frame := hold.read():
            found.append(frame)
        return len(found) >= count

    wait_for(enough, f"{count} copies wait")
    return found


@pytest.mark.parametrize("state", [MODEL.PORT_ACTIVE, MODEL.PORT_QUIESCED], ids=["held", "quiesced"])
def test_a_copy_waits_and_comes_whole_past_the_policy_and_in_order(lab: Lab, state: int) -> None:
    a, b = trunk(lab)
    monitor, hold = between_hosts(lab, state=state)
    to_port(lab, 1, NAME)
    a.send(datagram(B, A, vlan=7))
    assert b.receive() == datagram(B, A)
    b.send(datagram(A, B))
    assert a.receive() == datagram(A, B, vlan=7)
    held = waiting(hold, 2)
    assert monitor.waiting() == [] and counted(lab, 1)[::2] == (2, 0)
    lab.change_port(3, word=1 << 32 | MODEL.PORT_ACTIVE, gate=MODEL.GATE_LOCAL)
    newer = datagram(BROADCAST, A, b"newer")
    a.send(newer)  # the gate is open, and it waits behind them
    held += waiting(hold, 1)
    for frame in held:
        hold.write(frame)
    expected = [datagram(B, A, vlan=7), datagram(A, B, vlan=7), newer]
    assert [monitor.receive() for _ in expected] == expected
    assert lab.switch.get("ports", "port", 3).held_to == 0
    assert lab.drops(3) == {} and lab.counted(3, "packets", 1) == 0


def test_a_frame_that_waited_beside_copies_is_judged(lab: Lab) -> None:
    a, b = two(lab)
    monitor, hold = between_hosts(lab)
    lab.place(M, MODEL.L2_PORT, 3)
    to_port(lab, 1, NAME, directions=FROM)
    a.send(datagram(M, A, b"for the monitor"))
    held = waiting(hold, 2)
    lab.change_port(3, gate=MODEL.GATE_LOCAL)
    for frame in held:
        hold.write(frame)
    assert monitor.receive() == datagram(M, A, b"for the monitor")
    wait_for(lambda: sum(lab.drops(3).values()) == 1, "the frame itself has no rule that lets it pass")
    assert monitor.waiting() == [] and b.waiting() == []


def test_a_copy_goes_after_the_guest_as_judged(lab: Lab) -> None:
    outside = lab.tunnel()
    lab.host(FAR, UNDERLAY[1])
    a, _ = two(lab)
    _, hold = between_hosts(lab, state=MODEL.PORT_QUIESCED, channel=CHANNEL, remote=FAR)
    to_port(lab, 1, NAME, directions=FROM)
    a.send(datagram(B, A))
    (held,) = waiting(hold, 1)
    lab.change_port(3, gate=MODEL.GATE_REDIRECT)
    hold.write(held)
    assert leave(outside) == (UNDERLAY[1], CHANNEL, MODEL.MARK_REDIRECT | MODEL.MARK_JUDGED, datagram(B, A))
    assert left(outside) == []


def test_a_destination_gets_the_sources_copies_first(lab: Lab) -> None:
    """Those by itself wait; those that the source passes on do not."""
    outside = lab.tunnel()
    lab.host(FAR, UNDERLAY[1])
    a, b = two(lab)
    monitor, hold = between_hosts(lab, flags=AWAITS)
    to_port(lab, 1, NAME)
    converse(a, b)
    waiting(hold, 2)
    arrive(outside, UNDERLAY, NAME[0], MARK, datagram(B, A, b"by itself"))
    waiting(hold, 1)
    assert monitor.waiting() == [] and lab.drops(0) == {}
    arrive(outside, UNDERLAY, NAME[0], MARK | MODEL.MARK_COPY_PASSED, datagram(B, A, b"passed on"))
    assert monitor.receive() == datagram(B, A, b"passed on")


def test_a_copy_that_was_passed_on_waits_for_a_guest_that_goes_again(lab: Lab) -> None:
    outside = lab.tunnel()
    lab.host(FAR, UNDERLAY[1])
    lab.network(1, [])
    _, hold = between_hosts(lab)
    arrive(outside, UNDERLAY, NAME[0], MARK | MODEL.MARK_COPY_PASSED, datagram(B, A))
    waiting(hold, 1)


def test_a_copy_waits_for_nobody_whose_agent_is_dead(lab: Lab) -> None:
    a, b = two(lab)
    monitor, hold = between_hosts(lab, lease=PAST)
    to_port(lab, 1, NAME)
    assert list(converse(a, b)) == [monitor.receive(), monitor.receive()]
    assert hold.read() is None


def test_nobody_else_has_the_tag_of_a_copy_that_waits(lab: Lab) -> None:
    """Who could bring one into a hold would get past the policy. Other tags wait as they are."""
    outside, _ = overlay(lab)
    monitor, hold = between_hosts(lab)
    lab.place(M, MODEL.L2_PORT, 3)
    for tag in (RESERVED, 7):
        arrive(
            outside, UNDERLAY, VNI, 0, ethernet(M, REMOTE, SERVICE_VLAN, struct.pack("!HH", tag, 0x0800) + bytes(46))
        )
    (held,) = waiting(hold, 1)
    assert struct.unpack_from("!H", held, 14) == (7,)
    assert lab.drops(3) == {MODEL.DROP_VLAN: 1}
    lab.change_port(3, gate=MODEL.GATE_LOCAL)
    hold.write(held)
    wait_for(lambda: sum(lab.drops(3).values()) == 2, "it is judged")
    assert monitor.waiting() == []
