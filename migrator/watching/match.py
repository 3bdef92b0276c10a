"""Filters on the fields of records: `proto=tcp`, `rport=80,443`, `raddr=192.0.2.0/24`, `state!=TIME_WAIT`.

Values are written as they are shown. Several, separated by commas, are alternatives; all filters have to hold.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.registry import KINDS
from datapath.state.kind import Column, Kind, Record, Table
from datapath.state.labels import LABEL_BITS
from datapath.state.labels import parse as parse_masked
from migrator.errors import ConfigInvalid
from migrator.watching.compare import identity, told

Mask = NDArray[np.bool_]
Test = Callable[[NDArray[Any]], Mask]

_MAPPED = 96  # bits before an IPv4 address in a v4-mapped one
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Match:
    """One filter as it was written."""

    field: str
    values: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.field}{'!=' if self.negated else '='}{','.join(self.values)}"


def parse(text: str) -> Match:
    """FIELD=VALUE[,VALUE…] or FIELD!=VALUE[,VALUE…]. Raises ConfigInvalid."""
    name, equals, values = text.partition("=")
    negated = name.endswith("!")
    alternatives = tuple(part.strip() for part in values.split(","))
    if not equals or not name.rstrip("!").strip() or not all(alternatives):
        raise ConfigInvalid(f"match: expected FIELD=VALUE or FIELD!=VALUE, not {text!r}", hint="--match proto=tcp")
    return Match(name.rstrip("!").strip(), alternatives, negated)


class Filter:
    """Filters of one kind. Raises ConfigInvalid where the kind has no such field, or the field no such value."""

    def __init__(self, kind: Kind, matches: Sequence[Match]) -> None:
        self._tests = [(match, _test(kind, match)) for match in matches]

    def mask(self, table: Table) -> Mask:
        """Which rows all filters hold for."""
        keep = np.ones(len(table), bool)
        for match, test in self._tests:
            if table.columns is not None:
                values: NDArray[Any] = table.columns[match.field]
            else:
                values = np.empty(len(table), object)
                for row, record in enumerate(table.records or ()):  # at once, lists would become dimensions
                    values[row] = record.get(match.field)
            keep &= test(values) != match.negated
        return keep

    def __bool__(self) -> bool:
        return bool(self._tests)


def filters(kinds: Sequence[str], matches: Sequence[Match]) -> dict[str, Filter]:
    """A filter for each kind. Raises ConfigInvalid: a filter that one of the kinds cannot hold hides that kind."""
    return {name: Filter(KINDS[name], matches) for name in kinds}


def _test(kind: Kind, match: Match) -> Test:
    names = (*identity(kind), *told(kind))
    if match.field not in names:
        counted = match.field in kind.columns or match.field in kind.fields
        why = "is only counted: no change of it is told" if counted else f"is no field of kind {kind.name}"
        raise ConfigInvalid(f"match: {match.field} {why}", hint=f"fields: {', '.join(names)}")
    if not kind.columns:
        return _any([_of_record(value) for value in match.values])
    column = kind.columns[match.field]
    return _any([_of_column(column, match.field, value) for value in match.values])


def _any(tests: Sequence[Test]) -> Test:
    return lambda values: np.logical_or.reduce([test(values) for test in tests])


# ---- columns ----


def _of_column(column: Column, name: str, value: str) -> Test:
    if column.number:
        return _wide(name, value)
    if column.dtype == "V16":
        return _address(name, value)
    if column.dtype == "V6":
        return _mac(name, value)
    for number, label in column.labels.items():
        if label.lower() == value.lower():
            return lambda values: values == number
    for bit, label in column.bits.items():
        if label.lower() == value.lower():
            return lambda values: (values & bit) != 0
    return _number(name, value, [*column.labels.values(), *column.bits.values()])


def _number(name: str, value: str, labels: Sequence[str] = ()) -> Test:
    bounds = _RANGE.fullmatch(value)
    try:
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            return lambda values: (values >= first) & (values <= last)
        number = int(value, 0)
    except ValueError:  # also one of thousands of digits
        wanted = f"one of {', '.join(labels)} or a number" if labels else "a number or FIRST-LAST"
        raise ConfigInvalid(f"match: {name}: expected {wanted}, not {value!r}") from None
    return lambda values: values == number


def _wide(name: str, value: str) -> Test:
    try:
        number, bits = parse_masked(value, LABEL_BITS)
    except ValueError as error:
        raise ConfigInvalid(f"match: {name}: {error}, not {value!r}") from None
    wanted, mask = (np.frombuffer(one.to_bytes(16, "big"), np.uint8) for one in (number, bits))
    return _masked(wanted, mask)


def _address(name: str, value: str) -> Test:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ConfigInvalid(f"match: {name}: expected an address or prefix, not {value!r}") from None
    wide = isinstance(network, ipaddress.IPv6Network)
    packed = network.network_address.packed if wide else b"\0" * 10 + b"\xff\xff" + network.network_address.packed
    bits = network.prefixlen + (0 if wide else _MAPPED)
    mask = np.frombuffer(((1 << 128) - (1 << (128 - bits))).to_bytes(16, "big"), np.uint8)
    return _masked(np.frombuffer(packed, np.uint8) & mask, mask)


def _masked(wanted: NDArray[np.uint8], mask: NDArray[np.uint8]) -> Test:
    def test(values: NDArray[Any]) -> Mask:
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), 16)
        same: Mask = ((raw & mask) == wanted).all(axis=1)
        return same

    return test


def _mac(name: str, value: str) -> Test:
    if not _MAC.fullmatch(value.lower()):
        raise ConfigInvalid(f"match: {name}: expected a MAC such as 52:54:00:00:00:01, not {value!r}")
    wanted = np.frombuffer(bytes.fromhex(value.replace(":", "")), np.uint8)

    def test(values: NDArray[Any]) -> Mask:
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), 6)
        same: Mask = (raw == wanted).all(axis=1)
        return same

    return test


# ---- records ----


def _of_record(value: str) -> Test:
    """The value itself, one of a list, or a key of a map, as JSON or plain text."""
    return lambda values: np.array([_holds(held, value) for held in values.tolist()], bool)


def _holds(held: Any, value: str) -> bool:
    if isinstance(held, list | dict):
        return any(_holds(one, value) for one in held)
    return held == value or (not isinstance(held, str) and json.dumps(held) == value)


def fields(kinds: Sequence[str]) -> list[str]:
    """Names that a filter may have, for the shell's completion."""
    return sorted({name for kind in kinds for name in (*identity(KINDS[kind]), *told(KINDS[kind]))})


def shown(record: Record) -> str:
    """A record in one line: `name=value …`, without what is empty."""
    return " ".join(f"{name}={_text(value)}" for name, value in record.items() if value not in ("", None, [], {}))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
