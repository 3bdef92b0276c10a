# SPDX-License-Identifier: GPL-2.0-only
"""Connections and policies in states that are rare: entries that no packet leaves so, tables that are gone or full."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator

import pytest

from . import frames
from .frames import ICMP6, TCP, UDP
from .harness import Switch
from .model import MODEL
from .packets import MORE, v4, wrap
from .probe import ACK, BOTH, FROM, FROM_ONLY, ICMP, RST, SYN, TO, Probe, flags, icmp, rule, state
from .test_control_sweep import sweep
from .test_ct_fragments import pieces, record_key
from .test_ct_related import error

Ports = Callable[..., Probe]
GRE = 47


def learning(ports: Ports, rules: list[dict[str, object]]) -> Probe:
    return ports(rules, flags=MODEL.PORT_F_LEARNING)


# -- entries


def test_tcp_in_a_state_that_it_has_not(ports: Ports) -> None:
    """Such an entry belongs to no packet, and expires as one that is closed."""
    port = ports(BOTH)
    port.put(port.key(TCP), MODEL.CT_NEW, MODEL.CT_F_REPLIED, seen=1)
    assert port.tcp(FROM, ACK) == MODEL.DROP_CT_INVALID
    assert sweep(port, now=1 + 10_000_000_000).marked == 0
    assert sweep(port, now=2 + 10_000_000_000).marked == 1


def test_a_state_out_of_range_is_live_and_counted_in_none(ports: Ports) -> None:
    port = ports(BOTH)
    port.put(port.key(UDP), 99)
    counted = sweep(port)
    assert (counted.live, sum(counted.states)) == (1, 0)


def test_established_out_of_nothing_is_not_assured(ports: Ports) -> None:
    port = ports(BOTH)
    key = port.key(TCP)
    port.put(key, MODEL.CT_NONE, MODEL.CT_F_REPLIED)
    assert port.tcp(FROM, ACK) == MODEL.DROP_NONE
    assert (state(port.entry(key)), flags(port.entry(key))) == (MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED)


def test_port_time_does_not_run_backwards(ports: Ports) -> None:
    """The coarse clock may lie a tick before the base that an activation took from the exact one."""
    port = ports(BOTH)
    port.change(time_base=time.monotonic_ns() + 60_000_000_000)
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert port.entry(port.key(UDP, rport=53)).seen == 0


def test_a_second_overflow_changes_nothing(ports: Ports) -> None:
    port = ports(BOTH)
    port.track(1)
    assert [port.udp(FROM, lport) for lport in (1, 2, 3)] == [MODEL.DROP_NONE] * 3
    assert port.port.word == 1 << 32 | MODEL.PORT_F_OVERFLOW << 8 | MODEL.PORT_ACTIVE
    assert len(port.drain()) == 1


# -- a full table


def test_the_search_for_room_is_short(ports: Ports) -> None:
    port = ports(FROM_ONLY, limit=300)
    for lport in range(300):
        port.put(port.key(UDP, lport, 53), MODEL.CT_REPLIED, MODEL.CT_F_REPLIED)
    assert port.udp(FROM, 5000) == MODEL.DROP_CT_FULL
    assert (port.port.evicted, port.port.alarm_full) == (0, 1)


@pytest.mark.parametrize("v6", [False, True])
def test_a_record_that_has_no_room_costs_the_later_fragments(ports: Ports, v6: bool) -> None:
    port = ports(FROM_ONLY, limit=1)
    first, *later = pieces(FROM, v6)
    assert port.send(FROM, first) == MODEL.DROP_NONE
    assert port.table.keys() == [port.key(UDP, rport=53, v6=v6)]
    assert [port.send(FROM, each) for each in later] == [MODEL.DROP_FRAGMENT] * 2


def test_fragments_of_an_expired_connection(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    first, later, _ = pieces(FROM, False)
    assert port.send(FROM, first) == MODEL.DROP_NONE
    port.put(port.key(UDP, rport=53), MODEL.CT_NEW, MODEL.CT_F_DYING)
    assert port.send(FROM, later) == MODEL.DROP_FRAGMENT
    assert port.entry(record_key(port, FROM, False)) is not None


# -- learning


def test_what_the_policy_allows_is_learned_without_a_word(ports: Ports) -> None:
    port = learning(ports, FROM_ONLY)
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert flags(port.entry(port.key(UDP, rport=53))) == MODEL.CT_F_LEARNED
    assert port.counted("would_drop") == 0


@pytest.mark.parametrize("end", [RST, RST | ACK, 1 | ACK])
def test_the_end_of_an_unknown_connection_leaves_none(ports: Ports, end: int) -> None:
    port = learning(ports, BOTH)
    assert port.tcp(FROM, end) == MODEL.DROP_NONE
    assert port.table.keys() == []
    assert port.counted("would_drop") == 1


def test_the_answer_to_an_unknown_query_leaves_none(ports: Ports) -> None:
    port = learning(ports, BOTH)
    assert port.icmp(FROM, 0) == MODEL.DROP_NONE
    assert port.table.keys() == []
    assert port.counted("would_drop") == 1


def test_what_fits_no_state_passes_while_learning(ports: Ports) -> None:
    port = learning(ports, BOTH)
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED)
    assert port.tcp(FROM, SYN | ACK) == MODEL.DROP_NONE
    assert state(port.entry(key)) == MODEL.CT_ESTABLISHED
    assert port.counted("would_drop") == 1
    port.set_flags(0)
    assert port.tcp(FROM, SYN | ACK) == MODEL.DROP_CT_INVALID


# -- errors


@pytest.mark.parametrize(("offset", "expected"), [(0, "DROP_NONE"), (8, "DROP_CT_INVALID")])
def test_an_error_about_a_protocol_without_ports(ports: Ports, offset: int, expected: str) -> None:
    """Its later fragment names no connection, whatever the protocol."""
    port = ports(FROM_ONLY)
    assert port.send(FROM, wrap(FROM, v4(FROM, GRE, bytes(16)))) == MODEL.DROP_NONE
    assert error(port, TO, v4(FROM, GRE, bytes(8), offset=offset)) == getattr(MODEL, expected)


# -- policies


def test_a_port_without_policy_ends_its_connections(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    assert port.udp(FROM) == MODEL.DROP_NONE
    port.switch.put("policies", port.slot, 0)
    assert port.udp(FROM) == MODEL.DROP_POLICY
    assert port.table.keys() == []
    assert port.hits(0)[0] == 1


@pytest.mark.parametrize("table", ["acl_tries", "acl_lines", "acl_rows", "acl_rules"])
def test_a_policy_that_is_being_replaced_concludes_nothing(ports: Ports, table: str) -> None:
    """Its generation is gone when the reader comes to it: the connection stays, the sender repeats."""
    port = ports(FROM_ONLY)
    assert port.udp(FROM) == MODEL.DROP_NONE
    digest = port.set_policy(BOTH)
    word = struct.unpack("=Q", port.switch.maps["policies"].lookup(struct.pack("=I", port.slot)) or b"")[0]
    assert word >> 32 == digest
    port.switch.maps[table].delete(struct.pack("=I", word & 0xFFFFFFFF))
    assert port.udp(FROM) == MODEL.DROP_CT_RACE
    assert port.entry(port.key(UDP, rport=53)).packets[0] == 1
    assert port.udp(FROM, 5000) == MODEL.DROP_CT_RACE


@pytest.mark.parametrize("v6", [False, True])
def test_a_later_fragment_is_judged_again_as_its_query(ports: Ports, v6: bool) -> None:
    """Its own type is not in it; the connection's request stands for it."""
    port = ports(FROM_ONLY)
    proto, name, request = (ICMP6, "icmpv6", 128) if v6 else (ICMP, "icmp", 8)
    if v6:
        data = icmp(request, 0, 7, bytes(120))
        parts = [struct.pack("!BBHI", proto, 0, at | (not at), 9) + data[at : at + 64] for at in (0, 64)]
        made = [wrap(FROM, frames.ipv6("2001:db8::1", "2001:db8:f::9", 44, part)) for part in parts]
    else:
        data = icmp(request, 0, 7, bytes(120))
        made = [wrap(FROM, v4(FROM, proto, data[:64], offset=MORE)), wrap(FROM, v4(FROM, proto, data[64:], offset=8))]
    assert [port.send(FROM, each) for each in made] == [MODEL.DROP_NONE] * 2
    port.set_policy([rule(3, "from", protocol=name, icmp=[request, 0])])
    assert port.send(FROM, made[1]) == MODEL.DROP_NONE
    port.set_policy([rule(4, "from", protocol=name, icmp=[13, 0])])
    assert port.send(FROM, made[1]) == MODEL.DROP_POLICY
    assert (port.hits(3)[0], port.hits(0)[0]) == (0, 1)


@pytest.fixture
def full_hits(loaded_probe: Switch) -> Iterator[None]:
    """The map of rules' hits has no room."""
    hits = loaded_probe.maps["rule_hits"]
    there = len(hits.keys())
    keys = [struct.pack("=II", 0xFFFF0000, number) for number in range(hits.max_entries - there)]
    hits.fill(keys)
    yield
    hits.empty(keys)


@pytest.mark.usefixtures("full_hits")
def test_hits_that_have_no_room_are_not_counted_and_cost_no_packet(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert port.hits(1) == (0, 0)
