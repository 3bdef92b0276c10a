# SPDX-License-Identifier: GPL-2.0-only
"""Mark and label of connections: given by rules, asked for by rules, changed by the agent."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from datapath.state.labels import parse

from .frames import TCP, UDP
from .model import MODEL
from .probe import ACK, FROM, SYN, TO, Probe, rule
from .test_control_exchange import call, exchange, place

__all__ = ["exchange"]

Ports = Callable[..., Probe]
HIGH = 0x8000_0000_0000_0000_0000_0000_0000_0001


def given(port: Probe, key: bytes) -> tuple[int, int]:
    """Mark and label of a connection."""
    entry = port.entry(key)
    return entry.mark, int.from_bytes(bytes(entry.label), "big")


@pytest.mark.parametrize("opener", [FROM, TO])
def test_a_rule_gives_what_it_says(ports: Ports, opener: int) -> None:
    way = ("from", "to")[opener]
    given_by = {"set_mark": "0x7", "set_label": hex(HIGH)}
    port = ports([rule(1, way, protocol="udp", **given_by), rule(2, way)])
    assert port.udp(opener) == port.tcp(opener, SYN) == MODEL.DROP_NONE
    assert given(port, port.key(UDP, rport=53)) == (7, HIGH)
    assert given(port, port.key(TCP)) == (0, 0)
    assert (port.hits(1)[0], port.hits(2)[0]) == (1, 1)
    assert port.udp(1 - opener) == MODEL.DROP_NONE
    assert given(port, port.key(UDP, rport=53)) == (7, HIGH)


def test_what_begins_has_neither(ports: Ports) -> None:
    asks = [rule(1, "from", mark="0x1"), rule(2, "from", label="0x1/0x1"), rule(3, "from", "drop", mark="0/0xffffffff")]
    port = ports([*asks, rule(4, "from")])
    assert port.udp(FROM) == MODEL.DROP_POLICY
    assert [port.hits(number)[0] for number in range(5)] == [0, 0, 0, 1, 0]
    port.set_policy([*asks[:2], rule(4, "from")])
    assert port.udp(FROM) == MODEL.DROP_NONE
    port.set_policy(asks[:2])
    assert port.tcp(FROM, SYN) == MODEL.DROP_POLICY
    assert port.hits(0)[0] == 1


def test_another_policy_asks_for_what_the_one_before_gave(ports: Ports) -> None:
    port = ports([rule(1, "from", protocol="udp", set_label="0x30", set_mark="0x5"), rule(2, "from")])
    assert port.udp(FROM) == port.tcp(FROM, SYN) == MODEL.DROP_NONE
    port.set_policy([rule(3, "from", label="0x10/0x10", mark="0x1/0x3"), rule(4, "from", "reject", protocol="icmp")])
    assert port.udp(TO) == MODEL.DROP_NONE, "the answer to one that goes on"
    assert port.tcp(TO, SYN | ACK) == MODEL.DROP_POLICY
    assert port.entry(port.key(TCP)) is None
    assert port.entry(port.key(UDP, rport=53)).judged == port.entry(port.key(UDP, rport=53)).judged != 0
    assert given(port, port.key(UDP, rport=53)) == (5, 0x30)
    assert port.hits(3)[0] == 0, "counted when it began"
    port.set_policy([rule(3, "from", label="0x10/0x11", set_mark="0x9"), rule(5, "from", "drop")])
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert given(port, port.key(UDP, rport=53)) == (5, 0x30), "what goes on keeps what it has"


def test_only_bits_of_the_mask_are_given(ports: Ports) -> None:
    port = ports([rule(1, "from", set_mark="0xf0/0xff0", set_label=f"{1 << 127:#x}/{3 << 126:#x}")])
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert given(port, port.key(UDP, rport=53)) == (0xF0, 1 << 127)


def test_another_connection_in_its_place_begins_without(ports: Ports) -> None:
    port = ports([rule(1, "from")])
    key = port.key(TCP)
    port.put(key, MODEL.CT_TIME_WAIT, mark=5, label=(1, 2))
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE
    assert given(port, key) == (0, 0)
    port.set_policy([rule(1, "from", set_mark="0x6")])
    port.put(key, MODEL.CT_TIME_WAIT, mark=5, label=(1, 2))
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE
    assert given(port, key) == (6, 0)


def test_a_learning_port_gives_by_the_direction_that_allows(ports: Ports) -> None:
    port = ports([rule(1, "to", set_mark="0x3")], flags=MODEL.PORT_F_LEARNING)
    assert port.tcp(FROM, ACK) == MODEL.DROP_NONE
    assert given(port, port.key(TCP)) == (3, 0)


def test_rules_that_ask_are_passed_over_one_by_one(ports: Ports) -> None:
    """As a reader does it: random rules, many of them about labels, in several groups of 256."""
    chance = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    wanted: list[str] = []
    while len(set(wanted)) < 2:  # the first few rules may decide all in the same way
        rules = _mixed(chance)
        labels = [(chance.getrandbits(3), chance.getrandbits(3) << 62) for _ in range(200)]
        wanted = [_decides(rules, mark, label) for mark, label in labels]
    port = ports([rule(1, "from")], limit=1024)
    for lport, (mark, label) in enumerate(labels):
        port.put(port.key(UDP, lport, 53), MODEL.CT_NEW, mark=mark, label=_words(label))
    port.set_policy(list(rules.values()))
    verdicts = [port.udp(FROM, lport) == MODEL.DROP_NONE for lport in range(200)]
    assert verdicts == [one == "allow" for one in wanted]


def _mixed(chance: random.Random) -> dict[int, dict[str, Any]]:
    """By id: 1,000 rules for other protocols, 250 of which any protocol with some label takes the place of."""
    plain = [rule(number, "from", "drop", protocol=chance.choice(["tcp", 47])) for number in range(1000)]
    asking = [
        rule(number, "from", chance.choice(["allow", "drop"]), **_asked(chance))
        for number in chance.sample(range(1000), 250)
    ]
    return {one["id"] + 1: {**one, "id": one["id"] + 1, "priority": one["id"]} for one in [*plain, *asking]}


def _asked(chance: random.Random) -> dict[str, Any]:
    mask = chance.choice([1, 3, 7])
    if chance.random() < 0.5:
        return {"mark": f"{chance.getrandbits(3) & mask}/{mask}"}
    return {"label": f"{(chance.getrandbits(3) & mask) << 62:#x}/{mask << 62:#x}"}


def _words(label: int) -> Any:
    return (MODEL.ct_entry().label.__class__).from_buffer_copy(label.to_bytes(16, "big"))


def _decides(rules: dict[int, dict[str, Any]], mark: int, label: int) -> str:
    for one in sorted(rules.values(), key=lambda one: one["priority"]):
        if one["protocol"] == "any" and all(
            number & parse(one[name], 128)[1] == parse(one[name], 128)[0]
            for name, number in (("mark", mark), ("label", label))
            if name in one
        ):
            return str(one["action"])
    return "drop"


def test_the_agent_changes_them_and_the_policy_looks_again(ports: Ports, exchange: Any) -> None:
    port = ports([rule(1, "from", "drop", mark="0xbad"), rule(2, "from")])
    port.track()
    assert port.udp(FROM) == port.tcp(FROM, SYN) == MODEL.DROP_NONE
    key, other = port.key(UDP, rport=53), port.key(TCP)
    fragment = port.key(UDP, 1, 2, type=MODEL.CT_TYPE_FRAGMENT)
    port.put(fragment, MODEL.CT_NEW, mark=77, id=5)
    dead, missing = port.key(UDP, 3), port.key(UDP, 4)
    port.put(dead, MODEL.CT_ESTABLISHED, MODEL.CT_F_DEAD, id=6)
    port.drain()
    for index, one in enumerate((key, other, fragment)):
        number = port.entry(one).id + (one == other)  # that of a connection which has ended
        place(exchange[index], one, id=number, mark=0xBAD, label=(1, 2))
    place(exchange[3], dead, id=6, mark=0xBAD)
    place(exchange[4], missing, id=7, mark=0xBAD)
    assert call(port, "ct_relabel", 5) == (0, 1)
    assert [exchange[index].found for index in range(5)] == [1, 0, 0, 0, 0]
    assert port.entry(dead).mark == 0 and port.entry(missing) is None
    assert port.drain() == {key}
    assert (port.entry(key).mark, list(port.entry(key).label)) == (0xBAD, [1, 2])
    assert (port.entry(other).mark, port.entry(fragment).mark) == (0, 77)
    assert port.udp(TO) == MODEL.DROP_POLICY
    assert port.entry(key) is None
    assert port.tcp(TO, SYN | ACK) == MODEL.DROP_NONE


def test_a_port_that_stands_is_not_changed(ports: Ports, exchange: Any) -> None:
    port = ports([rule(1, "from")])
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, id=9)
    port.set_flags(0, MODEL.PORT_QUIESCED)
    place(exchange[0], key, id=9, mark=1)
    assert call(port, "ct_relabel", 1)[0] < 0
    assert call(port, "ct_relabel", MODEL.EXCHANGE_LENGTH + 1)[0] < 0
    assert port.entry(key).mark == 0


@pytest.mark.parametrize("table", ["acl_rows", "acl_rules", "acl_labels"])
def test_a_policy_that_is_being_replaced_concludes_nothing(ports: Ports, table: str) -> None:
    """Its generation is gone when the reader comes to it: the connection stays, and nothing begins."""
    port = ports([rule(1, "from")])
    assert port.udp(FROM) == MODEL.DROP_NONE
    port.set_policy([rule(1, "from", mark="0/1", set_mark="0x1")])
    word = struct.unpack("=Q", port.switch.maps["policies"].lookup(struct.pack("=I", port.slot)) or b"")[0]
    port.switch.maps[table].delete(struct.pack("=I", word & 0xFFFFFFFF))
    assert port.udp(FROM) == port.udp(FROM, 5000) == MODEL.DROP_CT_RACE
    assert len(port.table.keys()) == 1
