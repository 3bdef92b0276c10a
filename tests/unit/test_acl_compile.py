"""The policy compiler against a linear reading of the same rules."""

from __future__ import annotations

import ipaddress
import random
import time
from typing import Any

import numpy as np
import pytest

from datapath.drivers.ebpf.acl import DIRECTIONS, RULES_MAX, Compiled, compile_rules, validate
from datapath.errors import LoadRejected, UnsupportedKind

PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}


def rule(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": number,
        "direction": "to",
        "priority": 100,
        "protocol": "any",
        "remote": [],
        "ports": [],
        "icmp": [],
        "action": "allow",
        "log": False,
        "hits": 0,
        "hit_bytes": 0,
        **fields,
    }


def mapped(text: str) -> int:
    address = ipaddress.ip_address(text)
    return int(address) | (0xFFFF << 32 if address.version == 4 else 0)


def linear(rules: list[dict[str, Any]], direction: str, remote: str, protocol: int, number: int) -> int:
    """Id of the rule that wins by reading them one by one, 0 none. `number`: port, or type << 8 | code."""
    for candidate in sorted(rules, key=lambda r: r["priority"]):
        if candidate["direction"] == direction and _matches(candidate, remote, protocol, number):
            return int(candidate["id"])
    return 0


def _matches(candidate: dict[str, Any], remote: str, protocol: int, number: int) -> bool:
    wanted = candidate["protocol"]
    if wanted != "any" and PROTOCOLS.get(wanted, wanted) != protocol:
        return False
    networks = [ipaddress.ip_network(text) for text in candidate["remote"]]
    address = ipaddress.ip_address(remote)
    if networks and not any(net.version == address.version and address in net for net in networks):
        return False
    if candidate["ports"]:
        return any(first <= number <= last for first, last in candidate["ports"])
    if candidate["icmp"]:
        return candidate["icmp"][0] == number >> 8 and candidate["icmp"][1:] in ([], [number & 255])
    return True


def classify(tables: Compiled, direction: str, remote: str, protocol: int, number: int) -> int:
    """What the program does, in Python."""
    address = mapped(remote)
    best, prefix_row = -1, -1
    for i in range(len(tables.prefix_row)):
        length = int(tables.prefix_length[i])
        base = int.from_bytes(tables.prefix_addr[i].tobytes(), "big")
        inside = tables.prefix_direction[i] == DIRECTIONS[direction] and (address ^ base) >> (128 - length) == 0
        if inside and length > best:
            best, prefix_row = length, int(tables.prefix_row[i])
    if prefix_row < 0:
        return 0
    at = int(np.searchsorted(tables.starts[:, 0], protocol << 16 | number, side="right")) - 1
    stride = tables.groups + 1
    matrix = tables.matrix.reshape(-1, stride, 4)
    one, other = matrix[prefix_row], matrix[tables.starts[at, 1]]
    for group in range(tables.groups):
        if not int(one[0, 0]) & int(other[0, 0]) >> group & 1:
            continue
        for word in range(4):
            both = int(one[group + 1, word]) & int(other[group + 1, word])
            if both:
                return int(tables.ids[group * 256 + word * 64 + (both & -both).bit_length() - 1])
    return 0


def random_rules(count: int, seed: int) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    rules = []
    for number in range(1, count + 1):
        protocol = dice.choice(["any", "tcp", "tcp", "udp", "icmp", "icmpv6", 47])
        ports, icmp = [], []
        if protocol in ("tcp", "udp"):
            for _ in range(dice.randrange(3)):
                first = dice.choice([22, 53, 80, 443, dice.randrange(65536)])
                ports.append([first, min(65535, first + dice.choice([0, 0, 10, 5000]))])
        elif protocol in ("icmp", "icmpv6"):
            icmp = dice.choice([[], [8], [8, 0]])
        rules.append(
            rule(
                number,
                direction=dice.choice(["from", "to"]),
                priority=dice.randrange(50),
                protocol=protocol,
                remote=[random_prefix(dice) for _ in range(dice.choice([0, 1, 1, 2]))],
                ports=ports,
                icmp=icmp,
            )
        )
    return rules


def random_prefix(dice: random.Random) -> str:
    if dice.random() < 0.7:
        base = ipaddress.ip_address((10 << 24) | dice.getrandbits(24))
        return str(ipaddress.ip_network(f"{base}/{dice.choice([8, 16, 20, 24, 28, 32])}", strict=False))
    base6 = ipaddress.ip_address((0x20010DB8 << 96) | dice.getrandbits(96))
    return str(ipaddress.ip_network(f"{base6}/{dice.choice([32, 48, 64, 128])}", strict=False))


def random_packet(dice: random.Random, rules: list[dict[str, Any]]) -> tuple[str, str, int, int]:
    near = dice.choice(rules)
    direction = near["direction"] if dice.random() < 0.8 else dice.choice(["from", "to"])
    remote = str(ipaddress.ip_network(dice.choice(near["remote"]))[0]) if near["remote"] else "10.1.2.3"
    protocol = PROTOCOLS.get(near["protocol"], near["protocol"] if isinstance(near["protocol"], int) else 6)
    if near["ports"] and dice.random() < 0.8:
        return direction, remote, protocol, dice.randint(*dice.choice(near["ports"]))
    return direction, remote, protocol, dice.choice([8 << 8, 8 << 8 | 3, 22, 443, dice.randrange(65536)])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1500])
def test_same_winner_as_linear(count: int) -> None:
    rules = random_rules(count, seed=count)
    validate(rules)
    tables = compile_rules(rules)
    dice = random.Random(count + 1)
    hits = 0
    for _ in range(300):
        packet = random_packet(dice, rules)
        expected = linear(rules, *packet)
        hits += expected != 0
        assert classify(tables, *packet) == expected, packet
    assert hits > 30


def test_equal_priority_first_in_list_wins() -> None:
    tables = compile_rules([rule(7, action="drop"), rule(3)])
    assert classify(tables, "to", "10.0.0.1", 6, 80) == 7


def test_no_rules_compile_to_default_drop() -> None:
    tables = compile_rules([])
    assert classify(tables, "to", "10.0.0.1", 6, 80) == 0
    assert tables.starts.tolist() == [[0, 0]]


def test_adjacent_and_overlapping_ports_are_one_interval() -> None:
    tables = compile_rules([rule(1, protocol="tcp", ports=[[80, 90], [85, 100], [101, 110]])])
    assert tables.starts[:, 0].tolist() == [0, 6 << 16 | 80, 6 << 16 | 111]


def test_any_ipv4_does_not_match_ipv6() -> None:
    tables = compile_rules([rule(1, remote=["0.0.0.0/0"])])
    assert classify(tables, "to", "10.0.0.1", 6, 80) == 1
    assert classify(tables, "to", "2001:db8::1", 6, 80) == 0


def test_too_many_rules_are_unsupported() -> None:
    with pytest.raises(UnsupportedKind, match="16385"):
        compile_rules([rule(number + 1) for number in range(RULES_MAX + 1)])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"direction": "in"}, "direction"),
        ({"action": "accept"}, "action"),
        ({"priority": 70_000}, "priority"),
        ({"priority": True}, "priority"),
        ({"protocol": "gre"}, "gre"),
        ({"protocol": 256}, "256"),
        ({"remote": ["10.0.0.0/33"]}, "10.0.0.0/33"),
        ({"remote": [7]}, "7"),
        ({"protocol": "tcp", "ports": [[90, 80]]}, "90-80"),
        ({"protocol": "tcp", "ports": [[1, 65_536]]}, "65536"),
        ({"protocol": "tcp", "ports": [80]}, "int"),
        ({"ports": [[1, 2]]}, "protocol"),
        ({"protocol": "icmp", "icmp": [256]}, "256"),
        ({"protocol": "icmp", "icmp": [1, 2, 3]}, "icmp"),
        ({"id": 0}, "id"),
        ({"id": 1 << 32}, "id"),
    ],
)
def test_malformed_rule_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadRejected, match=said):
        validate([rule(1, **fields) if "id" not in fields else {**rule(1), **fields}])


def test_same_id_twice_is_rejected() -> None:
    with pytest.raises(LoadRejected, match="twice"):
        validate([rule(1), rule(1)])


def test_ten_thousand_rules_compile_in_well_under_a_second() -> None:
    rules = random_rules(10_000, seed=1)
    began = time.process_time()
    tables = compile_rules(rules)
    assert time.process_time() - began < 1.5
    assert len(tables.ids) == 10_000
