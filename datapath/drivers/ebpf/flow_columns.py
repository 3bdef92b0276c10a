"""Connections and what is left to report of them, between CONNECTION and the columns of kind `flows`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf.conntrack import ORIGIN_NS
from datapath.drivers.ebpf.maps import Records
from datapath.export.remainder import CONNECTION
from datapath.state.flows import FLOWS, NEVER
from datapath.state.kind import Columns

_SIDES = ("from", "to")
_OF_ENDED = ("laddr", "raddr", "lport", "rport", "proto", "state")


def columns(connections: Records, clock: int) -> Columns:
    """`clock` is the port's in the kernel, ORIGIN_NS included."""
    over = connections["ended"] != 0
    made: Columns = {"id": connections["id"].copy(), "ended": connections["ended"].copy()}
    made["lifetime_ns"] = _ago(connections["began"], clock)
    until = connections["until"]
    made["unreported_ns"] = np.where(until > 0, _ago(until, clock), np.uint64(NEVER))
    for side, name in enumerate(_SIDES):
        made[f"tcp_flags_{name}"] = connections["tcp_flags"][:, side].copy()
        for what in ("packets", "bytes"):
            made[f"reported_{what}_{name}"] = connections[f"reported_{what}"][:, side].copy()
            made[f"{what}_{name}"] = np.where(over, connections[what][:, side], np.uint64(0))
    for name in _OF_ENDED:
        made[name] = np.where(over, connections[name], np.zeros((), connections.dtype[name]))
    made["age_ns"] = np.where(over, _ago(connections["seen"], clock), np.uint64(0))
    return {name: np.ascontiguousarray(made[name], column.dtype) for name, column in FLOWS.columns.items()}


def connections(given: Columns, clock: int) -> Records:
    """CONNECTION of checked columns; those that are missing have their defaults."""
    count = len(given["id"])
    full = {
        name: given[name] if name in given else np.full(count, column.default, column.dtype)
        for name, column in FLOWS.columns.items()
        if name in given or column.default is not None
    }
    made = np.zeros(count, CONNECTION)
    for name in ("id", "ended", *_OF_ENDED):
        made[name] = full[name]
    made["began"], made["seen"] = _at(full["lifetime_ns"], clock), _at(full["age_ns"], clock)
    made["until"] = np.where(full["unreported_ns"] == NEVER, np.uint64(0), _at(full["unreported_ns"], clock))
    for side, name in enumerate(_SIDES):
        made["tcp_flags"][:, side] = full[f"tcp_flags_{name}"]
        for what in ("packets", "bytes"):
            made[what][:, side] = full[f"{what}_{name}"]
            made[f"reported_{what}"][:, side] = full[f"reported_{what}_{name}"]
    return made


def _ago(when: NDArray[np.uint64], clock: int) -> NDArray[np.uint64]:
    found: NDArray[np.uint64] = np.uint64(clock) - np.minimum(when, np.uint64(clock))
    return np.minimum(found, np.uint64(ORIGIN_NS - 1))


def _at(ago: NDArray[np.uint64], clock: int) -> NDArray[np.uint64]:
    found: NDArray[np.uint64] = np.uint64(clock) - np.minimum(ago, np.uint64(ORIGIN_NS - 1))
    return found
