# SPDX-License-Identifier: GPL-2.0-only
"""What a hostile guest or neighbour can have the switch note and tell: bounded, and at nobody else's cost."""

from __future__ import annotations

import struct
import time
from collections import Counter

import pytest

from datapath.drivers.ebpf.acl import compile_rules

from .frames import datagram, mac
from .lab import UNDERLAY, Lab, wait_for
from .model import MODEL
from .probe import load_policy, rule
from .test_forward_tunnel import CHANNEL, FAR, VNI, arrive, channel, overlay
from .test_forward_uplink import on_uplink

PEER = mac(0x77)
FLOOD = 20_000
LOGS, LOGS_OF_HOST, TRACES = 64, 512, 2048  # at once; then so many a second:
LOG_RATE, LOG_RATE_OF_HOST, TRACE_RATE = 10, 200, 2_000
LEARNED_MAX = 50


def logging_ports(lab: Lab, count: int) -> None:
    """Ports 1.. whose policy allows all and logs each."""
    lab.network(1)
    compiled = compile_rules([rule(9, "from", log=True)])
    load_policy(lab.switch, 1, compiled)
    lab.switch.put("policies", 1, compiled.digest << 32 | 1)
    for slot in range(1, count + 1):
        lab.set_port(slot, mac(slot), flags=0, policy=1)
        lab.switch.inner("conntracks", slot, "ct_table", 64)


def flood(lab: Lab, slot: int, frames: int = FLOOD) -> float:
    """Frames of the guest in `slot`, of a sort that the policy judges one by one; returns the seconds it took."""
    lab.switch.put("devices", 1, MODEL.device(slot=slot, role=MODEL.DEVICE_PORT))
    began = time.monotonic()
    lab.switch.run("from_port", datagram("33:33:00:00:00:01", mac(slot)), 1, repeat=frames)
    return time.monotonic() - began


def told(records: list[bytes]) -> Counter[tuple[int, int]]:
    """(type, slot) -> events."""
    events = [MODEL.event.from_buffer_copy(record) for record in records]
    return Counter((event.type, event.slot) for event in events)


def test_a_guest_that_matches_a_logging_rule_without_end_is_logged_a_few_times(lab: Lab) -> None:
    """And every hit is counted, and another guest's is logged all the same."""
    logging_ports(lab, 2)
    ring = lab.ring()
    took = flood(lab, 1)
    flood(lab, 2, 1)
    logged = told(ring.read())
    assert LOGS <= logged[MODEL.EVENT_LOG, 1] <= LOGS + LOG_RATE * (took + 1)
    assert logged[MODEL.EVENT_LOG, 2] == 1
    assert lab.counted(1, "packets", 0) == FLOOD
    hits = lab.switch.maps["rule_hits"].lookup(struct.pack("=II", 1, 9))
    assert hits is not None
    assert sum(struct.unpack(f"={len(hits) // 8}Q", hits)[::2]) == FLOOD


def test_hostile_guests_together_are_logged_within_the_limit_of_the_host(lab: Lab) -> None:
    logging_ports(lab, 12)
    ring = lab.ring()
    began = time.monotonic()
    for slot in range(1, 13):
        flood(lab, slot, 1000)
    took = time.monotonic() - began
    assert LOGS_OF_HOST <= told(ring.read()).total() <= LOGS_OF_HOST + LOG_RATE_OF_HOST * (took + 1)


def test_a_traced_guest_that_floods_leaves_room_for_what_others_have_to_tell(lab: Lab) -> None:
    logging_ports(lab, 2)
    lab.set_port(1, mac(1), flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRACE)
    lab.set_port(2, mac(2), epoch=5, commit=5, state=MODEL.PORT_STAGED)
    ring = lab.ring()
    took = flood(lab, 1)
    flood(lab, 2, 1)
    events = told(ring.read())
    assert TRACES <= events[MODEL.EVENT_TRACE, 1] <= TRACES + TRACE_RATE * (took + 1)
    assert events[MODEL.EVENT_OPENED, 2] == 1, "that its guest runs is told, whatever others do"


def limit(lab: Lab, network: int) -> None:
    lab.switch.put("learning", network, MODEL.learning(max=LEARNED_MAX))


def learned(lab: Lab, network: int) -> int:
    return int(lab.switch.get("learning", "learning", network).count)


@pytest.mark.parametrize("limited", ["network", "all"])
@pytest.mark.parametrize("vid", [0, 100])
def test_a_neighbour_that_invents_sources_is_learned_to_a_limit(lab: Lab, vid: int, limited: str) -> None:
    """What is beyond it is forwarded all the same, and a VM's place is written whatever it has done."""
    uplink, _, _ = on_uplink(lab, vid)
    limit(lab, 1 if limited == "network" else 0)
    for number in range(LEARNED_MAX + 20):
        lab.switch.run("from_uplink", datagram(mac(1), mac(0x1000 + number), vlan=vid), uplink)
    assert (learned(lab, 1), learned(lab, 0)) == (LEARNED_MAX, LEARNED_MAX)
    assert lab.placed(mac(0x1000)) == (MODEL.L2_UPLINK, uplink)
    assert lab.placed(mac(0x1000 + LEARNED_MAX)) is None
    device = lab.switch.get("ports", "port", 1).ifindex
    lab.set_port(1, mac(1), ifindex=device, state=MODEL.PORT_STAGED, commit=1)
    lab.switch.run("from_port", datagram(mac(0x1000), mac(1)), device)
    assert lab.placed(mac(1)) == (MODEL.L2_PORT, 1)


def test_a_host_that_invents_sources_is_learned_to_a_limit(lab: Lab) -> None:
    outside, a = overlay(lab)
    limit(lab, 1)
    for number in range(LEARNED_MAX + 5):
        arrive(outside, UNDERLAY, VNI, 0, datagram(mac(1), mac(0x1000 + number), b"%d" % number))
        assert a.receive().rstrip(b"\0").endswith(b"%d" % number)
    assert learned(lab, 1) == LEARNED_MAX
    assert lab.placed(mac(0x1000)) == (MODEL.L2_TUNNEL, FAR)
    assert lab.placed(mac(0x1000 + LEARNED_MAX)) is None


def test_a_host_that_invents_sources_moves_no_vm(lab: Lab) -> None:
    """Not the one that is here, nor one whose place the coordinator has told."""
    outside, a = overlay(lab)
    lab.host(FAR + 1, "192.0.2.3")
    lab.place(mac(1), MODEL.L2_PORT, 1, flags=MODEL.L2_F_LOCATION)
    lab.place(PEER, MODEL.L2_TUNNEL, FAR + 1, flags=MODEL.L2_F_LOCATION)
    for source in (mac(1), PEER):
        arrive(outside, UNDERLAY, VNI, 0, datagram("ff:ff:ff:ff:ff:ff", source))
        a.receive()
    assert lab.placed(mac(1)) == (MODEL.L2_PORT, 1)
    assert lab.placed(PEER) == (MODEL.L2_TUNNEL, FAR + 1)


@pytest.mark.parametrize("flags", [MODEL.PORT_F_UNSETTLED, 0], ids=["while it settles", "when it is settled"])
def test_a_source_is_believed_to_have_judged_until_it_has_settled(lab: Lab, flags: int) -> None:
    """Then a frame that says so goes past no policy, whoever has found out the channel."""
    outside, a = overlay(lab, flags=flags)  # no policy: nothing new may pass
    lab.switch.inner("conntracks", 1, "ct_table", 64)
    channel(lab, 1)
    frame = datagram(mac(1), PEER, b"judged")
    arrive(outside, UNDERLAY, CHANNEL, MODEL.MARK_REDIRECT | MODEL.MARK_JUDGED, frame)
    if flags:
        assert a.receive() == frame
    else:
        wait_for(lambda: lab.drops(1) == {MODEL.DROP_POLICY: 1}, "it is judged")
