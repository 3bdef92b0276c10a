# SPDX-License-Identifier: GPL-2.0-only
"""What connections hand over when they end: their last counts, however they end, and nothing for ports that export
no flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .frames import TCP, UDP
from .model import MODEL
from .probe import ACK, BOTH, FIN, FROM, FROM_ONLY, PSH, RST, SYN, TO, Probe, flags, rule, state
from .sysbpf import Map
from .test_control_sweep import sweep

Ports = Callable[..., Probe]


def export(port: Probe, room: int = 64) -> Map:
    """The port exports flows. Returns the table of those that have ended."""
    ends = port.switch.inner("flow_ends", port.slot, "flow_end_table", room)
    port.change(features=MODEL.FEATURE_EXPORT)
    return ends


def ended(ends: Map) -> list[tuple[Any, Any]]:
    """(struct flow_end, struct ct_entry) of each."""
    keys = ends.keys()
    found = [(key, ends.lookup(key)) for key in keys]
    return [(MODEL.flow_end.from_buffer_copy(k), MODEL.ct_entry.from_buffer_copy(v)) for k, v in found if v]


def lost(port: Probe) -> tuple[int, int, int]:
    counted = port.switch.get("flow_lost", "flow_lost", port.slot)
    return counted.flows, counted.packets, counted.bytes


def _expire(port: Probe) -> None:
    port.pass_time(500_000)
    assert (sweep(port).marked, sweep(port).deleted) == (1, 1)


def _flush(port: Probe) -> None:
    assert sweep(port, "ct_flush").deleted == 1


def _early_drop(port: Probe) -> None:
    assert sweep(port, "ct_early_drop", limit=1).deleted == 1


def _forbid(port: Probe) -> None:
    port.set_policy([rule(1, "from", "drop")])
    assert port.udp(FROM) == MODEL.DROP_POLICY


def _evict(port: Probe) -> None:
    assert port.udp(FROM, 40001) == MODEL.DROP_NONE
    assert port.port.evicted == 1


def _renew(port: Probe) -> None:
    port.pass_time(500_000)
    assert sweep(port).marked == 1
    assert port.udp(FROM) == MODEL.DROP_NONE


WAYS: dict[str, tuple[Callable[[Probe], None], str]] = {
    "expire": (_expire, "FLOW_IDLE"),
    "flush": (_flush, "FLOW_FORCED"),
    "early drop": (_early_drop, "FLOW_NO_ROOM"),
    "policy": (_forbid, "FLOW_FORCED"),
    "evict": (_evict, "FLOW_NO_ROOM"),
    "renew": (_renew, "FLOW_ENDED"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_last_counts_are_kept(ports: Ports, way: str) -> None:
    port = ports(FROM_ONLY, limit=1)
    ends = export(port)
    for data in (b"one", b"three"):
        assert port.udp(FROM, data=data) == MODEL.DROP_NONE
    before = port.entry(port.key(UDP, rport=53))
    act, reason = WAYS[way]
    act(port)
    ((end, entry),) = ended(ends)
    assert (end.id, end.reason, bytes(end.key)) == (before.id, getattr(MODEL, reason), port.key(UDP, rport=53))
    assert (list(entry.packets), list(entry.bytes)) == ([2, 0], [2 * 28 + 8, 0])
    assert (entry.began, entry.seen) == (before.began, before.seen)
    assert lost(port) == (0, 0, 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_port_that_exports_nothing_keeps_nothing(ports: Ports, way: str) -> None:
    port = ports(FROM_ONLY, limit=1)
    ends = export(port)
    port.change(features=0)
    assert port.udp(FROM) == MODEL.DROP_NONE
    WAYS[way][0](port)
    assert ended(ends) == []


@pytest.mark.parametrize("way", WAYS)
def test_where_there_is_no_room(ports: Ports, way: str) -> None:
    """A sweep lets the connection wait; what a packet ends is counted as lost."""
    port = ports(FROM_ONLY, limit=1)
    ends = export(port, room=1)
    ends.update(bytes(MODEL.flow_end(id=7)), bytes(MODEL.ct_entry()))
    assert port.udp(FROM) == MODEL.DROP_NONE
    if way in ("policy", "evict", "renew"):
        WAYS[way][0](port)
        assert lost(port) == (1, 1, 28)
        return
    with pytest.raises(AssertionError):
        WAYS[way][0](port)
    assert port.entry(port.key(UDP, rport=53)) is not None
    assert lost(port) == (0, 0, 0)
    ends.delete(bytes(MODEL.flow_end(id=7)))
    sweep(port, "ct_flush")
    assert [entry.packets[0] for _, entry in ended(ends)] == [1]


def test_a_connection_that_waits_for_room_goes_on(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    ends = export(port, room=1)
    ends.update(bytes(MODEL.flow_end(id=7)), bytes(MODEL.ct_entry()))
    port.udp(FROM)
    assert sweep(port, "ct_flush").deleted == 0
    assert port.udp(FROM) == MODEL.DROP_NONE
    entry = port.entry(port.key(UDP, rport=53))
    assert (flags(entry), entry.packets[0]) == (0, 2)


def test_tcp_flags_of_each_direction(ports: Ports) -> None:
    port = ports(BOTH)
    ends = export(port)
    began = port.now()
    for direction, sent in ((FROM, SYN), (TO, SYN | ACK), (FROM, ACK | PSH), (TO, FIN | ACK), (FROM, RST)):
        assert port.tcp(direction, sent) == MODEL.DROP_NONE
    entry = port.entry(port.key(TCP))
    assert entry.tcp_flags == (SYN | ACK | PSH | RST) | (SYN | ACK | FIN) << 8
    assert began - 20_000_000 <= entry.began <= port.now()
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE  # another one
    again = port.entry(port.key(TCP))
    assert (state(again), again.tcp_flags) == (MODEL.CT_SYN_SENT, SYN)
    assert (again.packets[0], again.id != entry.id) == (1, True)
    ((end, last),) = ended(ends)
    assert (end.id, last.tcp_flags, list(last.packets)) == (entry.id, entry.tcp_flags, [3, 2])


def test_flags_of_a_connection_that_the_remote_side_begins(ports: Ports) -> None:
    port = ports(BOTH)
    export(port)
    for direction, sent in ((TO, SYN), (FROM, SYN | ACK), (TO, ACK), (TO, ACK)):
        assert port.tcp(direction, sent) == MODEL.DROP_NONE
    assert port.entry(port.key(TCP)).tcp_flags == (SYN | ACK) | (SYN | ACK) << 8


def test_no_flags_are_noted_where_nobody_asks(ports: Ports) -> None:
    port = ports(BOTH)
    port.tcp(FROM, SYN)
    port.tcp(TO, SYN | ACK)
    assert port.entry(port.key(TCP)).tcp_flags == 0


def test_connections_are_ended_by_their_keys(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    ends = export(port)
    for number in (1, 2, 3):
        port.udp(FROM, number)
    wanted = [port.key(UDP, number, 53) for number in (1, 3, 9)]
    for index, key in enumerate(wanted):
        port.switch.put("exchange", index, MODEL.exchange(key=MODEL.ct_key.from_buffer_copy(key)))
    context = MODEL.ct_batch(slot=port.slot, count=3)
    assert port.switch.call("ct_end", context) == 0
    assert context.found == 2
    found = [port.switch.get("exchange", "exchange", index).found for index in range(3)]
    assert found == [1, 1, 0]
    assert port.table.keys() == [port.key(UDP, 2, 53)]
    assert {bytes(end.key) for end, _ in ended(ends)} == set(wanted[:2])


def test_what_another_is_taking_away_is_left_to_it(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    ends = export(port)
    key = port.key(UDP, rport=53)
    port.put(key, MODEL.CT_REPLIED, MODEL.CT_F_DEAD)
    port.switch.put("exchange", 0, MODEL.exchange(key=MODEL.ct_key.from_buffer_copy(key)))
    context = MODEL.ct_batch(slot=port.slot, count=1)
    assert port.switch.call("ct_end", context) == 0
    assert (context.found, port.table.keys(), ended(ends)) == (0, [key], [])


def test_without_a_table_of_the_ended_they_are_lost(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    port.change(features=MODEL.FEATURE_EXPORT)
    port.udp(FROM)
    port.set_policy([rule(1, "from", "drop")])
    assert port.udp(FROM) == MODEL.DROP_POLICY
    assert lost(port) == (1, 1, 28)


def test_fragment_records_are_no_flows(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    ends = export(port)
    port.put(port.key(UDP, type=MODEL.CT_TYPE_FRAGMENT), MODEL.CT_NEW)
    port.switch.call("ct_flush", MODEL.ct_sweep(slot=port.slot, match=MODEL.ct_key(type=MODEL.CT_TYPE_FRAGMENT)))
    assert (port.table.keys(), ended(ends)) == ([], [])
