# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors: exact copies, once each, of what passed a port, and nothing of what did not."""

from __future__ import annotations

import struct

import pytest

from .frames import BROADCAST, datagram, mac
from .lab import Lab, Wire, wait_for
from .mirrors import BOTH, FROM, TO, counted, cutter, known, mirror, to_device, to_port
from .model import MODEL

A, B, M = mac(1), mac(2), mac(9)
NAME = (0xABC123, 0x5A5)
TRUNK = MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRUNK


def two(lab: Lab, **fields: int) -> tuple[Wire, Wire]:
    """Ports 1 and 2 on one network."""
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_PORT, 2, 0)])
    guests = lab.port(1, A, **fields), lab.port(2, B)
    for number, own in ((1, A), (2, B)):
        lab.place(own, MODEL.L2_PORT, number)
    return guests


def converse(a: Wire, b: Wire) -> tuple[bytes, bytes]:
    """A frame from A and one to A have arrived."""
    there, back = datagram(B, A, b"there"), datagram(A, B, b"back")
    a.send(there)
    assert b.receive() == there
    b.send(back)
    assert a.receive() == back
    return there, back


@pytest.mark.parametrize(("directions", "chosen"), [(BOTH, [0, 1]), (FROM, [0]), (TO, [1])], ids=["both", "from", "to"])
def test_a_copy_of_each_frame_of_its_direction(lab: Lab, directions: int, chosen: list[int]) -> None:
    a, b = two(lab)
    out = to_device(lab, 1, directions=directions)
    sent = converse(a, b)
    expected = [sent[index] for index in chosen]
    assert [out.receive() for _ in expected] == expected
    assert out.waiting() == []
    assert counted(lab, 1) == (len(expected), sum(map(len, expected)), 0)


def test_a_port_without_the_feature_is_not_mirrored(lab: Lab) -> None:
    a, b = two(lab)
    out = to_device(lab, 1)
    lab.change_port(1, features=0)
    converse(a, b)
    assert out.waiting() == []


def test_several_mirrors_of_one_port_and_one_that_is_gone(lab: Lab) -> None:
    a, b = two(lab)
    first, last = to_device(lab, 1, 0, directions=FROM), to_device(lab, 1, 2, directions=TO)
    mirror(lab, 1, 1, output=MODEL.MIRROR_NONE, directions=0)
    there, back = converse(a, b)
    assert (first.receive(), last.receive()) == (there, back)
    assert (first.waiting(), last.waiting()) == ([], [])


def test_what_does_not_pass_is_not_copied(lab: Lab) -> None:
    a, _ = two(lab, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_ANTISPOOF)
    out = to_device(lab, 1)
    a.send(datagram(B, mac(0x66)))
    wait_for(lambda: lab.drops(1), "the spoofed frame is dropped")
    assert out.waiting() == [] and counted(lab, 1) == (0, 0, 0)


def test_flooded_frames_are_copied_once_a_port(lab: Lab) -> None:
    a, b = two(lab)
    own, others = to_device(lab, 1), to_device(lab, 2)
    frame = datagram(BROADCAST, A)
    a.send(frame)
    assert b.receive() == own.receive() == others.receive() == frame
    assert (own.waiting(), others.waiting()) == ([], [])


# ---- tags ----


def trunk(lab: Lab) -> tuple[Wire, Wire]:
    """Port 1 has network 2 on VLAN 7; port 2 is on it."""
    lab.network(1, [(MODEL.L2_PORT, 1, 0)])
    lab.network(2, [(MODEL.L2_PORT, 1, 7), (MODEL.L2_PORT, 2, 0)])
    guests = lab.port(1, A, flags=TRUNK), lab.port(2, B, network=2)
    lab.switch.put("trunks", MODEL.trunk_key(slot=1, vid=7), 2)
    lab.place(B, MODEL.L2_PORT, 2, network=2)
    lab.place(A, MODEL.L2_PORT, 1, network=2, vlan=7)
    return guests


def tagged(frame: bytes, tci: int) -> bytes:
    return frame[:12] + struct.pack("!HH", 0x8100, tci) + frame[12:]


def test_a_copy_has_the_whole_tag_of_the_guests_wire(lab: Lab) -> None:
    """Priority and drop eligibility too, which are gone behind the port."""
    a, b = trunk(lab)
    out = to_device(lab, 1)
    a.send(tagged(datagram(B, A), 0xB007))
    assert out.receive() == tagged(datagram(B, A), 0xB007)
    assert b.receive() == datagram(B, A)
    b.send(datagram(A, B))
    assert out.receive() == a.receive() == tagged(datagram(A, B), 7)
    assert out.waiting() == []


@pytest.mark.parametrize("tci", [0, 0xE000])
def test_a_copy_has_a_tag_that_is_only_a_priority(lab: Lab, tci: int) -> None:
    a, b = two(lab)
    out, untagged = to_device(lab, 1), to_device(lab, 1, 1, vlans=(0,))
    a.send(tagged(datagram(B, A), tci))
    assert b.receive() == datagram(B, A)
    assert out.receive() == untagged.receive() == tagged(datagram(B, A), tci)


@pytest.mark.parametrize(("vlans", "chosen"), [((7,), [1]), ((0,), [0]), ((0, 7, 4094), [0, 1]), ((8,), [])])
def test_only_chosen_vlans(lab: Lab, vlans: tuple[int, ...], chosen: list[int]) -> None:
    a, b = trunk(lab)
    out = to_device(lab, 1, vlans=vlans)
    frames = [datagram(BROADCAST, A, b"plain"), datagram(B, A, vlan=7)]
    for frame in frames:
        a.send(frame)
    assert b.receive() == datagram(B, A)
    assert [out.receive() for _ in chosen] == [frames[index] for index in chosen]
    assert out.waiting() == []
    assert counted(lab, 1)[0] == len(chosen)


def test_a_port_with_all_the_mirrors_that_it_may_have(lab: Lab) -> None:
    a, b = two(lab)
    out = to_device(lab, 1, 0, directions=FROM)
    for number in range(1, MODEL.MIRRORS_MAX):
        mirror(lab, 1, number, output=MODEL.MIRROR_NONE, directions=0)
    frame = datagram(B, A)
    a.send(frame)
    assert out.receive() == b.receive() == frame


def test_a_mirror_without_counters_copies(lab: Lab) -> None:
    """For a moment, when its maps have been taken over by another version."""
    a, _ = two(lab)
    out = to_device(lab, 1, directions=FROM)
    lab.switch.maps["mirror_counts"].delete(struct.pack("=I", MODEL.MIRRORS_MAX))
    a.send(datagram(B, A))
    assert out.receive() == datagram(B, A)


# ---- snap length ----


@pytest.mark.parametrize(("vlan", "snap"), [(0, 100), (7, 100), (0, 64)])
def test_a_copy_is_cut_and_the_frame_is_not(lab: Lab, vlan: int, snap: int) -> None:
    cutter(lab)
    a, b = trunk(lab) if vlan else two(lab)
    out = to_device(lab, 1, snap=snap)
    frame = datagram(B, A, bytes(range(256)), vlan=vlan)
    a.send(frame)
    assert out.receive() == frame[:snap]
    assert b.receive() == datagram(B, A, bytes(range(256)))
    a.send(datagram(B, A, vlan=vlan))  # not longer than that
    assert out.receive() == datagram(B, A, vlan=vlan)
    assert counted(lab, 1) == (2, len(datagram(B, A, bytes(range(256)))) + 60, 0)


@pytest.mark.parametrize("beyond", [0, 1, 3, 4, 5])
def test_a_tag_is_part_of_the_length(lab: Lab, beyond: int) -> None:
    cutter(lab)
    a, b = trunk(lab)
    out = to_device(lab, 1, snap=100)
    data = bytes(range(54 + beyond))
    frames = [datagram(B, A, data, vlan=7), datagram(A, B, data, vlan=7)]
    assert {len(frame) for frame in frames} == {100 + beyond}
    a.send(frames[0])
    b.send(datagram(A, B, data))
    assert [out.receive(), out.receive()] == [frame[:100] for frame in frames]
    assert (b.receive(), a.receive()) == (datagram(B, A, data), frames[1])


def test_a_copy_that_cannot_be_cut_is_counted(lab: Lab) -> None:
    a, b = two(lab)
    out = to_device(lab, 1, snap=64)
    frame = datagram(B, A, bytes(200))
    a.send(frame)
    assert b.receive() == frame
    assert out.waiting() == [] and counted(lab, 1) == (0, 0, 1)


def test_a_copy_whose_mirror_is_gone_ends_at_the_cutter(lab: Lab) -> None:
    mark = MODEL.SKB_MARK_COPY + MODEL.MIRRORS_MAX
    assert lab.switch.run("to_cutter", datagram(B, A), mark=mark).verdict == 2  # TC_ACT_SHOT


def test_a_copy_that_is_not_longer_than_its_mirror_takes_by_now_goes_on(lab: Lab) -> None:
    to_device(lab, 1, snap=100)
    mark = MODEL.SKB_MARK_COPY + MODEL.MIRRORS_MAX
    assert lab.switch.run("to_cutter", datagram(B, A), mark=mark).verdict == 7  # TC_ACT_REDIRECT


def test_a_cut_copy_whose_output_is_gone_is_counted(lab: Lab) -> None:
    cutter(lab)
    a, b = two(lab)
    mirror(lab, 1, output=MODEL.MIRROR_DEVICE, target=0, snap=64)
    a.send(datagram(B, A, bytes(200)))
    b.receive()
    assert counted(lab, 1)[2] == 1


# ---- what cannot be taken ----


@pytest.mark.parametrize("output", ["MIRROR_DEVICE", "MIRROR_PORT", "MIRROR_VLAN", "MIRROR_TUNNEL", "MIRROR_NONE"])
def test_an_output_that_is_not_there_costs_the_copy_and_nothing_else(lab: Lab, output: str) -> None:
    a, b = two(lab)
    mirror(lab, 1, output=getattr(MODEL, output))
    converse(a, b)
    assert counted(lab, 1) == (0, 0, 2)
    assert lab.drops(1) == lab.drops(2) == {}


# ---- to another port ----


def test_a_port_takes_copies_past_its_policy_and_counts_nothing(lab: Lab) -> None:
    a, b = two(lab)
    monitor = lab.port(3, M, flags=0)  # without a policy: it would drop everything
    known(lab, NAME, 3)
    to_port(lab, 1, NAME)
    there, back = converse(a, b)
    assert [monitor.receive() for _ in range(2)] == [there, back]
    assert monitor.waiting() == []
    assert lab.drops(3) == {} and lab.counted(3, "packets", 1) == 0


def test_a_copy_is_not_mirrored_again(lab: Lab) -> None:
    """Two ports that mirror to each other, and a monitor that is mirrored itself."""
    a, b = two(lab)
    other = (0x222222, 0x222)
    known(lab, NAME, 2)
    known(lab, other, 1)
    to_port(lab, 1, NAME)
    to_port(lab, 2, other)
    frame = datagram(B, A, b"there")
    a.send(frame)
    assert [b.receive(), b.receive()] == [frame, frame]  # it, and the copy of what A sent
    assert a.receive() == frame  # the copy of what B got
    assert (a.waiting(), b.waiting()) == ([], [])


@pytest.mark.parametrize(
    "fields",
    [
        {"state": MODEL.PORT_STAGED},
        {"state": MODEL.PORT_QUIESCED},
        {"gate": MODEL.GATE_LOCAL | 1 << 8},
        {"gate": MODEL.GATE_NONE},
        {"gate": MODEL.GATE_REDIRECT},
    ],
    ids=["staged", "quiesced", "held", "closed", "redirect to nowhere"],
)
def test_a_port_that_cannot_take_it_costs_the_copy(lab: Lab, fields: dict[str, int]) -> None:
    a, b = two(lab)
    monitor = lab.port(3, M, **fields)
    known(lab, NAME, 3)
    to_port(lab, 1, NAME)
    converse(a, b)
    assert monitor.waiting() == [] and counted(lab, 1) == (0, 0, 2)


@pytest.mark.parametrize("slot", [0, 5, 1 << 20], ids=["none", "without a device", "out of range"])
def test_a_name_that_leads_nowhere_costs_the_copy(lab: Lab, slot: int) -> None:
    a, b = two(lab)
    lab.set_port(5, M, ifindex=0)
    known(lab, NAME, slot)
    to_port(lab, 1, NAME)
    converse(a, b)
    assert counted(lab, 1) == (0, 0, 2)


def test_the_instance_that_runs_gets_the_copy(lab: Lab) -> None:
    """The VM has come back: the newer instance is staged, the older one still has the guest."""
    a, b = two(lab)
    lab.port(3, M, state=MODEL.PORT_STAGED)
    monitor = lab.port(4, M)
    known(lab, NAME, 3, 4)
    to_port(lab, 1, NAME)
    there, _ = converse(a, b)
    assert monitor.receive() == there


# ---- to a VLAN ----


@pytest.mark.parametrize("vlan", [0, 7])
def test_a_vlan_of_an_uplink_gets_copies_within_its_tag(lab: Lab, vlan: int) -> None:
    a, b = trunk(lab)
    uplink, network = lab.uplink(mac(0x40))
    mirror(lab, 1, output=MODEL.MIRROR_VLAN, target=uplink, vid=99, directions=FROM)
    frame = datagram(B if vlan else BROADCAST, A, vlan=vlan)
    a.send(frame)
    assert network.receive() == tagged(frame, 99)
    assert network.waiting() == []
    if vlan:
        assert b.receive() == datagram(B, A)


def test_a_copy_in_a_vlan_is_cut_before_its_outer_tag(lab: Lab) -> None:
    cutter(lab)
    a, _ = trunk(lab)
    uplink, network = lab.uplink(mac(0x40))
    mirror(lab, 1, output=MODEL.MIRROR_VLAN, target=uplink, vid=99, snap=80)
    frame = datagram(B, A, bytes(range(200)), vlan=7)
    a.send(frame)
    assert network.receive() == tagged(frame[:80], 99)


def test_an_untagged_uplink_gets_copies_as_they_are(lab: Lab) -> None:
    a, _ = trunk(lab)
    uplink, network = lab.uplink(mac(0x40))
    mirror(lab, 1, output=MODEL.MIRROR_VLAN, target=uplink, directions=FROM)
    a.send(datagram(B, A, vlan=7))
    assert network.receive() == datagram(B, A, vlan=7)
