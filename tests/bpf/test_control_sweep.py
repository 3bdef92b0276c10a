# SPDX-License-Identifier: GPL-2.0-only
"""The sweeps over a connection table: expiry in two passes, early drop, flush."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from . import frames
from .frames import ICMP6, TCP, UDP
from .model import MODEL
from .probe import ACK, BOTH, FROM, GUEST, ICMP, PEER, TIMEOUTS_MS, Probe, flags

Ports = Callable[..., Probe]
SECOND = 1_000_000_000
LIVE = MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED


def sweep(port: Probe, program: str = "ct_expire", **fields: Any) -> Any:
    context = MODEL.ct_sweep(slot=port.slot, **fields)
    assert port.switch.call(program, context) == 0
    return context


def key_fields(raw: bytes) -> Any:
    return MODEL.ct_key.from_buffer_copy(raw)


KINDS = [
    *((TCP, name, name) for name in TIMEOUTS_MS if name.startswith("CT_")),
    (UDP, "CT_NEW", "TIMEOUT_UDP"),
    (UDP, "CT_REPLIED", "TIMEOUT_UDP_STREAM"),
    (ICMP, "CT_REPLIED", "TIMEOUT_ICMP"),
    (ICMP6, "CT_NEW", "TIMEOUT_ICMP"),
    (132, "CT_REPLIED", "TIMEOUT_OTHER"),
]


@pytest.mark.parametrize(("proto", "name", "timeout"), KINDS)
def test_each_state_has_its_timeout(ports: Ports, proto: int, name: str, timeout: str) -> None:
    port = ports(BOTH)
    key, seen, limit = port.key(proto), 10**15, TIMEOUTS_MS[timeout] * 1_000_000
    port.put(key, getattr(MODEL, name), LIVE, seen=seen)
    assert sweep(port, now=seen + limit).marked == 0
    assert sweep(port, now=seen + limit + 1).marked == 1
    assert flags(port.entry(key)) == LIVE | MODEL.CT_F_DYING


def test_fragment_records_expire(ports: Ports) -> None:
    port = ports(BOTH)
    key = port.key(TCP, type=MODEL.CT_TYPE_FRAGMENT)
    port.put(key, MODEL.CT_NEW, seen=1)
    limit = TIMEOUTS_MS["TIMEOUT_FRAGMENT"] * 1_000_000
    kept = sweep(port, now=1 + limit)
    assert (kept.fragments, kept.live, kept.marked) == (1, 0, 0)
    assert sweep(port, now=2 + limit).marked == 1


def test_rule_two_passes(ports: Ports) -> None:
    port = ports(BOTH)
    port.track()
    old, fresh = port.key(UDP, 1), port.key(UDP, 2)
    port.put(old, MODEL.CT_NEW, seen=1)
    port.put(fresh, MODEL.CT_REPLIED, LIVE)
    first = sweep(port)
    assert (first.visited, first.live, first.marked, first.deleted, first.revived) == (2, 1, 1, 0, 0)
    assert list(first.states) == [int(each == MODEL.CT_REPLIED) for each in range(MODEL.CT_STATES)]
    assert port.drain() == {old}
    second = sweep(port)
    assert (second.visited, second.live, second.marked, second.deleted) == (2, 1, 0, 1)
    assert port.table.keys() == [fresh]
    assert port.drain() == {old}
    assert sweep(port).visited == 1


def test_a_packet_in_time_saves_it(ports: Ports) -> None:
    """`seen` moved after the entry was marked, by a packet that had found it live."""
    port = ports(BOTH)
    port.track()
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, LIVE | MODEL.CT_F_DYING)
    result = sweep(port)
    assert (result.revived, result.deleted, result.live) == (1, 0, 1)
    assert flags(port.entry(key)) == LIVE
    assert port.drain() == {key}
    assert port.tcp(FROM, ACK) == MODEL.DROP_NONE


def test_the_floor_grants_a_full_timeout(ports: Ports) -> None:
    port = ports(BOTH)
    key, limit = port.key(UDP), TIMEOUTS_MS["TIMEOUT_UDP"] * 1_000_000
    floor = 10**15
    port.put(key, MODEL.CT_NEW, seen=1)
    port.change(time_floor=floor)
    assert sweep(port, now=floor + limit).marked == 0
    assert sweep(port, now=floor + limit + 1).marked == 1


def test_an_unsettled_port_keeps_tombstones(ports: Ports) -> None:
    port = ports(BOTH, flags=MODEL.PORT_F_UNSETTLED)
    key = port.key(UDP)
    port.put(key, MODEL.CT_NEW, seen=1)
    assert sweep(port).marked == 1
    for _ in range(3):
        result = sweep(port)
        assert (result.deleted, result.marked, result.live) == (0, 0, 0)
    assert flags(port.entry(key)) == MODEL.CT_F_DYING
    port.set_flags(0)
    assert sweep(port).deleted == 1


def test_the_dead_are_their_killers(ports: Ports) -> None:
    port = ports(BOTH)
    port.put(port.key(UDP), MODEL.CT_NEW, MODEL.CT_F_DEAD, seen=1)
    assert sweep(port).deleted == 0


def test_every_entry_of_a_large_table_goes(ports: Ports) -> None:
    port = ports(BOTH, limit=8192)
    for lport in range(5000):
        port.put(port.key(UDP, lport), MODEL.CT_NEW, seen=1)
    assert sweep(port).marked == 5000
    assert sweep(port).deleted == 5000
    assert port.table.keys() == []


@pytest.mark.parametrize("program", ["ct_expire", "ct_early_drop", "ct_flush"])
@pytest.mark.parametrize("name", ["PORT_FREE", "PORT_STAGED", "PORT_QUIESCED", "PORT_STUB"])
def test_only_an_active_port_is_swept(ports: Ports, name: str, program: str) -> None:
    port = ports(BOTH)
    port.put(port.key(UDP), MODEL.CT_NEW, seen=1)
    before = port.table.items()
    port.set_flags(0, getattr(MODEL, name))
    assert port.switch.call(program, MODEL.ct_sweep(slot=port.slot, limit=9)) == -errno.EBUSY
    assert port.table.items() == before


def test_without_a_table(ports: Ports) -> None:
    port = ports(BOTH)
    port.switch.maps["conntracks"].delete(struct.pack("=I", port.slot))
    assert port.switch.call("ct_expire", MODEL.ct_sweep(slot=port.slot)) == -errno.ENOENT
    assert port.switch.call("ct_expire", MODEL.ct_sweep(slot=1 << 20)) == -errno.EBUSY


def test_early_drop(ports: Ports) -> None:
    port = ports(BOTH)
    port.track()
    good = [port.key(TCP, lport) for lport in range(20)]
    poor = {port.key(UDP, lport) for lport in range(10)} | {port.key(TCP, lport) for lport in range(20, 30)}
    for key in good:
        port.put(key, MODEL.CT_ESTABLISHED, LIVE)
    for key in poor:
        closing = key_fields(key).proto == TCP
        port.put(key, MODEL.CT_TIME_WAIT if closing else MODEL.CT_NEW, LIVE if closing else 0)
    assert sweep(port, "ct_early_drop", limit=0).deleted == 0
    assert sweep(port, "ct_early_drop", limit=7).deleted == 7
    gone = poor - set(port.table.keys())
    assert len(gone) == 7 and port.drain() == gone
    assert sweep(port, "ct_early_drop", limit=100).deleted == 13
    assert set(port.table.keys()) == set(good)


FILTERS = [
    ({}, 8),
    ({"proto": UDP}, 4),
    ({"lport": 1}, 4),
    ({"rport": 53}, 4),
    ({"proto": UDP, "lport": 2}, 2),
    ({"raddr": PEER}, 8),
    ({"laddr": GUEST, "raddr": PEER, "rport": 80, "proto": TCP}, 2),
    ({"raddr": "192.0.2.200"}, 0),
    ({"proto": 1}, 0),
    ({"type": MODEL.CT_TYPE_FRAGMENT}, 1),
]


@pytest.mark.parametrize(("wanted", "count"), FILTERS)
def test_flush(ports: Ports, wanted: dict[str, Any], count: int) -> None:
    port = ports(BOTH)
    port.track()
    for proto in (TCP, UDP):
        for lport in (1, 2):
            for rport in (53, 80):
                port.put(
                    port.key(proto, lport, rport), MODEL.CT_ESTABLISHED if proto == TCP else MODEL.CT_REPLIED, LIVE
                )
    port.put(port.key(UDP, type=MODEL.CT_TYPE_FRAGMENT), MODEL.CT_NEW)
    match = MODEL.ct_key()
    for name, value in wanted.items():
        if name in ("laddr", "raddr"):
            getattr(match, name)[:] = struct.unpack("=4I", frames.address(value))
        else:
            setattr(match, name, struct.unpack("!H", struct.pack("=H", value))[0] if "port" in name else value)
    before = set(port.table.keys())
    assert sweep(port, "ct_flush", match=match).deleted == count
    gone = before - set(port.table.keys())
    assert len(gone) == count and port.drain() == gone
