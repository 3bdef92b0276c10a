"""The switch of another version, as takeover.py reads it: every layout by its own BTF, every field by its name.

What it needs of that version by these names: in `struct port` word, commit, gate, held_to, held_from, time_base,
time_floor, evicted, alarm_full; the programs port_cas and ct_read; the maps that `_Kernel` opens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from datapath.drivers.ebpf import layout
from datapath.drivers.ebpf.adopted import Adopted
from datapath.drivers.ebpf.connections import Connections
from datapath.drivers.ebpf.counters import Counters
from datapath.drivers.ebpf.evolve import by_name
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.ledger import Ledger, PortEntry
from datapath.drivers.ebpf.maps import Records
from datapath.drivers.ebpf.maps import Table as Map
from datapath.drivers.ebpf.mirroring import mirror_totals
from datapath.drivers.ebpf.tracking import KEYS_MAX, joined, split
from datapath.drivers.ebpf.words import Words
from datapath.state.kind import Table
from datapath.state.mirror import MIRROR


class _Kernel(Kernel):
    """The handles that a takeover reads by; the rest of Kernel's is not there."""

    def __init__(self, switch: Adopted) -> None:
        self.switch = switch
        self.ports = switch.mapped("ports")
        counters = switch.table("counters")
        self.counters = _Named(counters.fd, counters.key, counters.value, "counters")
        counters.fd = -1  # it is the other's
        self.floods = switch.outer("floods")
        self.conntracks = switch.outer("conntracks")
        self.dirty = switch.outer("dirty")
        self.rule_hits = switch.table("rule_hits")
        self.exchange = switch.mapped("exchange")
        self.exchange_lock = threading.Lock()
        self.slots = len(self.ports.view)


class _Named(Map):
    """Values come in this version's layout."""

    def get(self, key: Any) -> Records | None:
        found = super().get(key)
        return None if found is None else by_name(found, layout.COUNTERS)


class Generation:
    """Ports are named by their slots."""

    def __init__(self, switch: Adopted, ledger: Ledger) -> None:
        self.switch = switch
        self.kernel = _Kernel(switch)
        self.ports = self.kernel.ports
        self.words = Words(self.ports, self.kernel.compare_and_swap)
        self._connections = Connections(self.kernel, self.words)
        self._counters = Counters(self.kernel, self.words)
        self.entries: dict[int, PortEntry] = {entry.slot: entry for entry in ledger.ports()}
        self._instances: dict[int, Instance] = {}

    def close(self) -> None:
        for instance in self._instances.values():
            for handle in (instance.table, instance.dirty):
                if handle is not None:
                    handle.close()
        self.kernel.close()

    def slots(self) -> list[int]:
        """Of ports that the ledger knows too; others nobody can name."""
        used = np.flatnonzero(self.ports.view["word"] & np.uint64(0xFF)).tolist()
        return [slot for slot in used if slot in self.entries and self._epoch(slot) == self.entries[slot].ref.epoch]

    def _epoch(self, slot: int) -> int:
        return self.words.word(slot).epoch

    def instance(self, slot: int) -> Instance:
        """With its connection table; it has no taps."""
        if slot not in self._instances:
            table = self.kernel.conntracks.inner(slot) or self.kernel.conntracks.new(1)
            self._instances[slot] = Instance(self.entries[slot], table, None, None)  # type: ignore[arg-type]
        return self._instances[slot]

    # ---- connections ----

    def dump(self, slot: int) -> Iterator[Table]:
        return self._connections.dump(self.instance(slot))

    def track(self, slot: int) -> None:
        """Note from here on which keys change."""
        fresh = self.kernel.dirty.new(KEYS_MAX)
        self.kernel.dirty.put(slot, fresh)
        self.words.flag(slot, drop=C.PORT_F_OVERFLOW)
        self.instance(slot).dirty = fresh

    def untrack(self, slot: int) -> None:
        self.kernel.dirty.remove(slot)
        self.words.flag(slot, drop=C.PORT_F_OVERFLOW)

    def drain(self, slot: int) -> list[Table] | None:
        """What changed since the last drain; None when it was too much to be noted: dump again."""
        instance = self.instance(slot)
        assert instance.dirty is not None
        keys, _ = instance.dirty.take_all()
        if self.words.has(slot, C.PORT_F_OVERFLOW):
            self.words.flag(slot, drop=C.PORT_F_OVERFLOW)
            return None
        keys = joined(*split(keys[keys["type"] != C.CT_TYPE_L2]))
        return self._connections.changed(instance, keys) if len(keys) else []

    def counted(self, slot: int) -> Iterator[Table]:
        """What was counted of each connection."""
        return self._connections.counted(self.instance(slot))

    def totals(self, slot: int) -> dict[str, Any]:
        """PortEntry.carried for what a port and its rules have counted, here and before."""
        instance = self.instance(slot)
        hits = {str(rule): list(amount) for rule, amount in self._counters.hits(instance).items()}
        return {"counters": self._counters.total(instance), "hits": hits, **self._mirrors(instance.entry)}

    def _mirrors(self, entry: PortEntry) -> dict[str, Any]:
        if "mirror_counts" not in self.switch.maps:
            return {}
        with self.switch.table("mirrors") as mirrors, self.switch.table("mirror_counts") as counts:
            return {MIRROR.name: mirror_totals(mirrors, counts, entry)}

    # ---- a port stands ----

    def stop(self, slot: int) -> None:
        """Frames of both directions wait in the hold taps, once no program is under way any more (clock.barrier)."""
        self.words.set_gate(slot, C.GATE_LOCAL, shut=True)
        self.ports.store(slot, "commit", 0)  # or the guest's next frame opens it
        states = (C.PORT_ACTIVE, C.PORT_STAGED)
        clock = self.words.clock(slot)
        self.words.change(slot, self._epoch(slot), states, C.PORT_STAGED)
        self.words.advance_clock(slot, clock)

    def go_on(self, slot: int) -> None:
        """The end of `stop`; whoever calls passes on what waited."""
        if self.words.word(slot).state == C.PORT_STAGED:
            self.words.change(slot, self._epoch(slot), (C.PORT_STAGED,), C.PORT_ACTIVE)
            self.ports.store(slot, "commit", self._epoch(slot))
            self.words.set_gate(slot, C.GATE_LOCAL)
