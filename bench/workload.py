"""Tables of connections as a busy server has them, as columns of kind conntrack."""

from __future__ import annotations

import socket

import numpy as np

from datapath.state.conntrack import ASSURED, INBOUND, REPLIED, STATES
from datapath.state.kind import Columns

HOUR_NS = 3_600_000_000_000
CLIENTS = 1 << 24  # 10.0.0.0/8
SCATTER = 11_400_714_819_323_198_485 % CLIENTS | 1  # odd: a multiplication that leaves no client out
EPHEMERAL = (1024, 65_535)


def connections(count: int, address: str = "192.0.2.10", seed: int = 1) -> Columns:
    """Established TCP connections of one guest, each with a client of its own in 10/8, all over it.

    Addresses, ports, ages and ids are random, as far as a compressor can see.
    """
    rng = np.random.default_rng(seed)
    number = np.arange(count, dtype=np.uint64) * np.uint64(SCATTER) % np.uint64(CLIENTS)
    local = np.zeros((count, 16), np.uint8)
    local[:, 10:12] = 255
    remote = local.copy()
    local[:, 12:] = tuple(socket.inet_aton(address))
    remote[:, 12:] = number.astype(">u4").view(np.uint8).reshape(count, 4)
    remote[:, 12] = 10
    return {
        "laddr": local.view("V16").reshape(count),
        "raddr": remote.view("V16").reshape(count),
        "lport": np.full(count, 443, "<u2"),
        "rport": rng.integers(*EPHEMERAL, count, dtype="<u2"),
        "proto": np.full(count, socket.IPPROTO_TCP, "u1"),
        "type": np.zeros(count, "u1"),
        "from": np.zeros(count, "u1"),
        "state": np.full(count, STATES["ESTABLISHED"], "u1"),
        "flags": np.full(count, REPLIED | ASSURED | INBOUND, "u1"),
        "age_ns": rng.integers(0, HOUR_NS // 2, count, dtype="<u8"),
        "id": rng.integers(1, 1 << 63, count, dtype="<u8"),
        "judged": np.zeros(count, "<u4"),
        "mark": np.zeros(count, "<u4"),
    }
