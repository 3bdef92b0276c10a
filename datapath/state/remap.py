"""Kind `remap`: the addresses that the network knows a port's guest by (outside), and the guest's own (inside).

A rule is one to one and without state (RFC 3022's basic NAT): a whole address, or one port of one protocol of it.
Several outside addresses may lead to one inside address when all but one of them do so by port.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from datapath.state.document import Document
from datapath.state.kind import Claim, Kind, Nature, Record

PROTOCOLS = {"": 0, "tcp": 6, "udp": 17}
SIDES = ("outside", "inside")
COUNTERS = ("packets_from", "packets_to", "bytes_from", "bytes_to")


class Rule(BaseModel):
    """One line of the document."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outside: str
    inside: str
    protocol: Literal["", "tcp", "udp"] = ""
    outside_port: int = Field(default=0, ge=0, le=65_535)
    inside_port: int = Field(default=0, ge=0, le=65_535)

    def record(self) -> Record:
        """`inside_port` is the outside one where only that is given."""
        return {
            "outside": str(ipaddress.ip_address(self.outside)),
            "inside": str(ipaddress.ip_address(self.inside)),
            "protocol": self.protocol,
            "outside_port": self.outside_port,
            "inside_port": self.inside_port or self.outside_port,
        }


class RemapDocument(Document):
    """What an operator writes: `rules`."""

    rules: tuple[Rule, ...]

    @model_validator(mode="after")
    def _consistent(self) -> RemapDocument:
        found = [problem for rule in self.rules for problem in _of_one(rule.model_dump())]
        found = found or problems(self.records())
        if found:
            raise ValueError("; ".join(found[:5]))
        return self

    def records(self) -> list[Record]:
        return [rule.record() for rule in self.rules]


REMAP = Kind(
    name="remap",
    version=1,
    nature=Nature.CONFIGURATION | Nature.ACCOUNTING,
    key=("outside", "protocol", "outside_port"),
    fields={
        "outside": (str,),  # address that the network sees
        "protocol": (str,),  # "tcp" or "udp" with ports, "" without: the whole address
        "outside_port": (int,),  # 0 without a protocol
        "inside": (str,),  # address that the guest has, of the same family
        "inside_port": (int,),
        "packets_from": (int,),  # accounting: remapped at this rule, segments of a GSO frame one by one
        "packets_to": (int,),
        "bytes_from": (int,),  # accounting: of IP packets
        "bytes_to": (int,),
    },
    defaults={"protocol": "", "outside_port": 0, "inside_port": 0},
    accounting=COUNTERS,
    choices={"protocol": frozenset(PROTOCOLS)},
    document=RemapDocument,
    announced="outside",
    claim=Claim(("outside",), "outside address", by_network=True),
)


def problems(records: Iterable[Record]) -> list[str]:
    """What is wrong with a port's rules, a sentence each; [] when they are one to one."""
    rules = list(records)
    found = [problem for rule in rules for problem in _of_one(rule)]
    return found or [*_twice(rules), *_several(rules), *_both(rules)]


class ByAddress:
    """A port's rules by their addresses: two that have none in common neither contradict nor change each other."""

    def __init__(self, rules: Iterable[Record]) -> None:
        self._rules: dict[str, dict[tuple[object, ...], Record]] = {}
        self.change((), rules)

    def change(self, gone: Iterable[Record], new: Iterable[Record]) -> None:
        """Take rules out, and then put some in; one that is there with the same key is replaced."""
        for rule in gone:
            for side in SIDES:
                self._rules[rule[side]].pop(REMAP.key_of(rule), None)
        for rule in new:
            for side in SIDES:
                self._rules.setdefault(rule[side], {})[REMAP.key_of(rule)] = rule

    def near(self, rules: Iterable[Record]) -> list[Record]:
        """Those that have an address of these rules, once each."""
        addresses = {rule[side] for rule in rules for side in SIDES}
        found = (self._rules.get(address, {}) for address in addresses)
        return list({key: rule for some in found for key, rule in some.items()}.values())


def _of_one(rule: Record) -> list[str]:
    outside, inside = rule["outside"], rule["inside"]
    found = [f"{side} {rule[side]!r} is no IP address" for side in SIDES if not _packed(rule[side])]
    if found:
        return found
    found = [
        f"{side} {rule[side]} is not an address of one station that is routed"
        for side in SIDES
        if not _is_station(_packed(rule[side]))
    ]
    if len(_packed(outside)) != len(_packed(inside)):
        found.append(f"outside {outside} and inside {inside} are of two families")
    if bool(rule["protocol"]) != bool(rule["outside_port"]) or (rule["inside_port"] and not rule["protocol"]):
        found.append(f"outside {outside}: protocol (tcp, udp) and ports (1..65535) go together")
    return found


def _packed(text: str) -> bytes:
    """4 or 16 bytes; none for what is no address. A table has ten thousands: ipaddress would take a second for them."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        return b""


def _is_station(address: bytes) -> bool:
    """RFC 6890: neither unspecified, loopback, link-local, multicast, reserved nor v4-mapped."""
    if len(address) == 4:
        return address[0] not in (0, 127) and address[0] < 224 and address[:2] != b"\xa9\xfe"
    link_local = address[0] == 0xFE and address[1] & 0xC0 == 0x80
    return address[0] != 0xFF and not link_local and any(address[:10])


def _twice(rules: Sequence[Record]) -> list[str]:
    found = []
    for side in SIDES:
        seen: set[tuple[object, ...]] = set()
        for rule in rules:
            end = (rule[side], rule["protocol"], rule[f"{side}_port"])
            if end in seen:
                found.append(f"{side} {_end(*end)} is in two rules")
            seen.add(end)
    return found


def _end(address: object, protocol: object, port: object) -> str:
    return f"{address} {protocol} port {port}" if protocol else str(address)


def _several(rules: Sequence[Record]) -> list[str]:
    """Later fragments have no ports: their address alone must say where they go."""
    leads: dict[str, str] = {}
    return [
        f"outside {rule['outside']} leads to {leads[rule['outside']]} and to {rule['inside']}: one address leads to one"
        for rule in rules
        if leads.setdefault(rule["outside"], rule["inside"]) != rule["inside"]
    ]


def _both(rules: Sequence[Record]) -> list[str]:
    both = {rule["outside"] for rule in rules} & {rule["inside"] for rule in rules}
    return [f"{address} is outside in one rule and inside in another" for address in sorted(both)]
