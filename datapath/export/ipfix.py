"""IPFIX (RFC 7011, RFC 7012): one message of flow records. A pure function."""

from __future__ import annotations

import struct

import numpy as np

from datapath.export import template
from datapath.export.flow import Moment, Rows
from datapath.export.template import Field

_FIELDS = (
    Field(152, "flowStartMilliseconds", ">u8"),
    Field(153, "flowEndMilliseconds", ">u8"),
    Field(148, "flowId", ">u8"),
)
_WRAP = 1 << 32
TEMPLATES = template.templates(2, _FIELDS)


def datagram(rows: Rows, moment: Moment, *, templates: bool) -> bytes:
    """Records of `rows`, behind the templates if asked. Each direction of a connection is a flow of its own, and both
    have the connection's id as flowId."""
    values = {
        "flowStartMilliseconds": _since_1970(rows["start_ago_ns"], moment),
        "flowEndMilliseconds": _since_1970(rows["end_ago_ns"], moment),
        "flowId": rows["id"],
    }
    body = (TEMPLATES if templates else b"") + template.data(rows, _FIELDS, values)
    seconds, sequence = moment.now_ms // 1000 % _WRAP, moment.sequence % _WRAP
    return struct.pack("!HHIII", 10, 16 + len(body), seconds, sequence, moment.domain) + body


def _since_1970(ago_ns: Rows, moment: Moment) -> Rows:
    found: Rows = np.int64(moment.now_ms) - (ago_ns // np.uint64(1_000_000)).astype(np.int64)
    return found


def following(sequence: int, rows: int) -> int:
    """The sequence number behind a message with so many records: records are counted."""
    return sequence + rows
