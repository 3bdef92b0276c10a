"""Kind `conntrack`: every tracked connection of a port, and fragments on their way.

Keys are written from the VM's side. Names and default timeouts are nf_conntrack's (Linux, nf_conntrack_proto_tcp.c,
Documentation/networking/nf_conntrack-sysctl.rst).
"""

from __future__ import annotations

from datapath.state.kind import Column, Kind, Nature

STATES = {
    "NONE": 0,
    "SYN_SENT": 1,
    "SYN_RECV": 2,
    "ESTABLISHED": 3,
    "FIN_WAIT": 4,
    "CLOSE_WAIT": 5,
    "LAST_ACK": 6,
    "TIME_WAIT": 7,
    "CLOSE": 8,
    "SYN_SENT2": 9,
    "NEW": 16,
    "REPLIED": 17,
}

REPLIED = 1 << 0
ASSURED = 1 << 1
INBOUND = 1 << 2
LEARNED = 1 << 3
FLAGS = {REPLIED: "REPLIED", ASSURED: "ASSURED", INBOUND: "INBOUND", LEARNED: "LEARNED"}

RELABELLED = ("id", "mark", "label")
"""What a change of marks and labels names beside the key: the id, so that it is the connection that was meant."""

ALARM_PERCENT = 80  # a table that is fuller is reported to the operator

WINDOW_FLAGS = {
    1 << 0: "FROM",  # the guest's SYN was seen
    1 << 1: "TO",  # the other side's was seen, too: nothing is checked without both
    1 << 2: "UNCHECKED",
    1 << 3: "SYN_FROM",  # the guest sent one in mid-connection, which was ignored
    1 << 4: "SYN_TO",
}
NO_SCALE = 15  # a SYN without the option of RFC 7323

PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}

CONNTRACK = Kind(
    name="conntrack",
    version=1,
    nature=Nature.LIVE | Nature.ACCOUNTING,
    late=True,
    key=("laddr", "raddr", "lport", "rport", "proto", "type", "from"),
    columns={
        "laddr": Column("V16"),  # the guest's address, network order, IPv4 v4-mapped
        "raddr": Column("V16"),
        "lport": Column("<u2"),  # ICMP echo: identifier; fragments: high half of the id
        "rport": Column("<u2"),  # ICMP echo: 0; fragments: low half of the id
        "proto": Column("u1", labels=PROTOCOLS),  # IANA number
        "type": Column("u1", 0, values=frozenset({0, 1})),  # 0 connection, 1 fragment record
        "from": Column("u1", 0, values=frozenset({0, 1})),  # fragments: 1 from the guest
        "state": Column(
            "u1", values=frozenset(STATES.values()), labels={v: k for k, v in STATES.items()}
        ),  # number in STATES
        "flags": Column("u1", 0, bits=FLAGS),  # REPLIED, ASSURED, INBOUND, LEARNED
        "age_ns": Column("<u8", 0, volatile=True),  # since the last packet, at the table's port_time_ns
        "id": Column("<u8"),
        "judged": Column("<u4", 0, volatile=True),  # digest of the policy it was judged under, 0: judge again
        "mark": Column("<u4", 0),  # this and `label` by a rule that let it in, or by an operator: docs/labels.md
        "label": Column("V16", bytes(16), number=True, sparse=True),
        # TCP, at a port with kind window; sequence numbers are those of the wire. Left out where no connection has any
        "window_flags": Column("u1", 0, volatile=True, values=frozenset(range(32)), bits=WINDOW_FLAGS),
        "window_scale_from": Column("u1", 0, volatile=True, values=frozenset(range(16))),  # shift count, or NO_SCALE
        "window_scale_to": Column("u1", 0, volatile=True, values=frozenset(range(16))),
        "window_ignored_scale": Column("u1", 0, volatile=True, values=frozenset(range(16))),  # of the ignored SYN
        "window_ignored_next": Column("<u2", 0, volatile=True),  # low bits of what acknowledges that
        **{
            f"window_{number}_{side}": Column("<u4", 0, volatile=True)
            # sent up to, allowed up to, acknowledged up to, largest window offered in bytes
            for number in ("end", "limit", "acked", "offered")
            for side in ("from", "to")
        },
        "packets_from": Column("<u8", 0, accounting=True),
        "packets_to": Column("<u8", 0, accounting=True),
        "bytes_from": Column("<u8", 0, accounting=True),  # of IP packets
        "bytes_to": Column("<u8", 0, accounting=True),
    },
)

TIMEOUTS: dict[str, tuple[int, int]] = {
    # name -> (index in struct port.timeouts, default in milliseconds)
    "tcp_syn_sent": (1, 120_000),
    "tcp_syn_recv": (2, 60_000),
    "tcp_established": (3, 432_000_000),
    "tcp_fin_wait": (4, 120_000),
    "tcp_close_wait": (5, 60_000),
    "tcp_last_ack": (6, 30_000),
    "tcp_time_wait": (7, 120_000),
    "tcp_close": (8, 10_000),
    "tcp_syn_sent2": (9, 120_000),
    "udp": (10, 30_000),
    "udp_stream": (11, 120_000),
    "icmp": (12, 30_000),
    "generic": (13, 600_000),
    "fragment": (14, 30_000),
}
