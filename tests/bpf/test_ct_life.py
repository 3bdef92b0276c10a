# SPDX-License-Identifier: GPL-2.0-only
"""Connections that are not TCP, and what all have in common: policy, counters, dirty keys, expired and full tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .frames import ICMP6, TCP, UDP
from .model import MODEL
from .probe import ACK, BOTH, FIN, FROM, FROM_ONLY, ICMP, PEER, RST, SYN, TO, Probe, flags, rule, state

Ports = Callable[..., Probe]
INBOUND = 0x8000  # rport of a query that the remote side asks
SCTP = 132


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("opener", [FROM, TO])
def test_datagrams(ports: Ports, opener: int, v6: bool) -> None:
    port = ports(BOTH)
    key = port.key(UDP, rport=53, v6=v6)
    opened = MODEL.CT_F_INBOUND if opener else 0
    answered = opened | MODEL.CT_F_REPLIED
    for direction, expected in (
        (opener, (MODEL.CT_NEW, opened)),
        (opener, (MODEL.CT_NEW, opened)),
        (1 - opener, (MODEL.CT_REPLIED, answered)),
        (1 - opener, (MODEL.CT_REPLIED, answered)),
        (opener, (MODEL.CT_REPLIED, answered | MODEL.CT_F_ASSURED)),
    ):
        assert port.udp(direction, v6=v6) == MODEL.DROP_NONE
        entry = port.entry(key)
        assert (state(entry), flags(entry)) == expected
        assert entry.judged == port.digest


def test_an_answer_needs_no_rule_and_a_stranger_does(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    assert port.udp(TO) == MODEL.DROP_POLICY
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert port.udp(TO) == MODEL.DROP_NONE
    assert port.udp(TO, peer="192.0.2.77") == MODEL.DROP_POLICY
    assert port.udp(TO, rport=54) == MODEL.DROP_POLICY
    assert len(port.table.keys()) == 1


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("opener", [FROM, TO])
def test_echo(ports: Ports, opener: int, v6: bool) -> None:
    request, answer = (128, 129) if v6 else (8, 0)
    port = ports(BOTH)
    key = port.key(ICMP6 if v6 else ICMP, 7, INBOUND if opener else 0, v6=v6)
    assert port.icmp(1 - opener, answer, v6=v6) == MODEL.DROP_CT_INVALID
    assert port.icmp(opener, request, v6=v6) == MODEL.DROP_NONE
    assert state(port.entry(key)) == MODEL.CT_NEW
    assert port.icmp(1 - opener, answer, v6=v6) == MODEL.DROP_NONE
    assert port.icmp(1 - opener, answer, 8, v6=v6) == MODEL.DROP_CT_INVALID
    assert state(port.entry(key)) == MODEL.CT_REPLIED
    assert flags(port.entry(key)) & MODEL.CT_F_REPLIED
    assert port.table.keys() == [key]


def test_both_sides_may_ping_with_one_identifier(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    assert port.icmp(FROM, 8) == MODEL.DROP_NONE
    assert port.icmp(TO, 8) == MODEL.DROP_POLICY
    assert port.icmp(FROM, 0) == MODEL.DROP_CT_INVALID
    assert port.icmp(TO, 0) == MODEL.DROP_NONE


@pytest.mark.parametrize("kind", [13, 15, 17])
def test_other_queries_are_connections_of_their_own(ports: Ports, kind: int) -> None:
    port = ports(FROM_ONLY)
    assert port.icmp(FROM, kind) == MODEL.DROP_NONE
    assert port.icmp(TO, 0) == MODEL.DROP_CT_INVALID
    assert port.icmp(TO, kind + 1) == MODEL.DROP_NONE
    assert port.table.keys() == [port.key(ICMP, 7, kind)]


def test_other_protocols_are_tracked_by_address(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    frame = [port.frame(direction, SCTP, bytes(range(12))) for direction in (FROM, TO)]
    assert port.send(TO, frame[TO]) == MODEL.DROP_POLICY
    assert port.send(FROM, frame[FROM]) == MODEL.DROP_NONE
    assert port.send(TO, frame[TO]) == MODEL.DROP_NONE
    assert state(port.entry(port.key(SCTP, 0, 0))) == MODEL.CT_REPLIED


def test_segments_of_a_gso_frame_count_one_by_one(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED)
    frame = port.frame(FROM, TCP, bytes.fromhex("9c40005000000001000000015010040000000000") + bytes(2001))
    assert port.send(FROM, frame, gso_size=500) == MODEL.DROP_NONE
    assert list(port.entry(key).packets) == [5, 0]
    assert list(port.entry(key).bytes) == [5 * 40 + 2001, 0]
    assert port.send(FROM, frame, gso_size=2001) == MODEL.DROP_NONE
    assert list(port.entry(key).packets) == [6, 0]


def test_a_packet_refreshes_its_connection(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    key = port.key(UDP, rport=53)
    port.put(key, MODEL.CT_REPLIED, MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED, seen=1)
    before = port.now()
    assert port.udp(FROM) == MODEL.DROP_NONE
    tick = 10_000_000  # of the coarse clock
    assert before - tick <= port.entry(key).seen <= port.now()


def test_time_never_goes_back(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    key = port.key(UDP, rport=53)
    later = port.now() + 10**12
    port.put(key, MODEL.CT_NEW, seen=later)
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert port.entry(key).seen == later


# -- policy


def test_without_policy_nothing_begins(ports: Ports) -> None:
    port = ports(BOTH)
    port.change(policy=0)
    assert port.udp(FROM) == MODEL.DROP_POLICY
    assert port.hits(0) == (1, 28)


def test_a_policy_that_still_allows_keeps_connections(ports: Ports) -> None:
    port = ports([rule(1, "to", protocol="tcp", ports=[[40000, 40000]])])
    port.track()
    key = port.key(TCP)
    assert port.tcp(TO, SYN) == MODEL.DROP_NONE
    identifier = port.entry(key).id
    digest = port.set_policy([rule(2, "to", protocol="tcp", remote=[f"{PEER}/32"])])
    port.drain()
    # an answer of the guest: judged as the direction that opened, not as its own
    assert port.tcp(FROM, SYN | ACK) == MODEL.DROP_NONE
    entry = port.entry(key)
    assert (entry.judged, entry.id) == (digest, identifier)
    assert port.drain() == {key}
    assert (port.hits(1), port.hits(2)) == ((1, 40), (0, 0))  # it began once


@pytest.mark.parametrize("action", ["drop", "reject"])
def test_a_policy_that_does_not_ends_connections(ports: Ports, action: str) -> None:
    port = ports(FROM_ONLY)
    port.track()
    key = port.key(TCP)
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE
    port.set_policy([rule(5, "from", action), rule(6, "to")])
    port.drain()
    expected = MODEL.DROP_POLICY if action == "drop" else MODEL.DROP_REJECT
    assert port.tcp(TO, SYN | ACK) == expected
    assert port.entry(key) is None
    assert port.drain() == {key}


def test_judged_under_none_is_judged_again(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED, judged=0)
    assert port.tcp(TO, ACK) == MODEL.DROP_NONE
    assert port.entry(key).judged == port.digest
    port.put(key, MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED | MODEL.CT_F_INBOUND, judged=0)
    assert port.tcp(FROM, ACK) == MODEL.DROP_POLICY
    assert port.entry(key) is None


def test_a_generation_that_is_gone_ends_nothing(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED, judged=1)
    port.switch.put("policies", port.slot, 77 << 32 | 0xFFFFFF)  # no such tables
    assert port.tcp(TO, ACK) == MODEL.DROP_CT_RACE
    assert state(port.entry(key)) == MODEL.CT_ESTABLISHED


# -- expired


@pytest.mark.parametrize("begins", [True, False])
def test_a_dying_connection_is_absent(ports: Ports, begins: bool) -> None:
    port = ports(FROM_ONLY)
    port.track()
    key = port.key(TCP)
    old = MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED | MODEL.CT_F_DYING
    port.put(key, MODEL.CT_ESTABLISHED, old, id=0x55, seen=1, judged=1, packets=(8, 8))
    if not begins:
        assert port.tcp(FROM, ACK) == MODEL.DROP_CT_INVALID
        assert flags(port.entry(key)) == old
        assert port.drain() == set()
        return
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE
    entry = port.entry(key)
    assert (state(entry), flags(entry), list(entry.packets)) == (MODEL.CT_SYN_SENT, 0, [1, 0])
    assert entry.id != 0x55 and entry.seen > 1 and entry.judged == port.digest
    assert port.drain() == {key}


def test_a_dying_datagram_flow_begins_anew_under_the_policy(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    key = port.key(UDP, rport=53)
    port.put(key, MODEL.CT_REPLIED, MODEL.CT_F_REPLIED | MODEL.CT_F_DYING)
    assert port.udp(TO) == MODEL.DROP_POLICY
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert state(port.entry(key)) == MODEL.CT_NEW


def test_a_dead_connection_is_not_revived(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    key = port.key(UDP, rport=53)
    port.put(key, MODEL.CT_REPLIED, MODEL.CT_F_REPLIED | MODEL.CT_F_DEAD)
    assert port.udp(FROM) == MODEL.DROP_CT_RACE
    assert flags(port.entry(key)) == MODEL.CT_F_REPLIED | MODEL.CT_F_DEAD


# -- full


def test_a_full_table_gives_up_an_unanswered_connection(ports: Ports) -> None:
    port = ports(FROM_ONLY, limit=16)
    port.track()
    for lport in range(15):
        port.put(port.key(UDP, lport, 53), MODEL.CT_REPLIED, MODEL.CT_F_REPLIED)
    unanswered = port.key(UDP, 99, 53)
    port.put(unanswered, MODEL.CT_NEW)
    assert port.udp(FROM, 5000) == MODEL.DROP_NONE
    assert port.entry(unanswered) is None
    assert port.drain() == {unanswered, port.key(UDP, 5000, 53)}
    assert (port.port.evicted, port.port.alarm_full) == (1, 0)


@pytest.mark.parametrize("name", ["CT_FIN_WAIT", "CT_CLOSE_WAIT", "CT_LAST_ACK", "CT_TIME_WAIT", "CT_CLOSE"])
def test_a_full_table_gives_up_a_closing_connection(ports: Ports, name: str) -> None:
    port = ports(FROM_ONLY, limit=4)
    for lport in range(3):
        port.put(port.key(TCP, lport), MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED)
    port.put(port.key(TCP, 9), getattr(MODEL, name), MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED)
    assert port.tcp(FROM, SYN, 5000) == MODEL.DROP_NONE
    assert port.entry(port.key(TCP, 9)) is None


def test_a_table_full_of_good_connections_refuses(ports: Ports) -> None:
    port = ports(FROM_ONLY, limit=8)
    port.track()
    for lport in range(8):
        port.put(port.key(UDP, lport, 53), MODEL.CT_REPLIED, MODEL.CT_F_REPLIED)
    for count in range(1, 6):
        assert port.udp(FROM, 5000) == MODEL.DROP_CT_FULL
        assert (port.port.evicted, port.port.alarm_full) == (0, count)
    assert len(port.table.keys()) == 8
    assert port.drain() == set()
    assert port.udp(FROM, 3) == MODEL.DROP_NONE  # those that are there go on


# -- learning


@pytest.mark.parametrize("direction", [FROM, TO])
def test_learning_takes_up_what_is_in_the_middle(ports: Ports, direction: int) -> None:
    port = ports(FROM_ONLY, flags=MODEL.PORT_F_LEARNING)
    key = port.key(TCP)
    assert port.tcp(direction, ACK) == MODEL.DROP_NONE
    entry = port.entry(key)
    taken = MODEL.CT_F_LEARNED | MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED
    assert (state(entry), flags(entry)) == (MODEL.CT_ESTABLISHED, taken)  # from the guest: only that is allowed
    assert port.counted("would_drop") == 1
    port.set_flags(0)
    assert port.tcp(1 - direction, ACK) == MODEL.DROP_NONE


def test_learning_drops_no_datagram(ports: Ports) -> None:
    port = ports(FROM_ONLY, flags=MODEL.PORT_F_LEARNING)
    assert port.udp(TO) == MODEL.DROP_NONE
    assert flags(port.entry(port.key(UDP, rport=53))) & (MODEL.CT_F_LEARNED | MODEL.CT_F_INBOUND) == (
        MODEL.CT_F_LEARNED
    )
    assert port.counted("would_drop") == 1


def test_learning_passes_what_no_policy_allows_untracked(ports: Ports) -> None:
    port = ports([rule(1, "from", "drop")], flags=MODEL.PORT_F_LEARNING)
    assert port.tcp(TO, ACK) == MODEL.DROP_NONE
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert port.icmp(TO, 0) == MODEL.DROP_NONE
    assert port.tcp(FROM, RST) == MODEL.DROP_NONE
    assert port.tcp(FROM, FIN | ACK) == MODEL.DROP_NONE
    assert port.counted("would_drop") == 5
    assert port.table.keys() == []


def test_learning_keeps_what_a_new_policy_would_end(ports: Ports) -> None:
    port = ports(FROM_ONLY, flags=MODEL.PORT_F_LEARNING)
    key = port.key(TCP)
    assert port.tcp(TO, ACK) == MODEL.DROP_NONE
    port.set_policy([rule(2, "to")])
    assert port.tcp(TO, ACK) == MODEL.DROP_NONE
    assert port.counted("would_drop") == 2
    port.set_flags(0)
    assert port.tcp(TO, ACK) == MODEL.DROP_POLICY
    assert port.entry(key) is None


def test_learning_does_not_let_new_connections_in(ports: Ports) -> None:
    port = ports(FROM_ONLY, flags=MODEL.PORT_F_LEARNING)
    assert port.tcp(TO, SYN) == MODEL.DROP_POLICY
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE
    assert not flags(port.entry(port.key(TCP))) & MODEL.CT_F_LEARNED


def test_a_port_without_table_passes_nothing(ports: Ports) -> None:
    port = ports(BOTH)
    port.switch.maps["conntracks"].delete(port.slot.to_bytes(4, "little"))
    assert port.udp(FROM) == MODEL.DROP_NOT_ACTIVE


# -- change tracking


def test_only_changes_are_dirty(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    port.track()
    key = port.key(TCP)
    for direction, segment, changed in (
        (FROM, SYN, True),
        (FROM, SYN, False),
        (TO, SYN | ACK, True),
        (FROM, ACK, True),
        (TO, ACK, False),
        (FROM, ACK, False),
        (FROM, FIN | ACK, True),
    ):
        assert port.tcp(direction, segment) == MODEL.DROP_NONE
        assert port.drain() == ({key} if changed else set()), (direction, segment)
    assert port.port.word >> 8 & MODEL.PORT_F_OVERFLOW == 0


def test_a_full_dirty_set_raises_overflow(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    port.track(limit=4)
    for lport in range(4):
        assert port.udp(FROM, lport) == MODEL.DROP_NONE
    assert port.udp(TO, 2) == MODEL.DROP_NONE  # a key that is in it already costs nothing
    assert not port.port.word >> 8 & MODEL.PORT_F_OVERFLOW
    assert port.udp(FROM, 4) == MODEL.DROP_NONE
    word = port.port.word
    assert word >> 8 & 0xFFFFFF == MODEL.PORT_F_OVERFLOW
    assert (word & 0xFF, word >> 32) == (MODEL.PORT_ACTIVE, 1)
