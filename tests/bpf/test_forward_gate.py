# SPDX-License-Identifier: GPL-2.0-only
"""The gate of a port: hold in order, open, redirect, leases; and the guest's first frame that opens a staged port."""

from __future__ import annotations

import time

import pytest

from .frames import BROADCAST, datagram, mac, rarp
from .lab import Lab, Tap, Wire, wait_for
from .model import MODEL

A, B, OTHER = mac(1), mac(2), mac(3)
SHUT = MODEL.GATE_LOCAL | 1 << 8
PAST = 1  # a ktime


def numbered(count: int, target: str = B, source: str = A) -> list[bytes]:
    return [datagram(target, source, b"frame %d" % number) for number in range(count)]


def two_ports(lab: Lab, **fields: int) -> tuple[Wire, Wire]:
    """Port 1 as any, port 2 with the fields given; both in the flood list of network 1."""
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_PORT, 2, 0)])
    lab.place(A, MODEL.L2_PORT, 1, flags=MODEL.L2_F_LOCATION)
    lab.place(B, MODEL.L2_PORT, 2, flags=MODEL.L2_F_LOCATION)
    return lab.port(1, A), lab.port(2, B, **fields)


def held(lab: Lab, slot: int = 2) -> tuple[int, int]:
    port = lab.switch.get("ports", "port", slot)
    return port.held_to, port.held_from


def read_all(tap: Tap, count: int) -> list[bytes]:
    frames: list[bytes] = []

    def enough() -> bool:
        while frame := tap.read():
            frames.append(frame)
        return len(frames) >= count

    wait_for(enough, f"{count} frames in the tap")
    return frames


def test_a_shut_gate_holds_and_gives_back_in_order(lab: Lab) -> None:
    a, b = two_ports(lab, gate=SHUT)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex)
    frames = numbered(5)
    for frame in frames:
        a.send(frame)
    waiting = read_all(tap, 5)
    assert waiting == frames
    assert held(lab) == (5, 0)
    assert lab.counted(2, "held", 1) == 5
    lab.change_port(2, gate=MODEL.GATE_LOCAL)
    for number, frame in enumerate(waiting):
        late = datagram(B, A, b"behind %d" % number)
        a.send(late)  # the gate is open, but frames wait: it must not overtake them
        frames.append(late)
        tap.write(frame)
    for frame in read_all(tap, 5):
        tap.write(frame)
    wait_for(lambda: held(lab) == (0, 0), "nothing held")
    assert [b.receive() for _ in frames] == frames
    a.send(datagram(B, A, b"now"))
    assert b.receive() == datagram(B, A, b"now")
    assert tap.read() is None


def test_held_broadcast_passes_when_it_is_given_back(lab: Lab) -> None:
    a, b = two_ports(lab, gate=SHUT, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_NO_BROADCAST)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex)
    a.send(datagram(BROADCAST, A))
    (frame,) = read_all(tap, 1)
    lab.change_port(2, gate=MODEL.GATE_LOCAL)
    tap.write(frame)
    assert b.receive() == datagram(BROADCAST, A)


def test_without_a_hold_tap_the_frame_is_dropped_and_counted(lab: Lab) -> None:
    a, _ = two_ports(lab, gate=SHUT)
    a.send(datagram(B, A))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_NO_HOLD: 1}, "drop counted")
    lab.change_port(2, hold_to=999_999)
    a.send(datagram(B, A))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_NO_HOLD: 1, MODEL.DROP_HOLD_FULL: 1}, "drop counted")
    assert held(lab) == (0, 0)


def test_rule_a_hold_is_bounded(lab: Lab) -> None:
    a, _ = two_ports(lab, gate=SHUT)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex, held_to=MODEL.HOLD_FRAMES - 1)
    for frame in numbered(2):
        a.send(frame)
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_HOLD_FULL: 1}, "drop counted")
    assert held(lab) == (MODEL.HOLD_FRAMES, 0)
    assert read_all(tap, 1) == numbered(1)


def test_a_hold_tap_takes_as_many_as_the_bound(lab: Lab) -> None:
    _, _ = two_ports(lab, gate=SHUT)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    port = lab.switch.get("ports", "port", 1)
    lab.change_port(2, hold_to=tap.ifindex)
    lab.switch.run("from_port", datagram(B, A), port.ifindex, repeat=MODEL.HOLD_FRAMES + 100)
    assert held(lab) == (MODEL.HOLD_FRAMES, 0)
    assert lab.drops(2) == {MODEL.DROP_HOLD_FULL: 100}
    assert len(read_all(tap, MODEL.HOLD_FRAMES)) == MODEL.HOLD_FRAMES


def test_rule_no_place_no_frame(lab: Lab) -> None:
    a, b = two_ports(lab, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE)
    a.send(datagram(BROADCAST, A))
    a.send(datagram(OTHER, A))
    a.send(datagram(B, A))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_NO_PLACE: 1}, "only the unicast for it counts")
    assert b.waiting() == []


def test_a_port_that_is_not_active_lets_nothing_to_its_guest(lab: Lab) -> None:
    for state in (MODEL.PORT_STAGED, MODEL.PORT_QUIESCED, MODEL.PORT_STUB):
        lab.set_port(2, B, state=state, ifindex=1)
        lab.switch.put("devices", 1, MODEL.device(slot=2, role=MODEL.DEVICE_PORT))
        assert lab.switch.run("to_port", datagram(B, A), 1).verdict == 2
    assert lab.drops(2) == {MODEL.DROP_NOT_ACTIVE: 3}
    assert lab.counted(2, "packets", 1) == 0


def test_just_opened_takes_no_native_broadcast(lab: Lab) -> None:
    a, b = two_ports(lab, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_NO_BROADCAST)
    a.send(datagram(BROADCAST, A))
    a.send(datagram(B, A))
    assert b.receive() == datagram(B, A)
    assert lab.drops(2) == {MODEL.DROP_BROADCAST_PATH: 1}


def test_what_comes_by_itself_waits_for_the_source(lab: Lab) -> None:
    """Just moved here: only what the source passes on goes past the gate; the rest follows it, broadcast does not."""
    flags = MODEL.PORT_F_STATELESS | MODEL.PORT_F_AWAITS_SOURCE | MODEL.PORT_F_NO_BROADCAST
    a, b = two_ports(lab, gate=SHUT, flags=flags)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex)
    a.send(datagram(B, A, b"by itself"))
    a.send(datagram(BROADCAST, A))
    (waiting,) = read_all(tap, 1)
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_BROADCAST_PATH: 1}, "broadcast is the source's business")
    lab.change_port(2, hold_to=0)
    tap.write(datagram(B, A, b"held at the source"))  # as it comes by the channel: moved
    assert b.receive() == datagram(B, A, b"held at the source")
    tap.write(waiting)
    assert b.receive() == datagram(B, A, b"by itself")


def test_a_port_that_opens_takes_no_native_broadcast(lab: Lab) -> None:
    """Its gate is there before its state: the source has held the same frame, which would come twice."""
    flags = MODEL.PORT_F_STATELESS | MODEL.PORT_F_AWAITS_SOURCE | MODEL.PORT_F_NO_BROADCAST
    a, _ = two_ports(lab, state=MODEL.PORT_STAGED, gate=SHUT, flags=flags)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex)
    a.send(datagram(BROADCAST, A))
    a.send(datagram(B, A))
    assert read_all(tap, 1) == [datagram(B, A)]
    assert lab.drops(2) == {MODEL.DROP_BROADCAST_PATH: 1}


def test_a_source_that_is_dead_keeps_nothing_waiting(lab: Lab) -> None:
    a, b = two_ports(lab, gate=SHUT, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_AWAITS_SOURCE, lease=PAST)
    a.send(datagram(B, A))
    assert b.receive() == datagram(B, A)


@pytest.mark.parametrize("gate", [SHUT, MODEL.GATE_REDIRECT | 1 << 8], ids=["local", "redirect"])
@pytest.mark.parametrize("state", [MODEL.PORT_ACTIVE, MODEL.PORT_QUIESCED], ids=["active", "quiesced"])
@pytest.mark.parametrize("lease", [PAST, 0], ids=["passed", "none"])
def test_a_lease_ends_a_hold(lab: Lab, lease: int, state: int, gate: int) -> None:
    """An agent that died before it stopped the guest leaves it its network; any other hold ends in drops."""
    a, b = two_ports(lab, gate=gate, state=state, lease=lease)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex)
    a.send(datagram(B, A))
    if not lease:
        assert read_all(tap, 1) == [datagram(B, A)]
    elif (state, gate) == (MODEL.PORT_ACTIVE, SHUT):
        assert b.receive() == datagram(B, A)
    else:
        wait_for(lambda: lab.drops(2) == {MODEL.DROP_LEASE: 1}, "drop counted")


def test_what_is_given_back_is_no_matter_of_the_lease(lab: Lab) -> None:
    """It waited while the lease held; the agent that gives it back is there."""
    _, b = two_ports(lab, gate=SHUT, lease=PAST)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex, held_to=1)
    tap.write(datagram(B, A))
    assert b.receive() == datagram(B, A)
    wait_for(lambda: held(lab) == (0, 0), "nothing waits")


def test_a_lease_says_nothing_of_an_open_port(lab: Lab) -> None:
    a, b = two_ports(lab, lease=PAST)
    a.send(datagram(B, A))
    assert b.receive() == datagram(B, A)
    b.send(datagram(A, B))
    assert a.receive() == datagram(A, B)


@pytest.mark.parametrize("state", [MODEL.PORT_STAGED, MODEL.PORT_QUIESCED])
def test_a_port_that_is_to_open_holds_what_its_guest_sends(lab: Lab, state: int) -> None:
    """The guest runs before the commit, or again at the source before its agent knows."""
    a, b = two_ports(lab, state=state, gate=MODEL.GATE_NONE, epoch=7)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_FROM)
    lab.change_port(2, hold_from=tap.ifindex, lease=time.monotonic_ns() + 10**11)
    frames = numbered(3, A, B)
    for frame in frames:
        b.send(frame)
    waiting = read_all(tap, 3)
    assert (waiting, held(lab), lab.counted(2, "held", 0)) == (frames, (0, 3), 3)
    port = lab.switch.get("ports", "port", 2)
    lab.change_port(2, word=port.word & ~0xFF | MODEL.PORT_ACTIVE, gate=MODEL.GATE_LOCAL)
    late = datagram(A, B, b"late")
    b.send(late)  # queues behind
    for frame in waiting + read_all(tap, 1):
        tap.write(frame)
    assert [a.receive() for _ in range(4)] == [*frames, late]
    wait_for(lambda: held(lab) == (0, 0), "nothing held")
    assert lab.counted(2, "packets", 0) == 4


def test_a_staged_port_whose_lease_passed_drops(lab: Lab) -> None:
    _, b = two_ports(lab, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE, lease=PAST)
    b.send(datagram(A, B))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_LEASE: 1}, "drop counted")


def test_a_stub_takes_nothing_from_its_guest(lab: Lab) -> None:
    a, b = two_ports(lab, state=MODEL.PORT_STUB, commit=1, epoch=1)
    b.send(datagram(A, B))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_NOT_ACTIVE: 1}, "drop counted")
    assert a.waiting() == []


def test_the_first_frame_opens_a_committed_port(lab: Lab) -> None:
    flags = MODEL.PORT_F_ANTISPOOF | MODEL.PORT_F_STATELESS
    a, b = two_ports(lab, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE, epoch=7, commit=7, flags=flags, lease=PAST)
    ring = lab.ring()
    lab.place(B, MODEL.L2_TUNNEL, 3, flags=MODEL.L2_F_LOCATION)
    b.send(rarp(B))
    assert a.receive() == rarp(B)
    port = lab.switch.get("ports", "port", 2)
    assert (port.word, port.gate) == (7 << 32 | flags << 8 | MODEL.PORT_ACTIVE, MODEL.GATE_LOCAL)
    assert lab.placed(B) == (MODEL.L2_PORT, 2)
    (event,) = [MODEL.event.from_buffer_copy(record) for record in ring.read()]
    assert (event.type, event.slot, event.epoch, event.length) == (MODEL.EVENT_OPENED, 2, 7, 60)
    assert bytes(event.data)[: event.captured] == rarp(B)
    a.send(datagram(B, A))
    assert b.receive() == datagram(B, A)


@pytest.mark.parametrize("commit", [0, 6, 8])
def test_another_commit_opens_nothing(lab: Lab, commit: int) -> None:
    _, b = two_ports(lab, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE, epoch=7, commit=commit)
    b.send(rarp(B))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_NO_HOLD: 1}, "drop counted")
    port = lab.switch.get("ports", "port", 2)
    assert (port.word & 0xFF, port.gate) == (MODEL.PORT_STAGED, MODEL.GATE_NONE)


def test_epoch_zero_is_never_committed(lab: Lab) -> None:
    _, b = two_ports(lab, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE, epoch=0, commit=0)
    b.send(rarp(B))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_NO_HOLD: 1}, "drop counted")


def test_frames_held_before_the_commit_open_the_port_when_given_back(lab: Lab) -> None:
    a, b = two_ports(lab, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE, epoch=7)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_FROM)
    lab.change_port(2, hold_from=tap.ifindex)
    b.send(rarp(B))
    (frame,) = read_all(tap, 1)
    lab.change_port(2, commit=7)
    tap.write(frame)
    assert a.receive() == rarp(B)
    wait_for(lambda: held(lab) == (0, 0), "nothing held")
    assert lab.switch.get("ports", "port", 2).word & 0xFF == MODEL.PORT_ACTIVE


def test_the_first_frame_opens_a_port_that_awaits_its_source_shut(lab: Lab) -> None:
    awaits = MODEL.PORT_F_STATELESS | MODEL.PORT_F_AWAITS_SOURCE
    _, b = two_ports(lab, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE, epoch=7, commit=7, flags=awaits)
    b.send(rarp(B))
    wait_for(lambda: lab.switch.get("ports", "port", 2).gate == SHUT, "the gate is shut")
    assert lab.switch.get("ports", "port", 2).word & 0xFF == MODEL.PORT_ACTIVE
