# SPDX-License-Identifier: GPL-2.0-only
"""A policy's rules read one by one, as the operator wrote them, for the reference model."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from .segments import ICMP, ICMPV6, TCP, TO, UDP, Packet

NUMBERS = {"tcp": TCP, "udp": UDP, "icmp": ICMP, "icmpv6": ICMPV6}


def matches(rule: Mapping[str, Any], packet: Packet, direction: int) -> bool:
    """Does the rule say of a packet that opens in this direction? `::/0` is any IPv6 address and no IPv4 one."""
    if rule["direction"] != ("to" if direction == TO else "from"):
        return False
    if rule["protocol"] != "any" and NUMBERS.get(rule["protocol"], rule["protocol"]) != packet.proto:
        return False
    remote = packet.raddr[12:] if packet.family == 4 else packet.raddr
    if rule["remote"] and not any(_within(remote, prefix) for prefix in rule["remote"]):
        return False
    if packet.proto in (TCP, UDP) and rule["ports"]:
        port = packet.lport if direction == TO else packet.rport
        return any(first <= port <= last for first, last in rule["ports"])
    if rule["icmp"]:
        kind = packet.policy_icmp
        return rule["icmp"] == list(kind[: len(rule["icmp"])])
    return True


Words = tuple[int, int]
"""Mark and label of a connection."""


def decides(
    ranked: Iterable[Mapping[str, Any]], packet: Packet, direction: int, words: Words
) -> tuple[Mapping[str, Any] | None, Words]:
    """The first rule that matches, and what a connection with these words has after it began by the rule."""
    for rule in ranked:
        if matches(rule, packet, direction) and all(
            word & _mask(rule.get(name, "0/0")) == _value(rule.get(name, "0/0"))
            for word, name in zip(words, ("mark", "label"), strict=True)
        ):
            mark, label = (
                word & ~_mask(rule.get(name, "0/0")) | _value(rule.get(name, "0/0"))
                for word, name in zip(words, ("set_mark", "set_label"), strict=True)
            )
            return rule, (mark, label)
    return None, words


def _value(text: str) -> int:
    return int(text.partition("/")[0], 0)


def _mask(text: str) -> int:
    return int(text.partition("/")[2] or "-1", 0)


@functools.cache
def _network(text: str) -> tuple[int, int, int]:
    """Bytes of an address, its number, bits that are free."""
    network = ipaddress.ip_network(text)
    return network.max_prefixlen // 8, int(network.network_address), network.max_prefixlen - network.prefixlen


def _within(address: bytes, prefix: str) -> bool:
    size, number, free = _network(prefix)
    return len(address) == size and int.from_bytes(address) >> free == number >> free
