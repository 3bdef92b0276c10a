"""Tables of a port that exports flows: connections that have ended, and what was reported of which (lib/flow.h)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import conntrack, layout
from datapath.drivers.ebpf.clock import barrier
from datapath.drivers.ebpf.connections import Ended
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Batch, Records, Table
from datapath.export.remainder import CONNECTION, FORCED, IDLE

REPORTS_PER_CONNECTION = 2
"""Ended connections keep what was reported of them until they are told."""


@dataclass(frozen=True)
class Pair:
    """Both tables of one port."""

    ends: Table
    reports: Table

    def close(self) -> None:
        self.ends.close()
        self.reports.close()


class FlowTables:
    """By slot. Whoever calls sees to it that one port has one caller."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._pairs: dict[int, Pair] = {}

    def close(self) -> None:
        while self._pairs:
            self._pairs.popitem()[1].close()

    # ---- life ----

    def make(self, slot: int, connections_max: int) -> None:
        """Both are there from now on; those that are, stay. Waits for RCU."""
        room = REPORTS_PER_CONNECTION * connections_max
        for outer in (self._kernel.flow_ends, self._kernel.flow_reports):
            if outer.get(slot) is None:
                with outer.new(room) as fresh:
                    outer.put(slot, fresh)

    def fit(self, slot: int, connections_max: int) -> None:
        """Room for what is reported of as many connections as the port may have now. The ended stay where they are."""
        pair, room = self.of(slot), REPORTS_PER_CONNECTION * connections_max
        if pair is None or pair.reports.entries >= room:
            return
        with self._kernel.flow_reports.new(room) as fresh:
            fresh.load(*pair.reports.read())
            self._kernel.flow_reports.put(slot, fresh)
        self._pairs.pop(slot).close()

    def remove(self, slot: int) -> None:
        found = self._pairs.pop(slot, None)
        if found is not None:
            found.close()
        for outer in (self._kernel.flow_ends, self._kernel.flow_reports):
            if outer.get(slot) is not None:  # else nobody has to wait for RCU
                outer.remove(slot)
        self._kernel.flow_exporters.set(slot, np.zeros((), layout.FLOW_EXPORTER))
        self._kernel.flow_lost.set(slot, np.zeros((), layout.FLOW_LOST))

    def of(self, slot: int) -> Pair | None:
        """None: the port exports no flows."""
        if slot not in self._pairs:
            ends, reports = self._kernel.flow_ends.inner(slot), self._kernel.flow_reports.inner(slot)
            if ends is None or reports is None:
                return None
            self._pairs[slot] = Pair(ends, reports)
        return self._pairs[slot]

    # ---- connections ----

    def connections(self, slot: int, *, stands: bool = False) -> Records:
        """All that are there or have ended, as CONNECTION. What nobody knows any more is forgotten.

        The table is read before those that ended: what ends meanwhile is in both, and the latter is the last word.
        `stands`: the port does, for another host to take its connections.
        """
        pair, table = self.of(slot), self._kernel.conntracks.inner(slot)
        if pair is None or table is None:
            return np.zeros(0, CONNECTION)
        with table:
            keys, entries = table.read()
        found = of(keys, entries, *pair.ends.read(), stands=stands)
        ids, values = pair.reports.read()
        stale = ~np.isin(ids, found["id"])
        if stale.any():
            pair.reports.delete_many(ids[stale])
        join(ids, values, found)
        return found

    def report(self, slot: int, connections: Records) -> None:
        """Remember what is reported of these: of those that live; the others are forgotten."""
        pair = self.of(slot)
        if pair is None:
            return
        over = connections["ended"] != 0
        pair.reports.load(connections["id"][~over], reports_of(connections[~over]))
        if over.any():
            pair.ends.delete_many(ends_of(connections[over]))
            pair.reports.delete_many(connections["id"][over])

    def load(self, slot: int, connections: Records) -> Batch:
        """Connections that another host told of: what is reported of each, and those that have ended."""
        pair = self.of(slot)
        if pair is None:
            return Batch(0)
        pair.reports.load(connections["id"], reports_of(connections))
        done = _load_ended(pair.ends, connections[connections["ended"] != 0])
        return Batch(len(connections) - len(done.refused), done.refused)

    def forget(self, slot: int, ids: NDArray[np.uint64]) -> None:
        pair = self.of(slot)
        if pair is not None:
            keys = pair.ends.keys()
            pair.ends.delete_many(keys[np.isin(keys["id"], ids)])
            pair.reports.delete_many(ids)

    def late(self, slot: int, ended: Ended) -> None:
        """What hosts before had counted of connections that ended here before it was known, or did not come."""
        pair = self.of(slot)
        if pair is None or not len(ended):
            return
        told = _of(ended.keys, ended.entries)[ended.keys["type"] == C.CT_TYPE_CONNECTION]
        told["ended"] = FORCED
        barrier()  # who was ending one of them has handed it over
        known = _assign(pair.ends, told)
        pair.ends.load(ends_of(told[~known]), entries_of(told[~known]))

    def ended(self, slot: int) -> NDArray[np.uint64]:
        """Ids of connections that have ended and are not told to the end."""
        pair = self.of(slot)
        return np.zeros(0, np.uint64) if pair is None else pair.ends.keys()["id"]

    def room(self, slot: int) -> float:
        """Which part of the table of the ended is free."""
        pair = self.of(slot)
        return 1.0 if pair is None else 1 - len(pair.ends.keys()) / pair.ends.entries


def of(keys: Records, entries: Records, ends: Records | None, last: Records | None, *, stands: bool = False) -> Records:
    """CONNECTION of a table, and of those that have ended (`ends` with their `last` entries), which go before.

    `stands`: what is absent to packets has ended, nothing brings it back and it goes to no other host: what a sweep had
    found too old, and what somebody was about to end.
    """
    absent = ~conntrack.live(entries)
    lives = _whole(keys, entries) & (stands | (conntrack.flags(entries) & C.CT_F_DEAD == 0))
    if ends is not None:
        lives &= ~np.isin(entries["id"], ends["id"])
    found = _of(keys[lives], entries[lives])
    if stands:
        found["ended"][absent[lives]] = IDLE
    if ends is None or last is None:
        return found
    return np.concatenate([found, _of(ends["key"], last, ends)])


def join(ids: Records, reports: Records, found: Records) -> None:
    """What is reported of each. Of one that came from another host without word of it, all that was counted there is
    taken as reported: what is not known is not told twice."""
    order = np.argsort(ids)
    ids, reports = ids[order], reports[order]
    at = np.searchsorted(ids, found["id"])
    known = at < len(ids)
    known[known] = ids[at[known]] == found["id"][known]
    mine = reports[at[known]]
    for name in ("packets", "bytes"):
        found[f"reported_{name}"][known] = mine[name]
    found["until"][known] = mine["until"]
    found["began"][known] = np.where(mine["began"] > 0, mine["began"], found["began"][known])
    found["tcp_flags"][known] |= _sides(mine["tcp_flags"])


def _whole(keys: Records, entries: Records) -> NDArray[np.bool_]:
    """Connections that were not being renewed while they were read."""
    whole = entries["word"] >> np.uint64(32) == entries["id"] & np.uint64(0xFFFFFFFF)
    found: NDArray[np.bool_] = whole & (keys["type"] == C.CT_TYPE_CONNECTION)
    return found


def _of(keys: Records, entries: Records, ends: Records | None = None) -> Records:
    made = np.zeros(len(entries), CONNECTION)
    portable = conntrack.key_columns(keys)
    for name in ("laddr", "raddr", "lport", "rport", "proto"):
        made[name] = portable[name]
    for name in ("id", "began", "seen"):
        made[name] = entries[name]
    made["state"] = conntrack.states(entries)
    made["tcp_flags"] = _sides(entries["tcp_flags"])
    for name in ("packets", "bytes"):
        made[name] = entries[name] + entries[f"carried_{name}"]
        made[f"reported_{name}"] = entries[f"carried_{name}"]
    if ends is not None:
        made["ended"] = ends["reason"]
    return made


def _assign(ends: Table, counted: Records) -> NDArray[np.bool_]:
    """Connections that have ended here carry what another host counted of them in all. Returns which those are."""
    keys, entries = ends.read()
    known = np.isin(keys["id"], counted["id"])
    keys, entries = keys[known], entries[known]
    order = np.argsort(counted["id"])
    theirs = counted[order][np.searchsorted(counted["id"][order], keys["id"])]
    for name in ("packets", "bytes"):
        entries[f"carried_{name}"] = theirs[name]
    ends.load(keys, entries)
    return np.isin(counted["id"], keys["id"])


def _load_ended(ends: Table, over: Records) -> Batch:
    """What has ended on another host. Where that was known of one by its counts alone (`late`), now it says why."""
    keys, entries = ends.read()
    by_counts = keys[np.isin(keys["id"], over["id"]) & ~entries["packets"].any(axis=1)]
    fresh = over[~_assign(ends, over) | np.isin(over["id"], by_counts["id"])]
    made = ends_of(fresh)
    done = ends.load(made, entries_of(fresh))
    if not done.refused:
        raw = f"V{ends.key.itemsize}"
        ends.delete_many(by_counts[~np.isin(by_counts.view(raw), made.view(raw))])
    return done


def _sides(flags: Records) -> Records:
    return np.stack([flags & 0xFF, flags >> 8 & 0xFF], axis=-1).astype(np.uint8)


def _joined(sides: Records) -> Records:
    found: Records = sides[:, 0].astype(np.uint32) | sides[:, 1].astype(np.uint32) << np.uint32(8)
    return found


def reports_of(connections: Records) -> Records:
    """struct flow_report of each."""
    made = np.zeros(len(connections), layout.FLOW_REPORT)
    made["until"], made["began"] = connections["until"], connections["began"]
    made["packets"], made["bytes"] = connections["reported_packets"], connections["reported_bytes"]
    made["tcp_flags"] = _joined(connections["tcp_flags"])
    return made


def ends_of(connections: Records) -> Records:
    """struct flow_end of each, which are all over."""
    made = np.zeros(len(connections), layout.FLOW_END)
    made["id"], made["reason"], made["key"] = connections["id"], connections["ended"], keys_of(connections)
    return made


def keys_of(connections: Records) -> Records:
    """struct ct_key of each, which are all over."""
    given = {name: connections[name] for name in ("laddr", "raddr", "lport", "rport", "proto")}
    zero = np.zeros(len(connections), np.uint8)
    return conntrack.keys({**given, "type": zero, "from": zero})


def entries_of(connections: Records) -> Records:
    """struct ct_entry of each as it was at last; what was counted is carried."""
    made = np.zeros(len(connections), layout.CT_ENTRY)
    made["word"] = connections["id"] << np.uint64(32) | np.uint64(C.CT_F_DEAD << 8) | connections["state"]
    for name in ("id", "began", "seen"):
        made[name] = connections[name]
    made["tcp_flags"] = _joined(connections["tcp_flags"])
    made["carried_packets"], made["carried_bytes"] = connections["packets"], connections["bytes"]
    return made
