"""Connections between the kernel's table and portable columns, by vector operations only.

A port's clock in the kernel is its portable port time plus ORIGIN_NS: so that an entry that is older than the port's
clock (a snapshot made by hand, or by a driver that counts otherwise) still has a positive time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import layout, window_columns
from datapath.drivers.ebpf.evolve import by_name
from datapath.errors import LoadRejected
from datapath.state import conntrack
from datapath.state.kind import Columns

ORIGIN_NS = 1 << 60
AGE_MAX_NS = ORIGIN_NS - 1

_KEY = np.dtype(
    [
        ("laddr", "V16"),
        ("raddr", "V16"),
        ("lport", ">u2"),
        ("rport", ">u2"),
        ("proto", "u1"),
        ("type", "u1"),
        ("from", "u1"),
        ("pad", "u1"),
    ]
)
"""struct ct_key with portable field types."""

_ABSENT = 1 << 6 | 1 << 7  # CT_F_DYING | CT_F_DEAD
_KNOWN_FLAGS = conntrack.REPLIED | conntrack.ASSURED | conntrack.INBOUND | conntrack.LEARNED
_KNOWN_STATES = np.array(sorted(conntrack.STATES.values()), np.uint8)
_KEY_FIELDS = ("laddr", "raddr", "lport", "rport", "proto", "type", "from")
_TYPE_FRAGMENT = 1

Keys = NDArray[Any]
Entries = NDArray[Any]


def states(entries: Entries) -> NDArray[np.uint8]:
    """CT_STATE of each entry."""
    return (entries["word"] & np.uint64(0xFF)).astype(np.uint8)


def flags(entries: Entries) -> NDArray[np.uint8]:
    """CT_FLAGS of each entry."""
    return ((entries["word"] >> np.uint64(8)) & np.uint64(0xFF)).astype(np.uint8)


def live(entries: Entries) -> NDArray[np.bool_]:
    """Which entries programs still take as there."""
    result: NDArray[np.bool_] = (flags(entries) & _ABSENT) == 0
    return result


def key_columns(keys: Keys) -> Columns:
    """Key columns of the kind."""
    # np.concatenate turns big-endian fields into native ones: the layout is made sure of before bytes are looked at
    keys = by_name(keys, layout.CT_KEY)  # they may be those of another version
    portable = np.ascontiguousarray(keys, layout.CT_KEY).view(_KEY)
    return {
        name: np.ascontiguousarray(portable[name], np.dtype(conntrack.CONNTRACK.columns[name].dtype))
        for name in _KEY_FIELDS
    }


def columns(keys: Keys, entries: Entries, port_time: int) -> Columns:
    """All columns; `port_time` is the port's clock in the kernel (ORIGIN_NS included)."""
    entries = by_name(entries, layout.CT_ENTRY)
    own, carried = entries["packets"], entries["carried_packets"]
    own_bytes, carried_bytes = entries["bytes"], entries["carried_bytes"]
    seen = np.minimum(entries["seen"], np.uint64(port_time))  # a packet may have come since the clock was read
    return {
        **key_columns(keys),
        "state": states(entries),
        "flags": flags(entries) & np.uint8(_KNOWN_FLAGS),
        "age_ns": np.uint64(port_time) - seen,
        "id": np.ascontiguousarray(entries["id"]),
        "judged": np.ascontiguousarray(entries["judged"]),
        "mark": np.ascontiguousarray(entries["mark"]),
        "label": _labels(entries),
        **window_columns.columns(entries),
        "packets_from": own[:, 0] + carried[:, 0],
        "packets_to": own[:, 1] + carried[:, 1],
        "bytes_from": own_bytes[:, 0] + carried_bytes[:, 0],
        "bytes_to": own_bytes[:, 1] + carried_bytes[:, 1],
    }


def _labels(entries: Entries) -> NDArray[Any]:
    if not entries["label"].any():
        return np.zeros(len(entries), "V16")
    return np.ascontiguousarray(entries["label"], ">u8").view("V16").ravel()


def with_labels(given: Columns) -> Entries:
    """Entries with nothing but `id`, `mark` and `label`."""
    made = np.zeros(len(given["id"]), layout.CT_ENTRY)
    for name in ("id", "mark"):
        made[name] = given[name]
    made["label"] = np.ascontiguousarray(given["label"]).view(">u8").reshape(-1, 2)
    return made


ACCOUNT_COLUMNS = (*_KEY_FIELDS, "id", "age_ns", "packets_from", "packets_to", "bytes_from", "bytes_to")
"""What a settle sends of each connection."""


def keys(given: Columns) -> Keys:
    """Kernel keys of checked columns."""
    made = np.zeros(len(given["laddr"]), _KEY)
    for name in _KEY_FIELDS:
        made[name] = given[name]
    return made.view(layout.CT_KEY)


def entries(given: Columns, port_time: int) -> Entries:
    """Kernel entries of checked columns, with what was counted elsewhere as carried. `port_time` as for `columns`."""
    made = np.zeros(len(given["id"]), layout.CT_ENTRY)
    word = (given["id"] & np.uint64(0xFFFFFFFF)) << np.uint64(32)
    made["word"] = word | given["flags"].astype(np.uint64) << np.uint64(8) | given["state"]
    made["seen"] = np.uint64(port_time) - np.minimum(given["age_ns"], np.uint64(AGE_MAX_NS))
    for name in ("id", "judged", "mark"):
        made[name] = given[name]
    made["label"] = np.ascontiguousarray(given["label"]).view(">u8").reshape(-1, 2)
    made["carried_packets"][:, 0], made["carried_packets"][:, 1] = given["packets_from"], given["packets_to"]
    made["carried_bytes"][:, 0], made["carried_bytes"][:, 1] = given["bytes_from"], given["bytes_to"]
    window_columns.fill(made, given)
    return made


def check_values(given: Columns) -> None:
    """Raise LoadRejected when flags, a type or an id is none that the switch knows; names the first such row."""
    _refuse("flags", given["flags"], (given["flags"] & ~np.uint8(_KNOWN_FLAGS)) != 0)
    _refuse("type", given["type"], given["type"] > _TYPE_FRAGMENT)
    _refuse("from", given["from"], given["from"] > 1)
    _refuse("id", given["id"], (given["id"] == 0) & (given["type"] != _TYPE_FRAGMENT))
    _refuse("state", given["state"], ~np.isin(given["state"], _KNOWN_STATES))


def _refuse(name: str, values: NDArray[Any], wrong: NDArray[np.bool_]) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise LoadRejected(
            f"conntrack: {name} {values[row]} in record {row} of {len(values)} is not known",
            hint="the sender has a newer version, or the snapshot is damaged; nothing of the table was applied",
        )
