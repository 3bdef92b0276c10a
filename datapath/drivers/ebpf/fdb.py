"""The VM's own L2 entries between the kernel's table and portable columns.

A port that never opened here owns nothing in the kernel's table yet: what was loaded for it waits in the ledger.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf.clock import ktime_ns
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import L2_ENTRY, L2_KEY, C
from datapath.drivers.ebpf.ledger import Ledger
from datapath.drivers.ebpf.networks import Networks
from datapath.drivers.ebpf.places import Places
from datapath.drivers.ebpf.records import mac_bytes
from datapath.errors import LoadRejected
from datapath.provider import Loaded
from datapath.state import fdb
from datapath.state.check import checked_columns
from datapath.state.fdb import FDB
from datapath.state.kind import Columns, Op, Table

_WAITING = np.dtype([("key", L2_KEY), ("entry", L2_ENTRY)])
NOT_ON_TRUNK = "the port has no such VLAN"
OTHER_PORT = "the MAC belongs to another port of this host"
TOO_MANY = "more than the port may learn"

Keys = NDArray[Any]
Entries = NDArray[Any]


class Fdb:
    """L2 entries of ports."""

    def __init__(self, kernel: Kernel, networks: Networks, places: Places, ledger: Ledger) -> None:
        self._kernel, self._networks, self._places, self._ledger = kernel, networks, places, ledger

    # ---- dump ----

    def dump(self, instance: Instance, *, opened: bool) -> Table:
        """All entries: of the kernel's table once the port was `opened`, else what waits."""
        keys, entries = self._places.entries_of(instance.slot) if opened else self._waiting(instance)
        return self._table(instance, keys, entries)

    def changed(self, instance: Instance, ct_keys: NDArray[Any]) -> list[Table]:
        """What became of the entries whose keys are in a dirty set (enum ct_type CT_TYPE_L2)."""
        keys = np.zeros(len(ct_keys), L2_KEY)
        raw = np.ascontiguousarray(ct_keys).view(np.uint8).reshape(len(ct_keys), -1)
        keys["mac"] = raw[:, :6]
        keys["network"] = np.ascontiguousarray(raw[:, 16:20]).view("<u4")[:, 0]
        entries = [self._kernel.l2.get(key) for key in keys]
        own = np.array([_leads_to(instance.slot, entry) for entry in entries], bool)
        tables = []
        if own.any():
            values = np.array([e for e, mine in zip(entries, own, strict=True) if mine], L2_ENTRY)
            tables.append(self._table(instance, keys[own], values))
        if not own.all():
            columns = self._key_columns(instance, keys[~own])
            tables.append(Table(FDB.name, Op.DELETE, columns=columns))
        return tables

    def _table(self, instance: Instance, keys: Keys, entries: Entries) -> Table:
        now = np.uint64(ktime_ns())
        columns = {
            **self._key_columns(instance, keys),
            "flags": np.ascontiguousarray(entries["flags"]),
            "age_ns": now - np.minimum(entries["seen"], now),
            "moves": np.ascontiguousarray(entries["moves"]),
        }
        return Table(FDB.name, Op.LOAD, columns=columns)

    def _key_columns(self, instance: Instance, keys: Keys) -> Columns:
        vlans = {index: vlan for vlan, index in self.networks_of(instance).items()}
        macs = np.ascontiguousarray(keys["mac"]).view("V6").reshape(len(keys))
        return {"mac": macs, "vlan": np.array([vlans.get(int(n), 0) for n in keys["network"]], "<u2")}

    # ---- load ----

    def load(self, instance: Instance, table: Table, *, opened: bool) -> Loaded:
        """LOAD and DELETE, at once for a port that was opened here. Raises LoadRejected before anything is touched."""
        columns = checked_columns(FDB, table)
        networks = self.networks_of(instance)
        known = np.isin(columns["vlan"], list(networks))
        keys = self._keys(columns, networks)[known]
        if table.op is Op.DELETE:
            self._delete(instance, keys, opened=opened)
            return Loaded(len(keys))
        entries = self._entries(instance, columns)[known]
        foreign = self._foreign(instance, keys)
        fits = self._fit(instance, keys, entries, ~foreign)
        self._store(instance, keys[fits], entries[fits], opened=opened)
        reasons = {
            NOT_ON_TRUNK: int((~known).sum()),
            OTHER_PORT: int(foreign.sum()),
            TOO_MANY: int((~fits & ~foreign).sum()),
        }
        return Loaded(int(fits.sum()), tuple((reason, count) for reason, count in reasons.items() if count))

    def keys_of(self, instance: Instance, table: Table) -> Keys:
        """Keys of a table's records in the kernel's table, those on a VLAN that the port has."""
        columns, networks = checked_columns(FDB, table), self.networks_of(instance)
        return self._keys(columns, networks)[np.isin(columns["vlan"], list(networks))]

    def _keys(self, columns: Columns, networks: dict[int, int]) -> Keys:
        keys = np.zeros(len(columns["mac"]), L2_KEY)
        keys["mac"] = np.ascontiguousarray(columns["mac"]).view(np.uint8).reshape(-1, 6)
        keys["network"] = [networks.get(int(vlan), 0) for vlan in columns["vlan"]]
        return keys

    def _entries(self, instance: Instance, columns: Columns) -> Entries:
        known = fdb.STATIC | fdb.LOCATION
        if (columns["flags"] & ~np.uint8(known)).any():
            raise LoadRejected("fdb: flags that are not known", hint="the sender has a newer version")
        now = ktime_ns()
        entries = np.zeros(len(columns["mac"]), L2_ENTRY)
        entries["kind"], entries["target"] = C.L2_PORT, instance.slot
        entries["flags"], entries["vlan"], entries["moves"] = columns["flags"], columns["vlan"], columns["moves"]
        entries["seen"] = np.uint64(now) - np.minimum(columns["age_ns"], np.uint64(now))
        return entries

    def _foreign(self, instance: Instance, keys: Keys) -> NDArray[np.bool_]:
        """MACs that are pinned to the port of another VM of this host, and group addresses: nobody's own."""
        ports = self._kernel.ports.view
        others = {
            bytes(ports["mac"][slot])
            for slot in np.flatnonzero(ports["word"] & np.uint64(0xFF)).tolist()
            if slot != instance.slot and bytes(ports["mac"][slot]) != mac_bytes(instance.ref.mac)
        }
        return np.array([bytes(mac) in others or bool(mac[0] & 1) for mac in keys["mac"]], bool)

    def _fit(self, instance: Instance, keys: Keys, entries: Entries, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
        own = np.frombuffer(mac_bytes(instance.ref.mac), np.uint8)
        learned = good & (entries["flags"] == 0) & (keys["mac"] != own).any(axis=1)
        fits: NDArray[np.bool_] = good & (~learned | (np.cumsum(learned) <= instance.entry.record["learned_max"]))
        return fits

    def _store(self, instance: Instance, keys: Keys, entries: Entries, *, opened: bool) -> None:
        if opened:
            self._places.take(keys, entries)
            return
        old_keys, old = self._waiting(instance)
        keep = ~_among(old_keys, keys)
        self._save(instance, np.concatenate([old_keys[keep], keys]), np.concatenate([old[keep], entries]))

    def _delete(self, instance: Instance, keys: Keys, *, opened: bool) -> None:
        if not opened:
            old_keys, old = self._waiting(instance)
            keep = ~_among(old_keys, keys)
            self._save(instance, old_keys[keep], old[keep])
            return
        own, _ = self._places.entries_of(instance.slot)
        self._kernel.l2.delete_many(own[_among(own, keys)])

    # ---- a port opens ----

    def take_all(self, instance: Instance) -> None:
        """The VM is here: its own MAC and what was loaded for it lead to this port from now on."""
        keys, entries = self._waiting(instance)
        foreign = self._foreign(instance, keys)
        own_keys, own = self.own_places(instance)
        keep = ~foreign & ~_among(keys, own_keys)
        self._places.take(np.concatenate([own_keys, keys[keep]]), np.concatenate([own, entries[keep]]))
        self._kernel.ports.view["learned"][instance.slot] = int((entries["flags"][keep] == 0).sum())
        self._ledger.forget_fdb(instance.slot)

    def own_places(self, instance: Instance) -> tuple[Keys, Entries]:
        """The port's MAC in each of its networks."""
        networks = self.networks_of(instance)
        keys, entries = np.zeros(len(networks), L2_KEY), np.zeros(len(networks), L2_ENTRY)
        mac = np.frombuffer(mac_bytes(instance.ref.mac), np.uint8)
        for row, (vlan, index) in enumerate(networks.items()):
            keys[row] = (index, mac, 0)
            flags = C.L2_F_STATIC | C.L2_F_LOCATION
            entries[row] = (C.L2_PORT, flags, vlan, instance.slot, ktime_ns(), 0, 0)
        return keys, entries

    def networks_of(self, instance: Instance) -> dict[int, int]:
        """Tag -> network index; 0 untagged."""
        record = instance.entry.record
        trunk = {int(vid): self._networks.index(name) for vid, name in record["trunk"].items()}
        return {0: self._networks.index(record["network"]), **trunk}

    def _waiting(self, instance: Instance) -> tuple[Keys, Entries]:
        saved = self._ledger.fdb(instance.slot)
        if saved is None:
            return np.empty(0, L2_KEY), np.empty(0, L2_ENTRY)
        return np.ascontiguousarray(saved["key"]), np.ascontiguousarray(saved["entry"])

    def _save(self, instance: Instance, keys: Keys, entries: Entries) -> None:
        waiting = np.zeros(len(keys), _WAITING)
        waiting["key"], waiting["entry"] = keys, entries
        self._ledger.save_fdb(instance.slot, waiting)


def _leads_to(slot: int, entry: Any) -> bool:
    return entry is not None and entry["kind"] == C.L2_PORT and entry["target"] == slot


def _among(keys: Keys, others: Keys) -> NDArray[np.bool_]:
    """Which of `keys` are in `others`."""
    known = {key.tobytes() for key in others}
    return np.array([key.tobytes() in known for key in keys], bool)
