# SPDX-License-Identifier: GPL-2.0-only
"""Tags: access ports have none, trunk ports have those of `trunks`, uplinks those of their networks."""

from __future__ import annotations

import pytest

from .frames import BROADCAST, SERVICE_VLAN, VLAN, datagram, ethernet, mac
from .lab import Lab, wait_for
from .model import MODEL

A, B, C = mac(1), mac(2), mac(3)
TRUNK = MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRUNK


def trunk(lab: Lab, slot: int, vid: int, network: int) -> None:
    lab.switch.put("trunks", MODEL.trunk_key(slot=slot, vid=vid), network)


@pytest.mark.parametrize(
    "frame",
    [
        datagram(B, A, vlan=7),
        ethernet(B, A, SERVICE_VLAN, b"\0\x07\x08\0"),
        ethernet(B, A, VLAN, b"\0\0\x81\0\0\x07\x08\0"),
    ],
    ids=["tagged", "service tag", "tag behind a priority tag"],
)
def test_an_access_port_may_not_tag(lab: Lab, frame: bytes) -> None:
    lab.network(1)
    a, b = lab.port(1, A), lab.port(2, B)
    lab.place(B, MODEL.L2_PORT, 2)
    a.send(frame)
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_VLAN: 1}, "drop counted")
    assert b.waiting() == []


def test_a_priority_tag_is_taken_off(lab: Lab) -> None:
    lab.network(1)
    a, b = lab.port(1, A), lab.port(2, B)
    lab.place(B, MODEL.L2_PORT, 2)
    plain = datagram(B, A)
    a.send(plain[:12] + b"\x81\0\xe0\0" + plain[12:])
    assert b.receive() == plain


def test_a_trunk_port_is_on_the_network_of_its_tag(lab: Lab) -> None:
    for network in (1, 2):
        lab.network(network, [(MODEL.L2_PORT, 1, 7 if network == 2 else 0), (MODEL.L2_PORT, network + 1, 0)])
    a = lab.port(1, A, flags=TRUNK)
    b, c = lab.port(2, B), lab.port(3, C, network=2)
    trunk(lab, 1, 7, 2)
    behind = mac(0x11)  # a further MAC of the guest: its place, with the tag, is learned
    a.send(datagram(C, behind, b"tagged", vlan=7))
    assert c.receive() == datagram(C, behind, b"tagged")
    c.send(datagram(behind, C, b"answer"))
    assert a.receive() == datagram(behind, C, b"answer", vlan=7)
    c.send(datagram(BROADCAST, C, b"flooded"))
    assert a.receive() == datagram(BROADCAST, C, b"flooded", vlan=7)
    a.send(datagram(B, A, b"plain"))
    assert b.receive() == datagram(B, A, b"plain")
    assert c.waiting() == b.waiting() == []
    assert lab.placed(behind, 2) == (MODEL.L2_PORT, 1)
    assert lab.placed(behind, 1) is None


def test_a_trunk_port_may_use_no_other_tag(lab: Lab) -> None:
    lab.network(1)
    a, b = lab.port(1, A, flags=TRUNK), lab.port(2, B)
    lab.place(B, MODEL.L2_PORT, 2)
    trunk(lab, 1, 7, 1)
    trunk(lab, 2, 8, 1)
    a.send(datagram(B, A, vlan=8))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_VLAN: 1}, "drop counted")
    a.send(datagram(B, A, vlan=7))
    assert b.receive() == datagram(B, A)
    assert b.waiting() == []


def test_flooding_tags_each_copy_for_its_member_alone(lab: Lab) -> None:
    uplink, outside = lab.uplink(mac(0x99))
    lab.network(
        1,
        [
            (MODEL.L2_PORT, 2, 5),
            (MODEL.L2_UPLINK, uplink, 0),
            (MODEL.L2_PORT, 3, 0),
        ],
        kind=MODEL.NETWORK_UPLINK,
        uplink=uplink,
        vid=100,
    )
    a, b, c = lab.port(1, A), lab.port(2, B, flags=TRUNK), lab.port(3, C)
    a.send(datagram(BROADCAST, A))
    assert b.receive() == datagram(BROADCAST, A, vlan=5)
    assert outside.receive() == datagram(BROADCAST, A, vlan=100)
    assert c.receive() == datagram(BROADCAST, A)


def test_a_tag_survives_the_hold(lab: Lab) -> None:
    lab.network(1)
    a, b = lab.port(1, A), lab.port(2, B, flags=TRUNK, gate=MODEL.GATE_LOCAL | 1 << 8)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex)
    lab.place(B, MODEL.L2_PORT, 2, vlan=7)
    a.send(datagram(B, A))
    frames: list[bytes] = []
    wait_for(lambda: frames.extend(filter(None, [tap.read()])) or frames, "a frame in the tap")
    assert frames == [datagram(B, A, vlan=7)]
    lab.change_port(2, gate=MODEL.GATE_LOCAL)
    tap.write(frames[0])
    assert b.receive() == datagram(B, A, vlan=7)


def test_a_guest_behind_a_trunk_keeps_its_tag_in_the_hold(lab: Lab) -> None:
    lab.network(1)
    staged = {"state": MODEL.PORT_STAGED, "gate": MODEL.GATE_NONE, "epoch": 3}
    a, b = lab.port(1, A), lab.port(2, B, flags=TRUNK, **staged)
    lab.place(A, MODEL.L2_PORT, 1)
    trunk(lab, 2, 7, 1)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_FROM)
    lab.change_port(2, hold_from=tap.ifindex)
    b.send(datagram(A, B, vlan=7))
    frames: list[bytes] = []
    wait_for(lambda: frames.extend(filter(None, [tap.read()])) or frames, "a frame in the tap")
    lab.change_port(2, commit=3)
    tap.write(frames[0])
    assert a.receive() == datagram(A, B)


@pytest.mark.parametrize("opened", [False, True], ids=["its first frame", "a later frame"])
def test_a_vm_that_came_is_found_in_the_network_of_its_tag_at_once(lab: Lab, opened: bool) -> None:
    """The uplink still has it at its old place when what answers its tagged frame comes."""
    flags = TRUNK | MODEL.PORT_F_UNSETTLED
    state = MODEL.PORT_ACTIVE if opened else MODEL.PORT_STAGED
    a = lab.port(1, A, state=state, epoch=7, commit=7, flags=flags)
    uplink, network = lab.uplink(mac(0x40))
    lab.network(1, [(MODEL.L2_PORT, 1, 0)])
    members = [(MODEL.L2_PORT, 1, 7), (MODEL.L2_UPLINK, uplink, 0)]
    lab.network(2, members, kind=MODEL.NETWORK_UPLINK, uplink=uplink, vid=99)
    lab.vlan(uplink, 99, 2)
    trunk(lab, 1, 7, 2)
    lab.place(A, MODEL.L2_UPLINK, uplink, network=2, flags=MODEL.L2_F_LOCATION | MODEL.L2_F_STATIC)
    a.send(datagram(BROADCAST, A, vlan=7))
    assert network.receive() == datagram(BROADCAST, A, vlan=99)
    assert lab.placed(A, 2) == (MODEL.L2_PORT, 1)
    network.send(datagram(A, B, vlan=99))
    assert a.receive() == datagram(A, B, vlan=7)


@pytest.mark.parametrize(
    ("slot", "flags"), [(2, MODEL.L2_F_LOCATION), (1, 0)], ids=["at the port that it left", "learned"]
)
def test_a_vm_that_came_is_no_longer_where_it_was_on_this_host(lab: Lab, slot: int, flags: int) -> None:
    """It comes back before its redirect has ended; or its MAC was learned at its port."""
    a = lab.port(1, A, epoch=7, commit=7, flags=TRUNK | MODEL.PORT_F_UNSETTLED)
    lab.network(2, [(MODEL.L2_PORT, 1, 7)])
    trunk(lab, 1, 7, 2)
    lab.place(A, MODEL.L2_PORT, slot, network=2, flags=flags)
    a.send(datagram(BROADCAST, A, vlan=7))
    wait_for(lambda: lab.placed(A, 2) == (MODEL.L2_PORT, 1), "it is here")
    assert lab.change_place(A, 2).flags == MODEL.L2_F_LOCATION
