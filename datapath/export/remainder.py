"""What is left to report of connections, and when it is due. Pure: vectors in, vectors out.

A connection counts up for ever, over all hosts that it lives on; what went out in records is `reported`. What is left
is the difference, so no order of reading, reporting and moving can count anything twice or lose it, as long as
the total has everything and `reported` is what was sent. docs/netflow.md says why both are, whatever happens when.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.export.flow import FLOW, FROM_GUEST, TO_GUEST, Rows
from datapath.state.conntrack import STATES

IDLE, ACTIVE, ENDED, FORCED, NO_ROOM = 1, 2, 3, 4, 5
"""IPFIX flowEndReason."""

CONNECTION = np.dtype(
    [
        ("id", "<u8"),
        ("laddr", "V16"),
        ("raddr", "V16"),
        ("lport", "<u2"),
        ("rport", "<u2"),
        ("proto", "u1"),
        ("state", "u1"),
        ("ended", "u1"),  # 0: it lives; else why it does no more
        ("tcp_flags", "u1", 2),  # from, to the guest
        ("began", "<u8"),  # nanoseconds on the port's clock, as the next two
        ("seen", "<u8"),
        ("until", "<u8"),  # up to when it is reported; 0: it never was
        ("packets", "<u8", 2),  # in all; from, to the guest
        ("bytes", "<u8", 2),
        ("reported_packets", "<u8", 2),
        ("reported_bytes", "<u8", 2),
    ]
)

_TCP, _ICMP, _ICMP6 = 6, 1, 58
_OVER = np.array([STATES["TIME_WAIT"], STATES["CLOSE"]], np.uint8)
_REMOTE_ASKS = 0x8000  # rport of an ICMP query (struct ct_key)


def _left(connections: Rows, what: str) -> NDArray[np.uint64]:
    total, reported = connections[what], connections[f"reported_{what}"]
    found: NDArray[np.uint64] = np.where(total > reported, total - reported, np.uint64(0))
    return found


def has_left(connections: Rows) -> NDArray[np.bool_]:
    """Which have packets that are not reported."""
    return np.asarray((_left(connections, "packets") > 0).any(axis=1))


def due(connections: Rows, now: int, active_ns: int, inactive_ns: int) -> NDArray[np.uint8]:
    """Why a record of each is due at `now`, 0: none is. Nothing is due where nothing is left."""
    quiet = now - np.minimum(connections["seen"], np.uint64(now)).astype(np.int64)
    since = np.maximum(connections["until"], connections["began"])
    open_for = now - np.minimum(since, np.uint64(now)).astype(np.int64)
    over = (connections["proto"] == _TCP) & np.isin(connections["state"], _OVER)
    reasons = np.zeros(len(connections), np.uint8)
    reasons[open_for >= active_ns] = ACTIVE
    reasons[quiet >= inactive_ns] = IDLE
    reasons[over] = ENDED
    gone = connections["ended"] != 0
    reasons[gone] = connections["ended"][gone]
    reasons[gone & over] = ENDED
    reasons[~has_left(connections)] = 0
    return reasons


def marked(connections: Rows, now: int) -> Rows:
    """The same after everything that is left was reported at `now`."""
    made = connections.copy()
    told = _left(connections, "packets") > 0  # bytes whose packet was not counted yet are told with it
    for what in ("packets", "bytes"):
        made[f"reported_{what}"] = np.where(told, connections[what], connections[f"reported_{what}"])
    made["until"] = np.maximum(connections["seen"], np.uint64(now))
    return made


def records(connections: Rows, reasons: NDArray[np.uint8], now: int) -> Rows:
    """FLOW rows: for each connection one a direction in which something is left; the guest's first."""
    packets, amounts = _left(connections, "packets"), _left(connections, "bytes")
    made = np.zeros((len(connections), 2), FLOW)
    for direction in (FROM_GUEST, TO_GUEST):
        _fill(made[:, direction], connections, direction)
        made[:, direction]["packets"], made[:, direction]["bytes"] = packets[:, direction], amounts[:, direction]
    made["reason"] = reasons[:, np.newaxis]
    start = np.where(connections["until"] > 0, connections["until"], connections["began"])
    start = np.where(start > 0, start, connections["seen"])  # it began where nobody noted it
    end = np.maximum(connections["seen"], start)
    for name, when in (("start_ago_ns", start), ("end_ago_ns", end)):
        made[name] = (np.uint64(now) - np.minimum(when, np.uint64(now)))[:, np.newaxis]
    return made.reshape(-1)[made["packets"].reshape(-1) > 0]


def _fill(rows: Rows, connections: Rows, direction: int) -> None:
    near, far = ("source", "target") if direction == FROM_GUEST else ("target", "source")
    rows["id"], rows["proto"], rows["direction"] = connections["id"], connections["proto"], direction
    rows["tcp_flags"] = connections["tcp_flags"][:, direction]
    rows[near], rows[far] = connections["laddr"], connections["raddr"]
    icmp = (connections["proto"] == _ICMP) | (connections["proto"] == _ICMP6)
    rows[f"{near}_port"] = np.where(icmp, 0, connections["lport"])
    rows[f"{far}_port"] = np.where(icmp, 0, connections["rport"])
    if icmp.any():
        rows["target_port"][icmp] = _icmp_type(connections[icmp], direction).astype(np.uint16) << 8


def _icmp_type(connections: Rows, direction: int) -> NDArray[Any]:
    """Type of the query, or of its answer in the other direction."""
    asked = connections["rport"] & 0xFF
    v6 = connections["proto"] == _ICMP6
    query = np.where(asked != 0, asked, np.where(v6, 128, 8))
    answer = np.where(asked != 0, asked + 1, np.where(v6, 129, 0))
    asks = (connections["rport"] & _REMOTE_ASKS != 0) == (direction == TO_GUEST)
    found: NDArray[Any] = np.where(asks, query, answer)
    return found
