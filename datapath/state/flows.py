"""Kind `flows`: what is not reported yet of the connections of a port that exports flows (kind `flow_export`).

It says how much of each connection has been reported, and has those that are over and not reported to the end. It comes
at settle: from the pause to there neither host reports, so both numbers are final.
"""

from __future__ import annotations

from datapath.state.conntrack import PROTOCOLS, STATES
from datapath.state.flow_export import FLOW_EXPORT
from datapath.state.kind import Column, Kind, Nature

REASONS = {0: "LIVES", 1: "IDLE", 2: "ACTIVE", 3: "ENDED", 4: "FORCED", 5: "NO_ROOM"}
"""IPFIX flowEndReason (RFC 5102, 5.11.3), and 0."""
NEVER = (1 << 64) - 1

FLOWS = Kind(
    name="flows",
    version=1,
    nature=Nature.ACCOUNTING,
    key=("id",),
    required=False,
    part_of=FLOW_EXPORT.name,
    columns={
        "id": Column("<u8"),  # of the connection, as in kind conntrack
        "ended": Column("u1", 0, values=frozenset(REASONS), labels=REASONS),
        "lifetime_ns": Column("<u8", 0, volatile=True),  # since the first packet, at the table's port_time_ns
        "unreported_ns": Column("<u8", NEVER, volatile=True),  # since the last record; NEVER: there was none
        "tcp_flags_from": Column("u1", 0),
        "tcp_flags_to": Column("u1", 0),
        "reported_packets_from": Column("<u8", 0, accounting=True),
        "reported_packets_to": Column("<u8", 0, accounting=True),
        "reported_bytes_from": Column("<u8", 0, accounting=True),
        "reported_bytes_to": Column("<u8", 0, accounting=True),
        # the rest is of those that are over: the last that there was to know of them
        "laddr": Column("V16", bytes(16)),
        "raddr": Column("V16", bytes(16)),
        "lport": Column("<u2", 0),
        "rport": Column("<u2", 0),
        "proto": Column("u1", 0, labels=PROTOCOLS),
        "state": Column("u1", 0, labels={v: k for k, v in STATES.items()}),
        "age_ns": Column("<u8", 0, volatile=True),  # since the last packet
        "packets_from": Column("<u8", 0, accounting=True),
        "packets_to": Column("<u8", 0, accounting=True),
        "bytes_from": Column("<u8", 0, accounting=True),
        "bytes_to": Column("<u8", 0, accounting=True),
    },
)
