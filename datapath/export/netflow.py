"""NetFlow v9 (RFC 3954): one datagram of flow records. A pure function."""

from __future__ import annotations

import struct

import numpy as np

from datapath.export import template
from datapath.export.flow import Moment, Rows
from datapath.export.template import Field

_FIELDS = (Field(22, "first_switched", ">u4"), Field(21, "last_switched", ">u4"))
_WRAP = 1 << 32
TEMPLATES = template.templates(0, _FIELDS)


def datagram(rows: Rows, moment: Moment, *, templates: bool) -> bytes:
    """Records of `rows`, behind the templates if asked. Times are milliseconds of the exporter's uptime, which wraps;
    what began before the exporter began then."""
    values = {
        "first_switched": _uptime(rows["start_ago_ns"], moment),
        "last_switched": _uptime(rows["end_ago_ns"], moment),
    }
    count = len(rows) + (2 if templates else 0)
    head = struct.pack(
        "!HHIIII",
        9,
        count,
        moment.uptime_ms % _WRAP,
        moment.now_ms // 1000 % _WRAP,
        moment.sequence % _WRAP,
        moment.domain,
    )
    return head + (TEMPLATES if templates else b"") + template.data(rows, _FIELDS, values)


def _uptime(ago_ns: Rows, moment: Moment) -> Rows:
    """Milliseconds of uptime at an instant that was so long ago."""
    ago = np.minimum(ago_ns // np.uint64(1_000_000), np.uint64(moment.uptime_ms)).astype(np.int64)
    found: Rows = (moment.uptime_ms - ago) % _WRAP
    return found


def following(sequence: int, rows: int) -> int:  # noqa: ARG001
    """The sequence number behind a datagram with so many records: datagrams are counted."""
    return sequence + 1
