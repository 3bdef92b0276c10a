"""Connection tables of ports: dump, load, read by key, account. conntrack.py has the layouts."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import conntrack
from datapath.drivers.ebpf.conntrack import Entries, Keys
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Batch
from datapath.drivers.ebpf.words import Words
from datapath.provider import Loaded
from datapath.state.check import checked_columns
from datapath.state.conntrack import CONNTRACK
from datapath.state.kind import Columns, Op, Table

BATCH = 65_536
FULL = "the connection table is full"
ENDED = "the connection has ended here"
_REASONS = {errno.E2BIG: FULL, errno.ENOMEM: "the kernel has no memory for it"}


@dataclass(frozen=True)
class Ended:
    """Connections that another host counted and that are not here: they have ended, or never came. carried_*, id and
    seen of `entries` are theirs."""

    keys: Keys
    entries: Entries

    def __len__(self) -> int:
        return len(self.keys)

    def amounts(self) -> dict[int, tuple[int, int, int, int]]:
        """Connection id -> packets_from, packets_to, bytes_from, bytes_to."""
        counted = np.concatenate([self.entries["carried_packets"], self.entries["carried_bytes"]], axis=1).tolist()
        return dict(zip(self.entries["id"].tolist(), map(tuple, counted), strict=True))


class Connections:
    """Whoever calls sees to it that one port's table has one caller."""

    def __init__(self, kernel: Kernel, words: Words) -> None:
        self._kernel, self._words = kernel, words
        self._room = len(kernel.exchange.view)

    def dump(self, instance: Instance) -> Iterator[Table]:
        """Live entries; each that lives throughout comes once."""
        for keys, entries in instance.table.dump(BATCH):
            clock = self._words.clock(instance.slot)
            live = conntrack.live(entries)
            if not live.all():
                keys, entries = keys[live], entries[live]
            if len(keys):
                yield self._table(conntrack.columns(keys, entries, clock), clock)

    def _table(self, columns: Columns, clock: int, op: Op = Op.LOAD) -> Table:
        portable = max(clock - conntrack.ORIGIN_NS, 0)
        return Table(CONNTRACK.name, op, columns=columns, port_time_ns=portable)

    def load(self, instance: Instance, table: Table) -> Loaded:
        """LOAD, FILL and DELETE. Raises LoadRejected before the table is touched."""
        columns = checked_columns(CONNTRACK, table)
        keys = conntrack.keys(columns)
        if table.op is Op.DELETE:
            self._end(instance, keys)
            instance.table.delete_many(keys)
            return Loaded(len(keys))
        conntrack.check_values(columns)
        if table.op is Op.FILL:
            clock = self._load_clock(instance, table)
            return self._fill(instance, keys, conntrack.entries(columns, clock))
        self._end(instance, keys, columns["id"])
        clock = self._load_clock(instance, table)
        done = instance.table.load(keys, conntrack.entries(columns, clock))
        return Loaded(done.done, _reasons(done))

    def _end(self, instance: Instance, keys: Keys, ids: NDArray[np.uint64] | None = None) -> None:
        """Connections that are to go, or to make place for others with `ids`: if their flows are exported, their last
        counts are kept."""
        features = int(self._kernel.ports.view["features"][instance.slot])
        if not features & C.FEATURE_EXPORT or not self._words.running(instance.slot):
            return
        for at in range(0, len(keys), self._room):
            chunk = keys[at : at + self._room]
            if ids is not None:
                found, entries = self._read(instance.slot, chunk)
                chunk = chunk[found & (entries["id"] != ids[at : at + self._room])]
            with self._kernel.exchange_lock:
                self._kernel.exchange.view["key"][: len(chunk)] = chunk
                self._kernel.run("ct_end", self._kernel.context("ct_batch", slot=instance.slot, count=len(chunk)))

    def _fill(self, instance: Instance, keys: Keys, entries: Entries) -> Loaded:
        """Those that are not there. While packets pass the kernel decides, one by one."""
        if not self._words.running(instance.slot):
            parts = [self._read(instance.slot, keys[at : at + self._room])[0] for at in range(0, len(keys), self._room)]
            new = ~np.concatenate([np.zeros(0, bool), *parts])
            done = instance.table.load(keys[new], entries[new])
            return Loaded(done.done, _reasons(done))
        made = refused = 0
        for at in range(0, len(keys), self._room):
            part = slice(at, at + self._room)
            count = len(keys[part])
            with self._kernel.exchange_lock:
                view = self._kernel.exchange.view
                view["key"][:count], view["entry"][:count] = keys[part], entries[part]
                self._kernel.run("ct_fill", self._kernel.context("ct_batch", slot=instance.slot, count=count))
                became = view["found"][:count].copy()
            made += int((became == C.FILL_MADE).sum())
            refused += int((became == C.FILL_REFUSED).sum())
        return Loaded(made, ((FULL, refused),) if refused else ())

    def _load_clock(self, instance: Instance, table: Table) -> int:
        """Clock that the table's ages count back from: its own for a port that stands, now for one that runs."""
        if self._words.running(instance.slot):
            return self._words.clock(instance.slot)
        clock = table.port_time_ns + conntrack.ORIGIN_NS
        self._words.advance_clock(instance.slot, clock)
        return clock

    # ---- by key ----

    def changed(self, instance: Instance, keys: Keys) -> list[Table]:
        """What became of these keys: a table of those that are there, and one of those that are not."""
        present, gone = [], []
        for at in range(0, len(keys), self._room):
            chunk = keys[at : at + self._room]
            found, entries = self._read(instance.slot, chunk)
            found &= conntrack.live(entries)
            present.append((chunk[found], entries[found]))
            gone.append(chunk[~found])
        return self._changed_tables(instance, present, gone)

    def _changed_tables(self, instance: Instance, present: list[tuple[Keys, Entries]], gone: list[Keys]) -> list[Table]:
        tables = []
        clock = self._words.clock(instance.slot)
        if any(len(keys) for keys, _ in present):
            keys, entries = (np.concatenate(parts) for parts in zip(*present, strict=True))
            tables.append(self._table(conntrack.columns(keys, entries, clock), clock))
        if any(len(keys) for keys in gone):
            tables.append(self._table(conntrack.key_columns(np.concatenate(gone)), clock, Op.DELETE))
        return tables

    def _read(self, slot: int, keys: Keys) -> tuple[NDArray[np.bool_], Entries]:
        count = len(keys)
        with self._kernel.exchange_lock:
            view = self._kernel.exchange.view
            view["key"][:count] = keys
            self._kernel.run("ct_read", self._kernel.context("ct_batch", slot=slot, count=count))
            return view["found"][:count] != 0, view["entry"][:count].copy()

    def relabel(self, instance: Instance, columns: Columns) -> int:
        """Mark and label of connections that are there with these ids. The port is active. Returns how many it were."""
        keys, entries, changed = conntrack.keys(columns), conntrack.with_labels(columns), 0
        for at in range(0, len(keys), self._room):
            part = slice(at, at + self._room)
            count = len(keys[part])
            context = self._kernel.context("ct_batch", slot=instance.slot, count=count)
            with self._kernel.exchange_lock:
                view = self._kernel.exchange.view
                view["key"][:count], view["entry"][:count] = keys[part], entries[part]
                self._kernel.run("ct_relabel", context)
            changed += int(context["found"][0])
        return changed

    # ---- accounting ----

    def counted(self, instance: Instance) -> Iterator[Table]:
        """What was counted of each entry that is there, dying ones too: tables of op account."""
        for keys, entries in instance.table.dump(BATCH):
            clock = self._words.clock(instance.slot)
            columns = conntrack.columns(keys, entries, clock)
            yield self._table({name: columns[name] for name in conntrack.ACCOUNT_COLUMNS}, clock, Op.ACCOUNT)

    def account(self, instance: Instance, table: Table, *, assign: bool = True) -> tuple[Loaded, Ended]:
        """Assign what the source counted, if at all. Returns what could not be because the connection is not here."""
        columns = _account_columns(table)
        keys = conntrack.keys(columns)
        entries = conntrack.entries(columns, table.port_time_ns + conntrack.ORIGIN_NS)
        settled = (self.assign if assign else self._are_here)(instance, keys, entries)
        ended = Ended(keys[~settled], entries[~settled])
        reasons = ((ENDED, len(ended)),) if len(ended) else ()
        return Loaded(len(keys) - len(ended), reasons), ended

    def assign(self, instance: Instance, keys: Keys, entries: Entries) -> NDArray[np.bool_]:
        """carried_* of connections that are here with their id. Returns which are."""
        settled = np.zeros(len(keys), bool)
        for at in range(0, len(keys), self._room):
            part = slice(at, at + self._room)
            settled[part] = self._settle(instance, keys[part], entries[part])
        return settled

    def _are_here(self, instance: Instance, keys: Keys, entries: Entries) -> NDArray[np.bool_]:
        here = np.zeros(len(keys), bool)
        for at in range(0, len(keys), self._room):
            part = slice(at, at + self._room)
            found, there = self._read(instance.slot, keys[part])
            here[part] = found & (there["id"] == entries["id"][part])
        return here

    def _settle(self, instance: Instance, keys: Keys, entries: Entries) -> NDArray[np.bool_]:
        if not self._words.running(instance.slot):
            return self._settle_standing(instance, keys, entries)
        count = len(keys)
        with self._kernel.exchange_lock:
            view = self._kernel.exchange.view
            view["key"][:count], view["entry"][:count] = keys, entries
            self._kernel.run("ct_settle", self._kernel.context("ct_batch", slot=instance.slot, count=count))
            settled: NDArray[np.bool_] = view["found"][:count] != 0
            return settled.copy()

    def _settle_standing(self, instance: Instance, keys: Keys, entries: Entries) -> NDArray[np.bool_]:
        """A port that is not active: nobody else writes its table."""
        found, there = self._read(instance.slot, keys)
        found &= there["id"] == entries["id"]
        for name in ("carried_packets", "carried_bytes"):
            there[name] = entries[name]
        there["seen"] = np.maximum(there["seen"], entries["seen"])
        instance.table.load(keys[found], there[found])
        return found


def _account_columns(table: Table) -> Columns:
    columns = checked_columns(CONNTRACK, table)
    count = len(columns["laddr"])
    filled = {
        name: columns.get(name, np.zeros(count, np.dtype(column.dtype))) for name, column in CONNTRACK.columns.items()
    }
    if "age_ns" not in columns:  # unknown: not seen later than what is known here
        filled["age_ns"] = np.full(count, conntrack.AGE_MAX_NS, np.uint64)
    return filled


def _reasons(done: Batch) -> tuple[tuple[str, int], ...]:
    counts = Counter(_REASONS.get(one.errno, errno.errorcode.get(one.errno, str(one.errno))) for one in done.refused)
    return tuple(sorted(counts.items()))
