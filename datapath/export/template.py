"""Templates and records, which NetFlow v9 (RFC 3954) and IPFIX (RFC 7011) have in common, but for numbers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.export.flow import Rows, address, is_v4

V4_TEMPLATE, V6_TEMPLATE = 256, 257


@dataclass(frozen=True)
class Field:
    """An information element (IANA's registry, where both have the same numbers): NumPy type as on the wire."""

    number: int
    name: str
    dtype: str


COMMON = (
    Field(7, "source_port", ">u2"),
    Field(11, "target_port", ">u2"),
    Field(4, "proto", "u1"),
    Field(6, "tcp_flags", "u1"),
    Field(61, "direction", "u1"),
    Field(136, "reason", "u1"),
    Field(2, "packets", ">u8"),
    Field(1, "bytes", ">u8"),
)
V4 = (Field(8, "source", "V4"), Field(12, "target", "V4"))
V6 = (Field(27, "source", "V16"), Field(28, "target", "V16"))


def templates(set_id: int, own: Sequence[Field]) -> bytes:
    """The set with both templates."""
    body = b"".join(_template(number, (*ends, *COMMON, *own)) for number, ends in _BOTH)
    return struct.pack("!HH", set_id, 4 + len(body)) + body


_BOTH = ((V4_TEMPLATE, V4), (V6_TEMPLATE, V6))


def _template(number: int, fields: Sequence[Field]) -> bytes:
    lengths = [(field.number, np.dtype(field.dtype).itemsize) for field in fields]
    return struct.pack("!HH", number, len(fields)) + b"".join(struct.pack("!HH", *one) for one in lengths)


def data(rows: Rows, own: Sequence[Field], values: dict[str, NDArray[Any]]) -> bytes:
    """A set for each IP version that `rows` have, each padded to four bytes. `values` are the columns of `own`."""
    four = is_v4(rows)
    parts = [(V4_TEMPLATE, V4, four), (V6_TEMPLATE, V6, ~four)]
    return b"".join(
        _data(number, rows[which], (*ends, *COMMON, *own), {name: column[which] for name, column in values.items()})
        for number, ends, which in parts
        if which.any()
    )


def _data(number: int, rows: Rows, fields: Sequence[Field], values: dict[str, NDArray[Any]]) -> bytes:
    made = np.zeros(len(rows), [(field.name, field.dtype) for field in fields])
    for field in fields:
        if field.name in ("source", "target"):
            made[field.name] = address(rows, field.name, v4=number == V4_TEMPLATE)
        else:
            made[field.name] = values[field.name] if field.name in values else rows[field.name]
    body = made.tobytes()
    body += bytes(-len(body) % 4)
    return struct.pack("!HH", number, 4 + len(body)) + body
