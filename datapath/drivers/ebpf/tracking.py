"""Which records change while a port is being carried: the set of dirty keys (datapath/bpf/lib/dirty.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from datapath.drivers.ebpf.connections import Connections
from datapath.drivers.ebpf.fdb import Fdb
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.kindtable import KindTables
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Records
from datapath.drivers.ebpf.maps import Table as Map
from datapath.drivers.ebpf.words import Words
from datapath.errors import NotReady
from datapath.state.kind import Table

KEYS_MAX = 65_536
"""An empty drain costs by this (0.15 ms), a set that is full before a drain means: dump again."""


class Tracking:
    """Whoever calls sees to it that one port has one caller."""

    def __init__(self, kernel: Kernel, words: Words, connections: Connections, fdb: Fdb, kinds: KindTables) -> None:
        self._kernel, self._words, self._connections, self._fdb = kernel, words, connections, fdb
        self._kinds = kinds

    def begin(self, instance: Instance) -> None:
        """Link a set. When this returns every program sees it: what it changes from here on is noted.

        After an overflow a new set takes the place of the full one.
        """
        overflowed = self._words.has(instance.slot, C.PORT_F_OVERFLOW)
        if instance.dirty is not None and not overflowed:
            return
        fresh = self._kernel.dirty.new(self._room(instance))
        instance.windows.clear()  # all are dumped from now on
        self._kernel.dirty.put(instance.slot, fresh)  # waits for programs that have the old one
        self._words.flag(instance.slot, drop=C.PORT_F_OVERFLOW)
        self._replace(instance, fresh)

    def _room(self, instance: Instance) -> int:
        """Data on a connection changes its window, and all may have some between two drains."""
        features = int(self._kernel.ports.view["features"][instance.slot])
        return KEYS_MAX + (instance.entry.record["connections_max"] if features & C.FEATURE_WINDOW else 0)

    def end(self, instance: Instance) -> None:
        if instance.dirty is None:
            return
        self._kernel.dirty.remove(instance.slot)
        self._words.flag(instance.slot, drop=C.PORT_F_OVERFLOW)
        instance.windows.clear()
        self._replace(instance, None)

    def restore(self, instance: Instance) -> None:
        """Take over a set of an earlier run."""
        instance.dirty = self._kernel.dirty.inner(instance.slot)

    def drain(self, instance: Instance) -> list[Table]:
        """What changed since the last drain, as it is now; of a port that has stopped also what is live elsewhere.

        A connection whose window alone changed is kept for then: else data would keep a copy from coming to its end.
        Raises NotReady when it is not tracked, or overflowed.
        """
        if instance.dirty is None:
            raise NotReady(f"changes of port {instance.ref.mac} are not tracked", hint="track it first")
        keys, _ = instance.dirty.take_all()
        if self._words.has(instance.slot, C.PORT_F_OVERFLOW):
            raise NotReady(
                f"more than {KEYS_MAX} records of port {instance.ref.mac} changed between two drains",
                hint="track again and dump the tables anew",
            )
        keys, windows = split(keys)
        instance.windows.update(windows)
        last: list[Table] = []
        if self._words.word(instance.slot).state == C.PORT_QUIESCED:
            last, keys = self._kinds.last(instance), joined(keys, instance.windows)
        if not len(keys):
            return last
        l2 = keys["type"] == C.CT_TYPE_L2
        readers: list[tuple[np.ndarray, Callable[[Instance, np.ndarray], list[Table]]]] = [
            (keys[l2], self._fdb.changed),
            (keys[~l2], self._connections.changed),
        ]
        return [table for part, read in readers if len(part) for table in read(instance, part)] + last

    def _replace(self, instance: Instance, fresh: Map | None) -> None:
        if instance.dirty is not None:
            instance.dirty.close()
        instance.dirty = fresh


def split(keys: Records) -> tuple[Records, list[bytes]]:
    """Keys of a dirty set without those of connections whose window alone changed, and these, as of connections."""
    alone = keys["type"] == C.CT_TYPE_WINDOW
    windows = keys[alone]
    windows["type"] = C.CT_TYPE_CONNECTION
    raw = windows.view(f"V{keys.dtype.itemsize}").tolist()
    return keys[~alone], raw


def joined(keys: Records, windows: Iterable[bytes]) -> Records:
    """These keys and those that `split` gave, each once."""
    more = set(windows).difference(keys.view(f"V{keys.dtype.itemsize}").tolist())
    return np.concatenate([keys, np.frombuffer(b"".join(more), keys.dtype)]) if more else keys
