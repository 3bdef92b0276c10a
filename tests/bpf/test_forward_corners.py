# SPDX-License-Identifier: GPL-2.0-only
"""Forwarding where something is not there: devices, slots, networks, hosts; by BPF_PROG_RUN, verdict and counters."""

from __future__ import annotations

import struct

import pytest

from . import frames
from .frames import BROADCAST, SERVICE_VLAN, VLAN, datagram, ethernet, mac, mac_bytes
from .lab import UNDERLAY, Lab, Wire, wait_for
from .model import MODEL
from .test_forward_gate import SHUT, two_ports
from .test_forward_tunnel import CHANNEL, FAR, arrive, channel, leave, overlay
from .test_forward_uplink import HOST, OUTSIDE, on_uplink
from .test_forward_vlan import TRUNK, trunk

A, B = mac(1), mac(2)
PASS, SHOT, REDIRECT = 0, 2, 7
NOWHERE = 999_999  # neither a slot, a network, a host nor a device
STACKED = datagram(A, OUTSIDE)[:12] + struct.pack("!HHHH", VLAN, 100, VLAN, 5) + datagram(A, OUTSIDE)[12:]
SERVICE = datagram(A, OUTSIDE)[:12] + struct.pack("!HH", SERVICE_VLAN, 100) + datagram(A, OUTSIDE)[12:]


def device_of(lab: Lab, slot: int) -> int:
    return int(lab.switch.get("ports", "port", slot).ifindex)


def run(lab: Lab, program: str, frame: bytes, ifindex: int, **fields: int) -> tuple[int, dict[int, int]]:
    """(verdict, drop reasons at slot 0)"""
    verdict = lab.switch.run(program, frame, ifindex, **fields).verdict
    return verdict, lab.drops(0)


# -- devices and slots


@pytest.mark.parametrize("program", ["from_port", "to_port", "from_hold"])
@pytest.mark.parametrize(
    ("slot", "role"),
    [(1, "DEVICE_UPLINK"), (0, "DEVICE_PORT"), (NOWHERE, "DEVICE_PORT"), (NOWHERE, "DEVICE_INJECT")],
)
def test_a_device_that_is_no_ports(lab: Lab, program: str, slot: int, role: str) -> None:
    lab.port(1, A)
    ifindex = device_of(lab, 1)
    lab.switch.put("devices", ifindex, MODEL.device(slot=slot, role=getattr(MODEL, role)))
    assert run(lab, program, datagram(B, A), ifindex) == (SHOT, {MODEL.DROP_NO_PORT: 1})


def test_what_the_agent_injects_is_as_if_the_guest_sent_it(lab: Lab) -> None:
    two_ports(lab)
    lab.switch.put("devices", NOWHERE, MODEL.device(slot=1, role=MODEL.DEVICE_INJECT))
    tap = lab.tap(1, MODEL.DEVICE_INJECT)
    assert run(lab, "from_hold", datagram(B, A), tap.ifindex) == (REDIRECT, {})
    assert lab.counted(1, "packets", 0) == 1


@pytest.mark.parametrize("slot", [0, NOWHERE])
def test_an_entry_that_leads_to_no_port(lab: Lab, slot: int) -> None:
    two_ports(lab)
    lab.place(B, MODEL.L2_PORT, slot)
    assert run(lab, "from_port", datagram(B, A), device_of(lab, 1)) == (SHOT, {MODEL.DROP_NO_PORT: 1})


def test_what_is_malformed_ends_before_the_guest(lab: Lab) -> None:
    two_ports(lab)
    short = ethernet(B, A, frames.IPV4, b"\x4f" + bytes(19))
    assert lab.switch.run("to_port", short, device_of(lab, 2)).verdict == SHOT
    assert lab.drops(2) == {MODEL.DROP_MALFORMED: 1}


@pytest.mark.parametrize(("gate", "state"), [(MODEL.GATE_LOCAL, "PORT_ACTIVE"), (SHUT, "PORT_STAGED")])
def test_a_port_without_devices(lab: Lab, gate: int, state: str) -> None:
    two_ports(lab)
    flags = MODEL.PORT_F_STATELESS | MODEL.PORT_F_AWAITS_SOURCE
    lab.set_port(2, B, gate=gate, state=getattr(MODEL, state), flags=flags if gate == SHUT else 0)
    assert lab.switch.run("from_port", datagram(B, A), device_of(lab, 1)).verdict == SHOT
    assert lab.drops(2) == {MODEL.DROP_NO_HOLD if gate == SHUT else MODEL.DROP_NO_PLACE: 1}


def test_a_shut_gate_without_a_target_holds_and_opens_to_nowhere(lab: Lab) -> None:
    """A destination whose guest is not there yet: what waits is not passed on, even if it is written back."""
    two_ports(lab)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, gate=MODEL.GATE_NONE | 1 << 8, hold_to=tap.ifindex)
    lab.switch.run("from_port", datagram(B, A), device_of(lab, 1))
    assert (lab.counted(2, "held", 1), lab.switch.get("ports", "port", 2).held_to) == (1, 1)
    lab.switch.run("from_hold", datagram(B, A), tap.ifindex)
    assert (lab.drops(2), lab.switch.get("ports", "port", 2).held_to) == ({MODEL.DROP_NO_PLACE: 1}, 0)


def test_a_full_ring_loses_the_record_alone(lab: Lab) -> None:
    two_ports(lab)
    ring, count, slots = lab.ring(), 2048, range(3, 19)  # what one port may have told at once, of sixteen ports
    for slot in slots:
        lab.set_port(slot, A, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRACE)
        lab.switch.put("devices", device_of(lab, 1), MODEL.device(slot=slot, role=MODEL.DEVICE_PORT))
        assert lab.switch.run("from_port", datagram(B, A), device_of(lab, 1), repeat=count).verdict == REDIRECT
    told = len(ring.read())
    assert 0 < told < sum(lab.counted(slot, "packets", 0) for slot in slots) == count * len(slots)
    assert told < lab.switch.maps["events"].max_entries // 128


# -- tags


@pytest.mark.parametrize("frame", [STACKED, SERVICE], ids=["stacked", "service"])
def test_stacked_and_service_tags_from_an_uplink(lab: Lab, frame: bytes) -> None:
    """A second tag on a network's own is dropped by name; a service tag is the host's, and passes up untouched."""
    uplink, _, a = on_uplink(lab, 100)
    done = lab.switch.run("from_uplink", frame, uplink)
    if frame is STACKED:
        assert (done.verdict, lab.drops(0)) == (SHOT, {MODEL.DROP_VLAN: 1})
    else:
        assert (done.verdict, lab.drops(0), done.frame) == (PASS, {}, frame)
    assert a.waiting() == []
    assert lab.placed(OUTSIDE) is None


@pytest.mark.parametrize("flags", [MODEL.PORT_F_STATELESS, TRUNK], ids=["access", "trunk"])
@pytest.mark.parametrize(
    "tag",
    [
        struct.pack("!HHH", SERVICE_VLAN, 7, 0x800),
        struct.pack("!HHHHH", SERVICE_VLAN, 7, VLAN, 7, 0x800),
        struct.pack("!HHHHH", VLAN, 7, VLAN, 7, 0x800),
        struct.pack("!HHHHH", VLAN, 7, SERVICE_VLAN, 7, 0x800),
        struct.pack("!HB", VLAN, 0),
    ],
    ids=["service", "service and tag", "two tags", "tag and service", "cut off"],
)
def test_stacked_and_service_tags_from_a_guest(lab: Lab, flags: int, tag: bytes) -> None:
    """They are not switched: dropped by name on any port, and nothing is learned of them."""
    two_ports(lab, flags=flags)
    trunk(lab, 2, 7, 1)
    frame = mac_bytes(A) + mac_bytes(mac(0x20)) + tag
    assert lab.switch.run("from_port", frame, device_of(lab, 2)).verdict == SHOT
    assert lab.drops(2) == {MODEL.DROP_VLAN: 1}
    assert lab.placed(mac(0x20)) is None


@pytest.mark.parametrize("kind", [VLAN, SERVICE_VLAN])
def test_stacked_tags_on_the_wire_of_a_guest(lab: Lab, kind: int) -> None:
    """As above where the kernel has taken the outer tag out of the data."""
    a, b = two_ports(lab, flags=TRUNK)
    trunk(lab, 2, 7, 1)
    b.send(datagram(A, B)[:12] + struct.pack("!HHHH", kind, 7, VLAN, 7) + datagram(A, B)[12:])
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_VLAN: 1}, "drop counted")
    assert a.waiting() == []


def test_a_mac_that_changes_its_tag_keeps_its_place_in_the_count(lab: Lab) -> None:
    two_ports(lab, flags=TRUNK)
    for vid in (7, 8):
        trunk(lab, 2, vid, 1)
        lab.switch.run("from_port", datagram(A, mac(0x20), vlan=vid), device_of(lab, 2))
        entry = MODEL.l2_entry.from_buffer_copy(lab.switch.maps["l2"].lookup(lab._l2_key(mac(0x20), 1)) or b"")
        assert (entry.target, entry.vlan, entry.moves) == (2, vid, vid - 7)
    assert lab.switch.get("ports", "port", 2).learned == 1


# -- networks


def test_an_untagged_frame_of_a_port_without_network(lab: Lab) -> None:
    two_ports(lab, network=0)
    assert lab.switch.run("from_port", datagram(A, B), device_of(lab, 2)).verdict == SHOT
    assert lab.drops(2) == {MODEL.DROP_NO_NETWORK: 1}


@pytest.mark.parametrize(("target", "reason"), [(BROADCAST, "DROP_NO_NETWORK"), (B, "DROP_UNKNOWN_UNICAST")])
def test_a_network_that_floods_to_nobody(lab: Lab, target: str, reason: str) -> None:
    lab.port(1, A, network=7)
    assert lab.switch.run("from_port", datagram(target, A), device_of(lab, 1)).verdict == SHOT
    assert lab.drops(1) == {getattr(MODEL, reason): 1}


def test_a_network_that_is_none(lab: Lab) -> None:
    uplink, _, _ = on_uplink(lab, 100)
    lab.vlan(uplink, 101, NOWHERE)
    assert run(lab, "from_uplink", datagram(A, OUTSIDE, vlan=101), uplink) == (SHOT, {MODEL.DROP_UNKNOWN_UNICAST: 1})
    lab.change_port(1, network=NOWHERE)
    lab.place(OUTSIDE, MODEL.L2_UPLINK, uplink, network=NOWHERE)
    assert lab.switch.run("from_port", datagram(OUTSIDE, A), device_of(lab, 1)).verdict == SHOT
    assert lab.drops(1) == {MODEL.DROP_NO_NETWORK: 1}


@pytest.mark.parametrize("target", [OUTSIDE, BROADCAST], ids=["unicast", "broadcast"])
def test_what_the_underlay_does_not_carry(lab: Lab, target: str) -> None:
    """A frame of 500 bytes behind its header passes, one of 501 does not; a GSO frame is cut to size later."""
    uplink, _, _ = on_uplink(lab, 100, mtu=500)
    lab.place(OUTSIDE, MODEL.L2_UPLINK, uplink)
    ifindex = device_of(lab, 1)
    fits, large = datagram(target, A, bytes(500 - 28)), datagram(target, A, bytes(501 - 28))
    lab.switch.run("from_port", fits, ifindex)
    lab.switch.run("from_port", large, ifindex, gso_size=400)
    assert lab.drops(1) == {}
    lab.switch.run("from_port", large, ifindex)
    assert lab.drops(1) == {MODEL.DROP_MTU: 1}


def test_group_addresses_that_are_nearly_a_bridges(lab: Lab) -> None:
    """01:80:c2:00:00:00 to 0f end here (IEEE 802.1Q, 8.6.3); their neighbours flood."""
    _, b = two_ports(lab)
    near = ["01:81:c2:00:00:00", "01:80:c3:00:00:00", "01:80:c2:01:00:00", "01:80:c2:00:01:00", "01:80:c2:00:00:10"]
    for target in near:
        lab.switch.run("from_port", datagram(target, A), device_of(lab, 1))
        assert b.receive() == datagram(target, A)
    lab.switch.run("from_port", datagram("01:80:c2:00:00:0f", A), device_of(lab, 1))
    assert lab.drops(1) == {MODEL.DROP_UNKNOWN_UNICAST: 1}


def test_a_group_address_is_learned_from_nowhere(lab: Lab) -> None:
    uplink, _, a = on_uplink(lab, 100)
    frame = datagram(A, "03:00:00:00:00:01", vlan=100)
    lab.switch.run("from_uplink", frame, uplink)
    assert a.receive() == datagram(A, "03:00:00:00:00:01")
    assert lab.placed("03:00:00:00:00:01") is None


def test_a_configured_entry_stays_so_when_its_port_opens(lab: Lab) -> None:
    two_ports(lab, state=MODEL.PORT_STAGED, epoch=3, commit=3, gate=MODEL.GATE_NONE)
    lab.place(B, MODEL.L2_UPLINK, 9, flags=MODEL.L2_F_STATIC)
    lab.switch.run("from_port", datagram(A, B), device_of(lab, 2))
    entry = MODEL.l2_entry.from_buffer_copy(lab.switch.maps["l2"].lookup(lab._l2_key(B, 1)) or b"")
    assert (entry.kind, entry.target, entry.flags) == (MODEL.L2_PORT, 2, MODEL.L2_F_STATIC | MODEL.L2_F_LOCATION)


def test_a_full_table_of_places_learns_nothing_and_forwards(lab: Lab) -> None:
    _, b = two_ports(lab)
    places = lab.switch.maps["l2"]
    keys = [struct.pack("=II4x", NOWHERE, number) for number in range(places.max_entries - len(places.keys()))]
    places.fill(keys)
    try:
        assert lab.switch.run("from_port", datagram(B, mac(0x20)), device_of(lab, 1)).verdict == REDIRECT
        assert lab.placed(mac(0x20)) is None
    finally:
        places.empty(keys)
    assert b.waiting() == []


def test_a_held_frame_goes_on_to_the_host(lab: Lab) -> None:
    on_uplink(lab, 0)
    tap = lab.tap(1, MODEL.DEVICE_HOLD_FROM)
    lab.change_port(1, held_from=1)
    host = Wire("near1")
    try:
        assert lab.switch.run("from_hold", datagram(HOST, A, b"held"), tap.ifindex).verdict == SHOT
        assert host.receive() == datagram(HOST, A, b"held")
    finally:
        host.close()
    assert (lab.drops(1), lab.switch.get("ports", "port", 1).held_from) == ({}, 0)


# -- other hosts


def test_a_frame_out_of_no_tunnel(lab: Lab) -> None:
    lab.port(1, A)
    assert run(lab, "from_tunnel", datagram(A, B), device_of(lab, 1)) == (SHOT, {MODEL.DROP_TUNNEL_PEER: 1})


def test_a_channel_to_no_slot(lab: Lab) -> None:
    outside, a = overlay(lab)
    channel(lab, NOWHERE)
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT, datagram(A, B))
    wait_for(lambda: lab.drops(0) == {MODEL.DROP_CHANNEL: 1}, "drop counted")
    assert a.waiting() == []


@pytest.mark.parametrize("fault", ["no tunnel", "no host", "host 0", "no device"])
@pytest.mark.parametrize("held", [False, True])
def test_a_redirect_that_cannot_be_sent(lab: Lab, fault: str, held: bool) -> None:
    """Counted at the port; one that was held is sent as a copy, and only there the device itself can refuse."""
    two_ports(lab, gate=MODEL.GATE_REDIRECT, remote={"no host": NOWHERE, "host 0": 0}.get(fault, FAR))
    lab.host(FAR, UNDERLAY[1])
    lab.switch.put("settings", 0, MODEL.settings(tunnel=0 if fault == "no tunnel" else NOWHERE))
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    program, ifindex = ("from_hold", tap.ifindex) if held else ("from_port", device_of(lab, 1))
    verdict = lab.switch.run(program, datagram(B, A), ifindex).verdict
    if fault == "no device" and not held:
        assert (verdict, lab.drops(2)) == (REDIRECT, {})
    else:
        assert (verdict, lab.drops(2)) == (SHOT, {MODEL.DROP_TUNNEL: 1})


def test_a_broadcast_for_a_vm_that_moved_on(lab: Lab) -> None:
    """It is passed on, even where the port still counts as active."""
    outside, _ = overlay(lab)
    lab.change_port(1, gate=MODEL.GATE_REDIRECT, channel=CHANNEL + 1, remote=FAR)
    channel(lab, 1)
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT, datagram(BROADCAST, B))
    assert leave(outside)[1:] == (CHANNEL + 1, MODEL.MARK_REDIRECT | 1, datagram(BROADCAST, B))


@pytest.mark.parametrize("segments", [4, 0], ids=["of a host", "of a tap"])
def test_a_redirected_gso_frame_counts_as_its_segments(lab: Lab, segments: int) -> None:
    """The other end counts what comes, and that is cut up: both must agree. A tap does not say how many there are."""
    two_ports(lab, gate=MODEL.GATE_REDIRECT, remote=FAR)
    lab.host(FAR, UNDERLAY[1])
    lab.switch.put("settings", 0, MODEL.settings(tunnel=NOWHERE))
    frame = datagram(B, A, bytes(3500))
    assert lab.switch.run("from_port", frame, device_of(lab, 1), gso_size=1000, gso_segs=segments).verdict == REDIRECT
    assert lab.counted(2, "redirected") == 4
    lab.vlan(device_of(lab, 1), 100, 1)  # from outside nothing was parsed yet: what is no packet is one frame
    malformed = ethernet(B, A, frames.IPV4, b"\x44" + bytes(2000), vlan=100)
    assert lab.switch.run("from_uplink", malformed, device_of(lab, 1), gso_size=1000).verdict == REDIRECT
    assert lab.counted(2, "redirected") == 5
