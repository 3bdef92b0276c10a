"""Compile a policy's rules into the tables of the bit-vector classifier (datapath/bpf/lib/acl.h reads them).

A packet is looked up in two dimensions: its remote address in an LPM trie per direction, and `proto << 16 | port` by
binary search in sorted interval starts. Each gives the number of a *row*: one bit a rule, set where the rule matches in
that dimension. The lowest bit that is set in both rows is the rule that wins, so bits are numbered by rank.

A row is one summary group and `groups` groups of 256 bits: bit g of the summary is set when group g is not empty.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import labels
from datapath.errors import LoadRejected, UnsupportedKind
from datapath.state.acl import ACL, digest
from datapath.state.kind import Record

RULES_MAX = 16_384
GROUP_BITS = 256
LINE_END = 1 << 24  # proto << 16 | port, exclusive
DIRECTIONS = {"from": 0, "to": 1}  # enum acl_direction
ACTIONS = {"allow": 1, "drop": 2, "reject": 3}  # enum acl_action
PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}
V4_MAPPED = 0xFFFF << 32

Range = tuple[int, int]  # first, last; both included
Prefix = tuple[int, int, int]  # direction, 128-bit address, length
ALL_IPV6, ALL_IPV4 = (0, 0), (V4_MAPPED, 96)


@dataclass(frozen=True)
class Compiled:
    """Tables of one generation, in the kernel's layouts but for struct packing.

    prefixes  (n,) direction u1, length u4, addr (n, 16) u1, row u4
    starts    (m, 2) u4: first number of an interval, row; sorted, starts at 0
    matrix    (rows * (groups + 1), 4) u8, without the shape element
    ids, actions, logs: by rank; labels too: element of label_table (ACL_LABEL), 0 none
    """

    digest: int
    prefix_direction: NDArray[np.uint8]
    prefix_length: NDArray[np.uint32]
    prefix_addr: NDArray[np.uint8]
    prefix_row: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    matrix: NDArray[np.uint64]
    groups: int
    ids: NDArray[np.uint32]
    actions: NDArray[np.uint8]
    logs: NDArray[np.uint8]
    labels: NDArray[np.uint16]
    label_table: np.ndarray


class _Rows:
    """Rows that are equal are stored once."""

    def __init__(self, words: int) -> None:
        self.words = words
        self._index: dict[bytes, int] = {}

    def add(self, row: NDArray[np.uint64]) -> int:
        return self._index.setdefault(row.tobytes(), len(self._index))

    def matrix(self) -> NDArray[np.uint64]:
        """All rows with their summaries, (rows * (groups + 1), 4)."""
        count, groups = len(self._index), self.words // 4
        bits = np.frombuffer(b"".join(self._index), np.uint64).reshape(count, groups, 4)
        whole = np.zeros((count, groups + 1, 4), np.uint64)
        whole[:, 1:, :] = bits
        weights = np.uint64(1) << np.arange(groups, dtype=np.uint64)
        whole[:, 0, 0] = (bits.any(axis=2) * weights).sum(axis=1, dtype=np.uint64)
        return whole.reshape(-1, 4)


def validate(rules: Sequence[Record]) -> None:
    """Raise LoadRejected for the first rule that is not one, naming the rule and the field."""
    seen: set[int] = set()
    for number, rule in enumerate(rules):
        where = f"acl rule {number} (id {rule.get('id')!r})"
        for name, types in ACL.fields.items():
            if name in rule or name not in ACL.optional:
                _check_type(where, name, rule.get(name), types)
        _check(rule["id"] not in seen, where, "id", "is there twice")
        seen.add(rule["id"])
        _check(1 <= rule["id"] < 1 << 32, where, "id", "is not in 1..2^32-1")
        _check(rule["direction"] in DIRECTIONS, where, "direction", 'is neither "from" nor "to"')
        _check(rule["action"] in ACTIONS, where, "action", f"is none of {', '.join(ACTIONS)}")
        _check(0 <= rule["priority"] <= 65_535, where, "priority", "is not in 0..65535")
        try:
            _ranges(rule)
            _prefixes(rule)
            labels.validate(rule)
        except (ValueError, TypeError, KeyError) as error:
            raise LoadRejected(f"{where}: {error}", hint="correct the rule and load the policy again") from error


def _check_type(where: str, name: str, value: Any, types: tuple[type, ...]) -> None:
    boolean = isinstance(value, bool) and bool not in types
    _check(isinstance(value, types) and not boolean, where, name, f"is {type(value).__name__}")


def _check(good: bool, where: str, name: str, what: str) -> None:
    if not good:
        raise LoadRejected(f"{where}: {name} {what}", hint="correct the rule and load the policy again")


def _protocol(rule: Record) -> int | None:
    protocol = rule["protocol"]
    if protocol == "any":
        return None
    number = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
    if not 0 <= number <= 255:
        raise ValueError(f"protocol {number} is not in 0..255")
    return number


def _ranges(rule: Record) -> list[Range]:
    """Where the rule matches on the line, disjoint and sorted."""
    protocol = _protocol(rule)
    if (rule["ports"] and protocol not in (6, 17)) or (rule["icmp"] and protocol not in (1, 58)):
        raise ValueError(f"ports or icmp do not go with protocol {rule['protocol']!r}")
    if protocol is None:
        return [(0, LINE_END - 1)]
    base = protocol << 16
    if rule["ports"]:
        return _merged((base + _bounded(a, 65_535), base + _bounded(b, 65_535)) for a, b in rule["ports"])
    if rule["icmp"]:
        kind, *code = (_bounded(number, 255) for number in rule["icmp"])
        if len(code) > 1:
            raise ValueError("icmp is [type] or [type, code]")
        first, last = (code[0], code[0]) if code else (0, 255)
        return [(base + (kind << 8) + first, base + (kind << 8) + last)]
    return [(base, base + 65_535)]


def _bounded(number: Any, highest: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= highest:
        raise ValueError(f"{number!r} is not in 0..{highest}")
    return number


def _merged(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if last < first:
            raise ValueError(f"range {first & 0xFFFF}-{last & 0xFFFF} is empty")
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _prefixes(rule: Record) -> list[Prefix]:
    direction = DIRECTIONS[rule["direction"]]
    if not rule["remote"]:
        return [(direction, *ALL_IPV6), (direction, *ALL_IPV4)]
    return [(direction, *_mapped(text)) for text in rule["remote"]]


@lru_cache(maxsize=65_536)
def _mapped(text: str) -> tuple[int, int]:
    """A prefix as v4-mapped 128-bit address and length."""
    if not isinstance(text, str):
        raise TypeError(f"prefix {text!r} is no text")
    network = ipaddress.ip_network(text, strict=False)
    if network.version == 4:
        return V4_MAPPED | int(network.network_address), 96 + network.prefixlen
    if _is_ipv4(int(network.network_address), network.prefixlen):
        raise ValueError(f"prefix {text} is of IPv4 addresses: written as IPv6 no frame has them")
    return int(network.network_address), network.prefixlen


def _is_ipv4(address: int, length: int) -> bool:
    return length >= 96 and address >> 32 == 0xFFFF


def compile_rules(rules: Sequence[Record]) -> Compiled:
    """Tables of a policy. Rules must be valid (`validate`).

    Raises UnsupportedKind when there are more rules, or more about labels, than the classifier holds.
    """
    if len(rules) > RULES_MAX:
        raise UnsupportedKind(
            f"a policy of {len(rules)} rules, the classifier holds {RULES_MAX}", hint="merge rules into prefix lists"
        )
    ranked = sorted(rules, key=lambda rule: rule["priority"])  # stable: of equals the first wins
    groups = max(1, -(-len(ranked) // GROUP_BITS))
    rows = _Rows(groups * 4)
    prefixes = _compile_prefixes(ranked, rows)
    starts = _compile_line(ranked, rows)
    numbers, table = labels.compile_labels(ranked)
    addresses = b"".join(addr.to_bytes(16, "big") for _, addr, _, _ in prefixes)
    return Compiled(
        digest=digest(rules),
        prefix_direction=np.array([p[0] for p in prefixes], np.uint8),
        prefix_length=np.array([p[2] for p in prefixes], np.uint32),
        prefix_addr=np.frombuffer(addresses, np.uint8).reshape(-1, 16),
        prefix_row=np.array([p[3] for p in prefixes], np.uint32),
        starts=np.array(starts, np.uint32),
        matrix=rows.matrix(),
        groups=groups,
        ids=np.array([rule["id"] for rule in ranked], np.uint32),
        actions=np.array([ACTIONS[rule["action"]] for rule in ranked], np.uint8),
        logs=np.array([rule["log"] for rule in ranked], np.uint8),
        labels=numbers,
        label_table=table,
    )


def _set(row: NDArray[np.uint64], ranks: Sequence[int]) -> None:
    for rank in ranks:
        row[rank >> 6] |= np.uint64(1 << (rank & 63))


def _compile_prefixes(ranked: Sequence[Record], rows: _Rows) -> list[tuple[int, int, int, int]]:
    """(direction, address, length, row) of every prefix; a prefix inherits the rules of those that contain it.

    But for IPv4's, which lie within an IPv6 prefix like ::/0 by their form and are none of its addresses.
    """
    owners: dict[Prefix, list[int]] = {(direction, *ALL_IPV4): [] for direction in DIRECTIONS.values()}
    for rank, rule in enumerate(ranked):
        for prefix in _prefixes(rule):
            owners.setdefault(prefix, []).append(rank)
    compiled: list[tuple[int, int, int, int]] = []
    around: list[tuple[Prefix, NDArray[np.uint64]]] = []  # prefixes that contain the one at hand, outermost first
    for prefix in sorted(owners):  # by direction, address, length: whoever contains comes before
        while around and not _contains(around[-1][0], prefix):
            around.pop()
        inherits = around and _is_ipv4(*around[-1][0][1:]) == _is_ipv4(*prefix[1:])
        row = around[-1][1].copy() if inherits else np.zeros(rows.words, np.uint64)
        _set(row, owners[prefix])
        around.append((prefix, row))
        compiled.append((*prefix, rows.add(row)))
    return compiled


def _contains(outer: Prefix, inner: Prefix) -> bool:
    return outer[0] == inner[0] and outer[2] <= inner[2] and (outer[1] ^ inner[1]) >> (128 - outer[2]) == 0


def _compile_line(ranked: Sequence[Record], rows: _Rows) -> list[Range]:
    """(start, row) of every interval of the line."""
    begins: dict[int, list[int]] = {0: []}
    ends: dict[int, list[int]] = {}
    for rank, rule in enumerate(ranked):
        for first, last in _ranges(rule):
            begins.setdefault(first, []).append(rank)
            if last + 1 < LINE_END:
                ends.setdefault(last + 1, []).append(rank)
    current = np.zeros(rows.words, np.uint64)
    compiled: list[Range] = []
    for start in sorted(begins.keys() | ends.keys()):
        for rank in ends.get(start, ()):
            current[rank >> 6] &= ~np.uint64(1 << (rank & 63))
        _set(current, begins.get(start, ()))
        row = rows.add(current)
        if not compiled or compiled[-1][1] != row:
            compiled.append((start, row))
    return compiled
