# SPDX-License-Identifier: GPL-2.0-only
"""TCP connections: every transition of nf_conntrack's table, and whole lives of connections."""

from __future__ import annotations

import pytest

from .frames import TCP
from .model import MODEL
from .probe import ACK, BOTH, FIN, FROM, FROM_ONLY, RST, SYN, TO, Probe, flags, state

# net/netfilter/nf_conntrack_proto_tcp.c, tcp_conntracks: rows by flag, columns by state
SHORT = {
    "SS": "SYN_SENT",
    "SR": "SYN_RECV",
    "ES": "ESTABLISHED",
    "FW": "FIN_WAIT",
    "CW": "CLOSE_WAIT",
    "LA": "LAST_ACK",
    "TW": "TIME_WAIT",
    "CL": "CLOSE",
    "S2": "SYN_SENT2",
}
STATES = list(SHORT.values())
KINDS = {"syn": SYN, "synack": SYN | ACK, "fin": FIN | ACK, "ack": ACK, "rst": RST}
ORIGINAL = {
    "syn": "SS IG IG IG IG IG SS SS S2",
    "synack": "IV SR IV IV IV IV IV IV SR",
    "fin": "IV FW FW LA LA LA TW CL IV",
    "ack": "IV ES ES CW CW TW TW CL IV",
    "rst": "CL CL CL CL CL CL CL CL CL",
}
REPLY = {
    "syn": "S2 IV IV IV IV IV SS IV S2",
    "synack": "SR IG IG IG IG IG IG IG SR",
    "fin": "IV FW FW LA LA LA TW CL IV",
    "ack": "IG SR ES CW CW TW TW CL IG",
    "rst": "CL CL CL CL CL CL CL CL CL",
}
TRANSITIONS = [
    (reply, kind, STATES[column], outcome)
    for reply, table in enumerate((ORIGINAL, REPLY))
    for kind, row in table.items()
    for column, outcome in enumerate(row.split())
]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("opener", [FROM, TO])
def test_every_transition(ports: type[Probe], opener: int, v6: bool) -> None:
    port = ports(BOTH)
    key = port.key(TCP, v6=v6)
    wrong = []
    for reply, kind, before, outcome in TRANSITIONS:
        port.put(key, getattr(MODEL, f"CT_{before}"), MODEL.CT_F_INBOUND if opener else 0)
        reason = port.tcp(opener ^ reply, KINDS[kind], v6=v6)
        after = state(port.entry(key))
        expected = MODEL.DROP_CT_INVALID if outcome == "IV" else MODEL.DROP_NONE
        there = before if outcome in ("IV", "IG") else SHORT[outcome]
        if (reason, after) != (expected, getattr(MODEL, f"CT_{there}")):
            wrong.append((("original", "reply")[reply], kind, before, outcome, reason, after))
    assert not wrong


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("opener", [FROM, TO])
def test_a_whole_life(ports: type[Probe], opener: int, v6: bool) -> None:
    port = ports(BOTH)
    other = 1 - opener
    key = port.key(TCP, v6=v6)
    life = [
        (opener, SYN, "SYN_SENT", 0),
        (opener, SYN, "SYN_SENT", 0),
        (other, SYN | ACK, "SYN_RECV", MODEL.CT_F_REPLIED),
        (opener, ACK, "ESTABLISHED", MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED),
        (other, ACK, "ESTABLISHED", MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED),
        (other, FIN | ACK, "FIN_WAIT", MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED),
        (opener, ACK, "CLOSE_WAIT", MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED),
        (opener, FIN | ACK, "LAST_ACK", MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED),
        (other, ACK, "TIME_WAIT", MODEL.CT_F_REPLIED | MODEL.CT_F_ASSURED),
    ]
    for step, (direction, segment, name, expected) in enumerate(life):
        assert port.tcp(direction, segment, v6=v6) == MODEL.DROP_NONE, step
        entry = port.entry(key)
        assert (state(entry), flags(entry) & ~MODEL.CT_F_INBOUND) == (getattr(MODEL, f"CT_{name}"), expected), step
        assert bool(flags(entry) & MODEL.CT_F_INBOUND) == bool(opener)
        assert entry.word >> 32 == entry.id & 0xFFFFFFFF and entry.id
    size = 60 if v6 else 40
    sent = sum(1 for direction, *_ in life if direction == FROM)
    assert list(entry.packets) == [sent, len(life) - sent]
    assert list(entry.bytes) == [size * sent, size * (len(life) - sent)]
    assert len(port.table.keys()) == 1


def test_simultaneous_open(ports: type[Probe]) -> None:
    port = ports(FROM_ONLY)
    key = port.key(TCP)
    for direction, segment, name in (
        (FROM, SYN, "SYN_SENT"),
        (TO, SYN, "SYN_SENT2"),
        (FROM, SYN | ACK, "SYN_RECV"),
        (TO, SYN | ACK, "SYN_RECV"),
        (FROM, ACK, "ESTABLISHED"),
    ):
        assert port.tcp(direction, segment) == MODEL.DROP_NONE, name
        assert state(port.entry(key)) == getattr(MODEL, f"CT_{name}")


@pytest.mark.parametrize("segment", [ACK, SYN | ACK, FIN | ACK, RST, RST | ACK])
def test_only_a_syn_begins(ports: type[Probe], segment: int) -> None:
    port = ports(BOTH)
    assert port.tcp(FROM, segment) == MODEL.DROP_CT_INVALID
    assert port.tcp(TO, segment) == MODEL.DROP_CT_INVALID
    assert port.table.keys() == []


@pytest.mark.parametrize("segment", [0, FIN, SYN | FIN, SYN | RST, FIN | RST | ACK, SYN | FIN | ACK])
def test_flags_that_no_tcp_sends(ports: type[Probe], segment: int) -> None:
    port = ports(BOTH)
    port.put(port.key(TCP), MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED)
    assert port.tcp(FROM, segment) == MODEL.DROP_CT_INVALID
    assert state(port.entry(port.key(TCP))) == MODEL.CT_ESTABLISHED


@pytest.mark.parametrize("opener", [FROM, TO])
@pytest.mark.parametrize("again", [FROM, TO])
def test_a_syn_after_the_end_is_a_new_connection(ports: type[Probe], opener: int, again: int) -> None:
    port = ports(BOTH)
    port.track()
    key = port.key(TCP)
    opened = MODEL.CT_F_INBOUND if opener else 0
    port.put(
        key,
        MODEL.CT_TIME_WAIT,
        MODEL.CT_F_REPLIED | opened,
        id=0x55AA,
        mark=9,
        packets=(5, 6),
        bytes=(7, 8),
        carried_packets=(1, 1),
        carried_bytes=(1, 1),
    )
    assert port.tcp(again, SYN) == MODEL.DROP_NONE
    entry = port.entry(key)
    assert state(entry) == MODEL.CT_SYN_SENT
    assert flags(entry) == (MODEL.CT_F_INBOUND if again else 0)
    assert entry.id != 0x55AA and entry.word >> 32 == entry.id & 0xFFFFFFFF
    assert [*entry.packets, *entry.bytes] == ([0, 1, 0, 40] if again else [1, 0, 40, 0])
    assert [*entry.carried_packets, *entry.carried_bytes, entry.mark] == [0] * 5
    assert port.drain() == {key}


def test_a_syn_after_the_end_is_judged_as_its_own_direction(ports: type[Probe]) -> None:
    port = ports(FROM_ONLY)
    key = port.key(TCP)
    port.put(key, MODEL.CT_TIME_WAIT, MODEL.CT_F_REPLIED)
    assert port.tcp(TO, SYN) == MODEL.DROP_POLICY
    assert state(port.entry(key)) == MODEL.CT_TIME_WAIT
