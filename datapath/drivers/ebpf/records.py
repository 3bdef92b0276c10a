"""Check a record of kind `port` before anything is made of it."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from datapath.errors import LoadRejected
from datapath.provider import PortRef
from datapath.state.check import checked_records
from datapath.state.conntrack import TIMEOUTS
from datapath.state.kind import Op, Record, Table
from datapath.state.port import PORT

CONNECTIONS_LIMIT = 4_194_304
TIMEOUT_LIMIT_MS = (1 << 32) - 1

_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_HINT = "correct the port's record; nothing was made"


def checked_port(record: Record, ref: PortRef) -> Record:
    """The record with defaults for what it lacks. Raises LoadRejected naming the field."""
    full = checked_records(PORT, Table(PORT.name, Op.LOAD, records=[record]))[0]
    full.pop("counters", None)
    _check(_MAC.fullmatch(full["mac"]) is not None, "mac", f"{full['mac']!r} is no MAC in lower case with colons")
    _check(full["mac"] == ref.mac, "mac", f"is {full['mac']}, the port's is {ref.mac}")
    _check(not int(full["mac"][:2], 16) & 1, "mac", f"{full['mac']} is a group address")
    _check_addresses(full["addresses"])
    _check_trunk(full["trunk"])
    _check_range("mtu", full["mtu"], 68, 65_535)
    _check_range("connections_max", full["connections_max"], 1, CONNECTIONS_LIMIT)
    _check_range("learned_max", full["learned_max"], 0, 65_535)
    for name, value in full["timeouts_ms"].items():
        _check(name in TIMEOUTS, "timeouts_ms", f"{name!r} is no timeout; there are {', '.join(TIMEOUTS)}")
        _check_range(f"timeouts_ms {name}", value, 1, TIMEOUT_LIMIT_MS)
    return full


def _check(good: bool, name: str, what: str) -> None:
    if not good:
        raise LoadRejected(f"port: {name} {what}", hint=_HINT)


def _check_range(name: str, value: Any, lowest: int, highest: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest
    _check(good, name, f"{value!r} is not in {lowest}..{highest}")


def _check_addresses(addresses: list[Any]) -> None:
    for text in addresses:
        try:
            ipaddress.ip_address(text)
        except ValueError as error:
            raise LoadRejected(f"port: addresses: {error}", hint=_HINT) from error


def _check_trunk(trunk: dict[Any, Any]) -> None:
    for vid, network in trunk.items():
        good = isinstance(vid, str) and vid.isascii() and vid.isdigit() and 1 <= int(vid) <= 4094
        _check(good, "trunk", f"{vid!r} is no VLAN id in 1..4094, as text")
        _check(isinstance(network, str), "trunk", f"{network!r} is no network's name")


def mac_bytes(mac: str) -> bytes:
    """aa:bb:cc:dd:ee:ff as six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def address_bytes(text: str) -> bytes:
    """An address as 16 bytes in network order, IPv4 v4-mapped."""
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def address_text(packed: bytes) -> str:
    """The inverse of address_bytes."""
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
