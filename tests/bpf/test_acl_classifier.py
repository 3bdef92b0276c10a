# SPDX-License-Identifier: GPL-2.0-only
"""The bit-vector classifier against a linear scan of the same rules, and what a verdict leaves behind."""

from __future__ import annotations

import functools
import ipaddress
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import frames
from .frames import ICMP6, TCP, UDP
from .harness import Switch
from .model import MODEL
from .probe import FROM, GUEST, GUEST6, ICMP, PEER, SYN, TO, Probe, icmp, rule, tcp
from .ring import Ring

Ports = Callable[..., Probe]
NUMBERS = {"tcp": TCP, "udp": UDP, "icmp": ICMP, "icmpv6": ICMP6}
PORTS = [22, 53, 80, 443, 8080]
SEED = 20
Tuple = tuple[int, str, int, int]  # direction, remote, protocol, port or type << 8 | code


network_of = functools.lru_cache(maxsize=None)(ipaddress.ip_network)


def some_prefix(chance: random.Random) -> str:
    if chance.random() < 0.7:
        address, lengths = 10 << 24 | chance.getrandbits(8) << 16 | chance.getrandbits(4), [8, 16, 24, 24, 32, 32, 32]
    else:
        address = 0x20010DB8 << 96 | chance.getrandbits(8) << 80 | chance.getrandbits(4)
        lengths = [32, 40, 48, 64, 128, 128]
    return str(ipaddress.ip_network((address, chance.choice(lengths)), False))


def some_rule(chance: random.Random, number: int) -> dict[str, Any]:
    protocol = chance.choice(["any", *["tcp", "udp"] * 4, "icmp", "icmpv6", 132, 47])
    fields: dict[str, Any] = {"protocol": protocol, "priority": chance.randrange(300)}
    if chance.random() < 0.99:
        fields["remote"] = [some_prefix(chance) for _ in range(chance.choice([1, 1, 3]))]
    if protocol in ("tcp", "udp") and chance.random() < 0.8:
        first = chance.choice([*PORTS, chance.randrange(65536)])
        fields["ports"] = [[first, min(65535, first + chance.choice([0, 0, 10, 5000]))], [65000, 65535]]
    if protocol in ("icmp", "icmpv6") and chance.random() < 0.8:
        kind = 8 if protocol == "icmp" else 128
        fields["icmp"] = chance.choice([[kind], [kind, 0], [kind, 1], [chance.choice([13, 17, 42])]])
    return rule(number, chance.choice(["from", "to"]), chance.choice(["allow", "drop"]), **fields)


def some_tuple(chance: random.Random, rules: list[dict[str, Any]]) -> Tuple:
    """Half of them near a rule."""
    near = chance.choice(rules)
    direction = int(near["direction"] == "to")
    remote = str(ipaddress.ip_network(chance.choice(near["remote"] or ["10.0.0.0/8", "2001:db8::/32"]))[0])
    if chance.random() < 0.3:
        remote = f"10.{chance.getrandbits(8)}.{chance.getrandbits(2)}.1"
    v6 = ":" in remote
    protocol = NUMBERS.get(near["protocol"], near["protocol"])
    if not isinstance(protocol, int) or protocol == (ICMP if v6 else ICMP6) or chance.random() < 0.2:
        protocol = chance.choice([TCP, UDP, ICMP6 if v6 else ICMP, 132])
    if protocol in (TCP, UDP):
        at = near["ports"][0][chance.randrange(2)] if near["ports"] else chance.choice(PORTS)
        return direction, remote, protocol, max(0, min(65535, at + chance.choice([0, 0, -1, 1])))
    if protocol in (ICMP, ICMP6):  # requests, and what is no query: those that can open
        kinds = [128, 150] if v6 else [8, 13, 17, 42]
        return direction, remote, protocol, chance.choice(kinds) << 8 | chance.randrange(2)
    return direction, remote, protocol, 0


def matches(one: dict[str, Any], direction: int, remote: str, protocol: int, point: int) -> bool:
    address = ipaddress.ip_address(remote)
    if (one["direction"] == "to") != bool(direction):
        return False
    if one["protocol"] != "any" and NUMBERS.get(one["protocol"], one["protocol"]) != protocol:
        return False
    prefixes = [network_of(text) for text in one["remote"]]
    if prefixes and not any(address.version == each.version and address in each for each in prefixes):
        return False
    if one["ports"] and not any(first <= point <= last for first, last in one["ports"]):
        return False
    return not one["icmp"] or one["icmp"] == [point >> 8, point & 0xFF][: len(one["icmp"])]


def linear(rules: list[dict[str, Any]], wanted: Tuple) -> dict[str, Any] | None:
    """The first rule that matches, by priority and then by place in the list."""
    direction, remote, protocol, point = wanted
    if protocol in (ICMP, ICMP6) and point >> 8 in (8, 13, 17, 128):
        point &= 0xFF00  # a query is judged by its request, whatever code it has
    ranked = sorted(rules, key=lambda one: one["priority"])
    return next((one for one in ranked if matches(one, direction, remote, protocol, point)), None)


def frame_of(wanted: Tuple) -> bytes:
    direction, remote, protocol, point = wanted
    v6 = ":" in remote
    if protocol == TCP:
        body = tcp(30000, point, SYN)
    elif protocol == UDP:
        body = frames.udp(30000, point)
    elif protocol in (ICMP, ICMP6):
        body = icmp(point >> 8, point & 0xFF, 5)
    else:
        body = bytes(20)
    own = GUEST6 if v6 else GUEST
    source, target = (remote, own) if direction else (own, remote)
    build = frames.ipv6 if v6 else frames.ipv4
    macs = (frames.mac(1), frames.mac(2))
    return frames.ethernet(*macs, frames.IPV6 if v6 else frames.IPV4, build(source, target, protocol, body))


@pytest.mark.parametrize(("count", "tuples"), [(1, 200), (10, 1000), (256, 2000), (257, 2000), (1000, 5000)])
def test_same_verdicts_as_a_linear_scan(ports: Ports, count: int, tuples: int) -> None:
    chance = random.Random(SEED + count)
    rules = [some_rule(chance, number) for number in range(1, count + 1)]
    port = ports(rules)
    wrong, decided = [], set()
    for _ in range(tuples):
        wanted = some_tuple(chance, rules)
        expected = linear(rules, wanted)
        allowed = expected is not None and expected["action"] == "allow"
        before = port.hits(expected["id"] if expected else 0)
        reason = port.send(wanted[0], frame_of(wanted))
        hit = port.hits(expected["id"] if expected else 0)[0] - before[0]
        if (reason, hit) != (MODEL.DROP_NONE if allowed else MODEL.DROP_POLICY, 1):
            wrong.append((wanted, expected, reason, hit))
        decided.add(expected["id"] if expected else 0)
        port.table.clear()
    assert not wrong, f"{len(wrong)} of {tuples}, first: {wrong[0]}"
    assert len(decided) > min(count, 100) // 4  # the tuples did reach many rules


def test_hits_count_what_was_judged(ports: Ports) -> None:
    port = ports([rule(7, "from", protocol="udp"), rule(8, "from", "drop", protocol="tcp")])
    for _ in range(3):
        assert port.udp(FROM, data=b"12345") == MODEL.DROP_NONE
    assert port.hits(7) == (1, 33)  # once a connection
    for _ in range(3):
        assert port.tcp(FROM, SYN) == MODEL.DROP_POLICY
    assert port.hits(8) == (3, 120)
    assert port.udp(TO, 1, 2) == MODEL.DROP_POLICY
    assert port.hits(0) == (1, 28)


def test_nearest_prefix_is_not_the_first_rule(ports: Ports) -> None:
    """A longer prefix selects its own row, and that row has the rules of the shorter ones around it."""
    port = ports([rule(1, "from", "drop", remote=["192.0.0.0/8"]), rule(2, "from", remote=[f"{PEER}/32"])])
    assert port.udp(FROM) == MODEL.DROP_POLICY
    assert port.udp(FROM, peer="198.51.100.1") == MODEL.DROP_POLICY
    port.set_policy([rule(1, "from", remote=["192.0.0.0/8"]), rule(2, "from", "drop", remote=[f"{PEER}/32"])])
    assert port.udp(FROM) == MODEL.DROP_NONE


def test_families_do_not_mix(ports: Ports) -> None:
    port = ports([rule(1, "from", remote=["0.0.0.0/0"])])
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert port.udp(FROM, v6=True) == MODEL.DROP_POLICY
    for prefix in ("::/0", "::/64"):
        port = ports([rule(1, "from", remote=[prefix])])
        assert port.udp(FROM) == MODEL.DROP_POLICY
        assert port.udp(FROM, 5, v6=True) == (MODEL.DROP_NONE if prefix == "::/0" else MODEL.DROP_POLICY)
    port.set_policy([rule(1, "from", remote=["::/0", "192.0.2.9/32"])])
    assert port.udp(FROM, 6) == MODEL.DROP_NONE
    assert port.udp(FROM, 7, peer="192.0.2.10") == MODEL.DROP_POLICY
    port.set_policy([rule(1, "from")])
    assert port.udp(FROM, 8) == port.udp(FROM, 8, v6=True) == MODEL.DROP_NONE


def test_destination_port_is_the_openers(ports: Ports) -> None:
    port = ports([rule(1, "from", protocol="udp", ports=[[53, 53]]), rule(2, "to", protocol="udp", ports=[[123, 123]])])
    assert port.udp(FROM, lport=9, rport=53) == MODEL.DROP_NONE
    assert port.udp(FROM, lport=53, rport=9) == MODEL.DROP_POLICY
    assert port.udp(TO, lport=123, rport=9) == MODEL.DROP_NONE
    assert port.udp(TO, lport=9, rport=123) == MODEL.DROP_POLICY


def test_last_of_many_rules(ports: Ports) -> None:
    """Rank 16,383: the last bit of the last group."""
    rules = [rule(number, "to", protocol="tcp", ports=[[1, 1]], priority=1) for number in range(1, 16384)]
    port = ports([*rules, rule(16384, "from", protocol="tcp", ports=[[80, 80]], priority=2)])
    assert port.tcp(FROM, SYN) == MODEL.DROP_NONE
    assert port.hits(16384)[0] == 1
    assert port.tcp(FROM, SYN, rport=81) == MODEL.DROP_POLICY


@pytest.fixture
def ring(loaded_probe: Switch) -> Iterator[Ring]:
    events = loaded_probe.maps["events"]
    made = Ring(events.fd, events.max_entries)
    yield made
    made.close()


@pytest.mark.parametrize(("action", "reason"), [("allow", "DROP_NONE"), ("drop", "DROP_POLICY")])
def test_log(ports: Ports, ring: Ring, action: str, reason: str) -> None:
    port = ports([rule(77, "to", action, log=True)])
    frame = port.frame(TO, UDP, frames.udp(1, 2, b"data"))
    assert port.send(TO, frame) == getattr(MODEL, reason)
    (record,) = ring.read()
    event = MODEL.event.from_buffer_copy(record)
    assert (event.type, event.slot, event.epoch, event.rule) == (MODEL.EVENT_LOG, port.slot, 1, 77)
    assert (event.direction, event.reason) == (TO, getattr(MODEL, reason))
    assert bytes(event.data)[: event.captured] == frame


def test_events_of_a_full_table_are_rare(ports: Ports, ring: Ring) -> None:
    port = ports([rule(1, "from")], limit=1)
    port.put(port.key(UDP, 1, 1), MODEL.CT_REPLIED, MODEL.CT_F_REPLIED)
    for _ in range(100):
        assert port.udp(FROM) == MODEL.DROP_CT_FULL
    events = [MODEL.event.from_buffer_copy(record) for record in ring.read()]
    assert [event.type for event in events] == [MODEL.EVENT_FULL] * 7  # at 1, 2, 4 ... 64
    assert port.port.alarm_full == 100
