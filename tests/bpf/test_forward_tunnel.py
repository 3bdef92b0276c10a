# SPDX-License-Identifier: GPL-2.0-only
"""Between hosts: overlays and redirects through the vxlan device, seen as outer frames on the underlay."""

from __future__ import annotations

import time

import pytest

from .frames import BROADCAST, address, datagram, mac, tunnelled, untunnelled
from .lab import UNDERLAY, UNDERLAY6, UNDERLAY_MAC, Lab, Wire, wait_for
from .model import MODEL

A, B, REMOTE, OTHER = mac(1), mac(2), mac(0x77), mac(0x78)
VNI, CHANNEL, FAR, THIRD = 0x123456, 0xABCDEF, 2, 3
EITHER = pytest.mark.parametrize("underlay", [UNDERLAY, UNDERLAY6], ids=["IPv4", "IPv6"])


def overlay(lab: Lab, underlay: tuple[str, str] = UNDERLAY, **fields: int) -> tuple[Wire, Wire]:
    """Network 1 as an overlay with host FAR and port 1: (the underlay, the guest)."""
    outside = lab.tunnel()
    lab.host(FAR, underlay[1])
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_TUNNEL, FAR, 0)], kind=MODEL.NETWORK_OVERLAY, vni=VNI)
    lab.switch.put("vnis", VNI, 1)
    return outside, lab.port(1, A, **fields)


def arrive(wire: Wire, underlay: tuple[str, str], identifier: int, mark: int, inner: bytes) -> None:
    """A frame comes from the far host."""
    outer = (mac(UNDERLAY_MAC), mac(UNDERLAY_MAC + 1), (underlay[1], underlay[0]))
    wire.send(tunnelled(*outer, identifier, mark, inner))


def is_tunnelled(frame: bytes) -> bool:
    """The underlay has its own neighbour discovery beside our frames."""
    return (frame[12:14], frame[23]) == (b"\x08\0", 17) or (frame[12:14], frame[20]) == (b"\x86\xdd", 17)


def leave(wire: Wire) -> tuple[str, int, int, bytes]:
    """The next frame that goes to another host."""
    while not is_tunnelled(frame := wire.receive()):
        pass
    return untunnelled(frame)


def left(wire: Wire) -> list[bytes]:
    return [frame for frame in wire.waiting() if is_tunnelled(frame)]


def channel(lab: Lab, slot: int, epoch: int = 1, origin: str = UNDERLAY[1]) -> None:
    entry = MODEL.channel.from_buffer_copy(address(origin) + bytes(MODEL.channel(slot=slot, epoch=epoch))[16:])
    lab.switch.put("channels", CHANNEL, entry)


def redirected(lab: Lab, slot: int, own_mac: str, **fields: int) -> Wire:
    """A port whose VM moved on to FAR."""
    fields = {"state": MODEL.PORT_QUIESCED, "gate": MODEL.GATE_REDIRECT, "channel": CHANNEL, "remote": FAR} | fields
    return lab.port(slot, own_mac, **fields)


@EITHER
def test_an_overlay_reaches_another_host_and_learns_the_way(lab: Lab, underlay: tuple[str, str]) -> None:
    outside, a = overlay(lab, underlay)
    a.send(datagram(REMOTE, A, b"unknown"))
    assert leave(outside) == (underlay[1], VNI, 0, datagram(REMOTE, A, b"unknown"))
    arrive(outside, underlay, VNI, 0, datagram(A, REMOTE, b"answer"))
    assert a.receive() == datagram(A, REMOTE, b"answer")
    assert lab.placed(REMOTE) == (MODEL.L2_TUNNEL, FAR)
    a.send(datagram(REMOTE, A, b"known"))
    assert leave(outside) == (underlay[1], VNI, 0, datagram(REMOTE, A, b"known"))
    arrive(outside, underlay, VNI, 0, datagram(BROADCAST, REMOTE))
    assert a.receive() == datagram(BROADCAST, REMOTE)
    assert a.waiting() == []


def test_flooding_sends_one_frame_to_each_host(lab: Lab) -> None:
    outside, a = overlay(lab)
    lab.host(THIRD, "192.0.2.3")
    flood = [(MODEL.L2_PORT, 1, 0), (MODEL.L2_TUNNEL, FAR, 0), (MODEL.L2_TUNNEL, THIRD, 0)]
    lab.network(1, flood, kind=MODEL.NETWORK_OVERLAY, vni=VNI)
    lab.neighbour("192.0.2.3")
    a.send(datagram(BROADCAST, A))
    assert [leave(outside) for _ in range(2)] == [
        (host, VNI, 0, datagram(BROADCAST, A)) for host in (UNDERLAY[1], "192.0.2.3")
    ]


def test_never_from_tunnel_to_tunnel(lab: Lab) -> None:
    outside, a = overlay(lab)
    lab.place(OTHER, MODEL.L2_TUNNEL, FAR)
    arrive(outside, UNDERLAY, VNI, 0, datagram(OTHER, REMOTE))
    wait_for(lambda: lab.drops(0) == {MODEL.DROP_LOOP: 1}, "drop counted")
    assert lab.switch.get("networks", "network", 1).drops == 1
    arrive(outside, UNDERLAY, VNI, 0, datagram(BROADCAST, REMOTE))
    assert a.receive() == datagram(BROADCAST, REMOTE)
    assert left(outside) == []


def test_strangers_and_unknown_networks_are_not_heard(lab: Lab) -> None:
    outside, a = overlay(lab)
    arrive(outside, UNDERLAY, VNI + 1, 0, datagram(A, REMOTE))
    wait_for(lambda: lab.drops(0) == {MODEL.DROP_NO_NETWORK: 1}, "drop counted")
    lab.switch.maps["host_index"].clear()
    arrive(outside, UNDERLAY, VNI, 0, datagram(A, REMOTE))
    wait_for(lambda: lab.drops(0).get(MODEL.DROP_TUNNEL_PEER) == 1, "drop counted")
    arrive(outside, UNDERLAY, VNI, 0x0800, datagram(A, REMOTE))
    wait_for(lambda: lab.drops(0).get(MODEL.DROP_CHANNEL) == 1, "drop counted")
    assert a.waiting() == []
    assert lab.placed(REMOTE) is None


def test_without_a_tunnel_device_the_drop_is_counted(lab: Lab) -> None:
    _, a = overlay(lab)
    lab.place(REMOTE, MODEL.L2_TUNNEL, FAR)
    lab.switch.put("settings", 0, MODEL.settings())
    a.send(datagram(REMOTE, A))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_TUNNEL: 1}, "drop counted")


@EITHER
def test_a_redirect_follows_the_vm(lab: Lab, underlay: tuple[str, str]) -> None:
    outside, a = overlay(lab, underlay)
    lab.place(B, MODEL.L2_PORT, 2, flags=MODEL.L2_F_LOCATION)
    redirected(lab, 2, B)
    a.send(datagram(B, A))
    assert leave(outside) == (underlay[1], CHANNEL, MODEL.MARK_REDIRECT | MODEL.MARK_LOCAL, datagram(B, A))
    assert lab.counted(2, "redirected") == 1
    assert not lab.switch.get("ports", "port", 2).redirected, "ports of this host do not keep a redirect in use"
    arrive(outside, underlay, VNI, 0, datagram(B, REMOTE))
    assert leave(outside) == (underlay[1], CHANNEL, MODEL.MARK_REDIRECT, datagram(B, REMOTE))
    assert lab.counted(2, "redirected") == 2
    assert abs(time.monotonic_ns() - lab.switch.get("ports", "port", 2).redirected) < 10**10


@EITHER
def test_a_redirect_arrives_at_its_port(lab: Lab, underlay: tuple[str, str]) -> None:
    outside, a = overlay(lab, underlay, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_NO_BROADCAST)
    channel(lab, 1, origin=underlay[1])
    for frame in (datagram(A, REMOTE), datagram(BROADCAST, REMOTE)):
        arrive(outside, underlay, CHANNEL, MODEL.MARK_REDIRECT, frame)
        assert a.receive() == frame
    assert lab.counted(1, "packets", 1) == 2
    assert lab.placed(REMOTE) is None  # nothing is learned from a redirect


def test_rule_a_vm_beside_the_one_that_left_waits_behind_what_came_by_itself(lab: Lab) -> None:
    """It may have sent that from here, before it changed places with the VM that came here."""
    flags = MODEL.PORT_F_STATELESS | MODEL.PORT_F_AWAITS_SOURCE
    outside, a = overlay(lab, flags=flags, gate=MODEL.GATE_LOCAL | 1 << 8)
    tap = lab.tap(1, MODEL.DEVICE_HOLD_TO)
    lab.change_port(1, hold_to=tap.ifindex)
    channel(lab, 1)
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT | MODEL.MARK_LOCAL, datagram(A, B))
    wait_for(lambda: lab.switch.get("ports", "port", 1).held_to == 1, "it waits")
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT, datagram(A, REMOTE))
    assert a.receive() == datagram(A, REMOTE), "what the source held does not"
    assert lab.counted(1, "came") == 2


@pytest.mark.parametrize("judged", [0, MODEL.MARK_JUDGED])
def test_broadcast_of_a_source_that_is_late_has_come_already(lab: Lab, judged: int) -> None:
    """The port takes what its network floods: of the same broadcast there may be two, and at most one arrives."""
    outside, a = overlay(lab)
    channel(lab, 1)
    for frame in (datagram(BROADCAST, REMOTE), datagram("33:33:00:00:00:01", REMOTE), datagram(A, REMOTE)):
        arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT | judged, frame)
    assert a.receive() == datagram(A, REMOTE)
    assert lab.drops(1) == {MODEL.DROP_BROADCAST_PATH: 2}


@pytest.mark.parametrize("wrong", ["unknown", "source", "epoch"])
def test_rule_a_redirect_that_is_not_the_ports_own_is_dropped(lab: Lab, wrong: str) -> None:
    outside, a = overlay(lab)
    if wrong != "unknown":
        channel(lab, 1, epoch=2 if wrong == "epoch" else 1, origin="192.0.2.9" if wrong == "source" else UNDERLAY[1])
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT, datagram(A, REMOTE))
    slot = 1 if wrong == "epoch" else 0
    wait_for(lambda: lab.drops(slot) == {MODEL.DROP_CHANNEL: 1}, "drop counted")
    assert a.waiting() == []


def test_rule_a_frame_is_redirected_twice_at_most(lab: Lab) -> None:
    outside, _ = overlay(lab)
    redirected(lab, 2, B, epoch=4)
    channel(lab, 2, epoch=4)
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT, datagram(B, REMOTE))
    assert leave(outside) == (UNDERLAY[1], CHANNEL, MODEL.MARK_REDIRECT | 1, datagram(B, REMOTE))
    for hops in (1, 2, 3):
        arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT | hops, datagram(B, REMOTE))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_HOPS: 3}, "drops counted")


def test_redirect_ends_with_its_lease(lab: Lab) -> None:
    outside, a = overlay(lab)
    lab.place(B, MODEL.L2_PORT, 2)
    redirected(lab, 2, B, lease=1)
    a.send(datagram(B, A))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_LEASE: 1}, "drop counted")
    assert left(outside) == []


def test_broadcast_and_floods_do_not_follow_a_vm(lab: Lab) -> None:
    outside, a = overlay(lab)
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_PORT, 2, 0)], kind=MODEL.NETWORK_OVERLAY, vni=VNI)
    redirected(lab, 2, B)
    a.send(datagram(BROADCAST, A))
    a.send(datagram(OTHER, A))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_BROADCAST_PATH: 2}, "drops counted")
    assert left(outside) == []


def test_rule_a_flood_does_not_follow_the_vm(lab: Lab) -> None:
    """The network forgets where a VM is, and floods what is for it: both hosts get that, and one of them is enough."""
    outside, _ = overlay(lab)
    redirected(lab, 2, B)
    uplink, fabric = lab.uplink(mac(0x99))
    lab.network(2, [(MODEL.L2_PORT, 2, 0)], kind=MODEL.NETWORK_UPLINK, uplink=uplink, vid=100)
    lab.vlan(uplink, 100, 2)
    lab.place(B, MODEL.L2_PORT, 2, network=2, flags=MODEL.L2_F_LOCATION)
    to, from_ = datagram(B, REMOTE, vlan=100), datagram(REMOTE, B, vlan=100)
    follows = (UNDERLAY[1], CHANNEL, MODEL.MARK_REDIRECT, datagram(B, REMOTE))

    def away(*since: int) -> int:
        return int(lab.change_place(B, 2, **({"away": since[0]} if since else {})).away)

    def moment() -> int:
        return (time.monotonic_ns() >> 20) & 0xFFFFFFFF

    fabric.send(to)
    assert leave(outside) == follows, "the network believes it here"
    lab.change_port(2, gate=MODEL.GATE_LOCAL)
    lab.switch.run("from_uplink", from_, uplink)
    assert away() == 0, "a VM that is here is not elsewhere"
    lab.change_port(2, gate=MODEL.GATE_REDIRECT)
    lab.switch.run("from_uplink", from_, uplink)
    heard = away()
    assert 0 <= moment() - heard < 60_000, "it is heard from elsewhere"

    def follows_at_first() -> bool:
        away(moment() - 60)
        fabric.send(to)
        return follows in map(untunnelled, left(outside))

    wait_for(follows_at_first, "what was under way still follows")
    before, long_ago = lab.drops(2).get(MODEL.DROP_BROADCAST_PATH, 0), moment() - 1000
    left(outside), away(long_ago)
    fabric.send(to)
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_BROADCAST_PATH: before + 1}, "drop counted")
    lab.switch.run("from_uplink", from_, uplink)
    assert (away(), left(outside)) == (long_ago, [])


def test_held_frames_follow_the_vm_broadcast_too(lab: Lab) -> None:
    outside, _ = overlay(lab)
    redirected(lab, 2, B)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, held_to=2)
    for frame in (datagram(B, A), datagram(BROADCAST, A)):
        tap.write(frame)
        assert leave(outside) == (UNDERLAY[1], CHANNEL, MODEL.MARK_REDIRECT, frame)
    wait_for(lambda: lab.switch.get("ports", "port", 2).held_to == 0, "nothing held")


def test_drained_frames_are_not_judged_again(lab: Lab) -> None:
    outside, a = overlay(lab, flags=MODEL.PORT_F_UNSETTLED)  # no policy: it would drop them
    lab.switch.inner("conntracks", 1, "ct_table", 64)
    redirected(lab, 2, B)
    tap = lab.tap(2, MODEL.DEVICE_JUDGED)
    tap.write(datagram(B, A))
    mark = MODEL.MARK_REDIRECT | MODEL.MARK_JUDGED
    assert leave(outside) == (UNDERLAY[1], CHANNEL, mark, datagram(B, A))
    channel(lab, 1)
    arrive(outside, UNDERLAY, CHANNEL, mark, datagram(A, B))
    assert a.receive() == datagram(A, B)
    assert lab.counted(1, "packets", 1) == 0
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT, datagram(A, B))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_POLICY: 1}, "the others are")
    assert a.waiting() == []


def test_drained_frames_go_back_to_their_guest_when_the_move_failed(lab: Lab) -> None:
    lab.network(1)
    a = lab.port(1, A, flags=0)
    tap = lab.tap(1, MODEL.DEVICE_JUDGED)
    tap.write(datagram(A, B))
    assert a.receive() == datagram(A, B)
    assert lab.counted(1, "packets", 1) == 0


def test_drained_frames_wait_for_no_port_that_is_not_active(lab: Lab) -> None:
    outside, a = overlay(lab, state=MODEL.PORT_STAGED, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_UNSETTLED)
    channel(lab, 1)
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT | MODEL.MARK_JUDGED, datagram(A, B))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_NOT_ACTIVE: 1}, "drop counted")
    assert a.waiting() == []


def test_a_probe_reaches_the_agent_and_no_port(lab: Lab) -> None:
    outside, a = overlay(lab)
    channel(lab, 1)
    ring = lab.ring()
    frame = datagram(A, REMOTE, bytes(range(200)))
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_PROBE, frame)
    records: list[bytes] = []
    wait_for(lambda: records.extend(ring.read()) or records, "an event")
    (event,) = [MODEL.event.from_buffer_copy(record) for record in records]
    assert (event.type, event.slot, event.rule, event.length) == (MODEL.EVENT_PROBE, 1, CHANNEL, len(frame))
    assert bytes(event.data) == frame[: MODEL.EVENT_BYTES]
    assert a.waiting() == []


def test_a_trunk_ports_tag_goes_through_a_redirect(lab: Lab) -> None:
    trunk = MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRUNK
    outside, a = overlay(lab, flags=trunk)
    lab.place(B, MODEL.L2_PORT, 2, vlan=7)
    redirected(lab, 2, B, flags=trunk)
    a.send(datagram(B, A))
    mark = MODEL.MARK_REDIRECT | MODEL.MARK_LOCAL
    assert leave(outside) == (UNDERLAY[1], CHANNEL, mark, datagram(B, A, vlan=7))
    channel(lab, 1)
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT, datagram(A, B, vlan=7))
    assert a.receive() == datagram(A, B, vlan=7)
