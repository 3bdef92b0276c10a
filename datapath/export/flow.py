"""What a flow record says, in no format's terms: a row for a direction of a connection that has something to tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FROM_GUEST, TO_GUEST = 0, 1

Rows = NDArray[Any]

FLOW = np.dtype(
    [
        ("id", "<u8"),  # of the connection
        ("source", "V16"),  # network order, IPv4 v4-mapped
        ("target", "V16"),
        ("source_port", "<u2"),
        ("target_port", "<u2"),  # ICMP: type << 8 | code
        ("proto", "u1"),
        ("tcp_flags", "u1"),
        ("direction", "u1"),  # FROM_GUEST (into the switch), TO_GUEST
        ("reason", "u1"),  # IPFIX flowEndReason
        ("packets", "<u8"),  # since the last record of the same flow
        ("bytes", "<u8"),  # of IP packets
        ("start_ago_ns", "<u8"),
        ("end_ago_ns", "<u8"),
    ]
)


@dataclass(frozen=True)
class Moment:
    """What the head of a datagram says. `now_ms`: since 1970; `uptime_ms`: of the exporter."""

    now_ms: int
    uptime_ms: int
    sequence: int
    domain: int


def is_v4(rows: Rows) -> NDArray[np.bool_]:
    """Which rows are of IPv4 connections."""
    raw = np.ascontiguousarray(rows["source"]).view(np.uint8).reshape(len(rows), 16)
    found: NDArray[np.bool_] = (raw[:, :10] == 0).all(axis=1) & (raw[:, 10:12] == 0xFF).all(axis=1)
    return found


def address(rows: Rows, name: str, *, v4: bool) -> Rows:
    """A column of addresses as they are on the wire: 4 bytes or 16."""
    raw = np.ascontiguousarray(rows[name]).view(np.uint8).reshape(len(rows), 16)
    return np.ascontiguousarray(raw[:, 12:]).view("V4").ravel() if v4 else rows[name]
