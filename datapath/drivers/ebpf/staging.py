"""Make, change and take away a port instance: its slot and everything in the kernel that hangs off it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from datapath.drivers.ebpf import queues
from datapath.drivers.ebpf.clock import barrier
from datapath.drivers.ebpf.floods import Member
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.layout import CHANNEL, TRUNK_KEY, C
from datapath.drivers.ebpf.ledger import PortEntry
from datapath.drivers.ebpf.policies import first_ipv4, set_addresses
from datapath.drivers.ebpf.records import checked_port, mac_bytes
from datapath.drivers.ebpf.words import Word
from datapath.errors import NotReady
from datapath.provider import PortRef
from datapath.state.conntrack import TIMEOUTS
from datapath.state.kind import Record

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running


class Staging:
    """Waits for RCU here and there: never called between a pause and the commit."""

    def __init__(self, parts: Running) -> None:
        self._kernel, self._words, self._instances, self._ledger = (
            parts.kernel,
            parts.words,
            parts.instances,
            parts.ledger,
        )
        self._networks, self._floods, self._places, self._fdb = parts.networks, parts.floods, parts.places, parts.fdb
        self._policies, self._counters, self._holds, self._plugs = (
            parts.policies,
            parts.counters,
            parts.holds,
            parts.plugs,
        )
        self._kinds = parts.kinds

    # ---- stage ----

    def stage(self, ref: PortRef, record: Record, device: str) -> Instance:
        """Raises LoadRejected, UnsupportedKind, NotReady, StaleEpoch, KernelError; then nothing is left of it."""
        record = checked_port(record, ref)
        self._check_networks(record)
        slot = self._instances.reserve(ref)
        return self.make(PortEntry(slot, ref, device, record))

    def make(self, entry: PortEntry) -> Instance:
        """A staged instance in a slot that is reserved and clean."""
        slot = entry.slot
        with contextlib.ExitStack() as undo:
            undo.callback(self.wipe, slot)
            self._ledger.save_port(entry)  # first, and the word last: what a crash leaves in between is wiped
            table = self._kernel.conntracks.new(entry.record["connections_max"])
            self._kernel.conntracks.put(slot, table)
            self._counters.clear(slot)
            instance = Instance(entry, table, *self._holds.make(slot))
            self.configure(instance)
            self._policies.set(slot, entry.rules)
            self._floods.add(self._memberships(instance))
            self._kinds.applied(instance)
            self._ledger.save_rules(entry)
            self._ledger.save_kinds(entry)
            epoch_word = Word(C.PORT_STAGED, self.flags(entry.record), entry.ref.epoch)
            self._kernel.ports.store(slot, "word", epoch_word.packed)
            self._instances.add(instance)
            undo.pop_all()
        self._plugs.plug(instance)
        return instance

    def _check_networks(self, record: Record) -> None:
        for name in (record["network"], *record["trunk"].values()):
            self._networks.index(name)

    def configure(self, instance: Instance) -> None:
        """Bring the record into the port's fields, addresses and trunks."""
        slot, record = instance.slot, instance.entry.record
        port = self._kernel.ports.view[slot]
        port["slot"] = slot
        port["hold_to"], port["hold_from"] = instance.hold_to.ifindex, instance.hold_from.ifindex
        port["network"] = self._networks.index(record["network"])
        port["policy"] = slot
        port["learned_max"] = record["learned_max"]
        port["mac"] = np.frombuffer(mac_bytes(record["mac"]), np.uint8)
        port["mtu"] = record["mtu"]
        for name, (index, default) in TIMEOUTS.items():
            port["timeouts"][index] = record["timeouts_ms"].get(name, default)
        port["address"] = 0
        set_addresses(self._kernel.addresses, slot, record["addresses"])
        port["address"] = first_ipv4(record["addresses"])
        self._set_trunks(slot, {int(vid): self._networks.index(name) for vid, name in record["trunk"].items()})

    def _set_trunks(self, slot: int, wanted: dict[int, int]) -> None:
        for vid, index in wanted.items():
            self._kernel.trunks.set((slot, vid, 0), index)
        keys = self._kernel.trunks.keys()
        gone = (keys["slot"] == slot) & ~np.isin(keys["vid"], list(wanted))
        self._kernel.trunks.delete_many(np.ascontiguousarray(keys[gone], TRUNK_KEY))

    def flags(self, record: Record) -> int:
        """Flags of the port's word that its record asks for."""
        flags = C.PORT_F_ANTISPOOF if record["antispoof"] else 0
        flags |= C.PORT_F_LEARNING if record["learning"] else 0
        return flags | (C.PORT_F_TRUNK if record["trunk"] else 0)

    def _memberships(self, instance: Instance) -> list[tuple[int, Member]]:
        networks = self._fdb.networks_of(instance)
        return [(index, (C.L2_PORT, vlan, instance.slot)) for vlan, index in networks.items()]

    # ---- change ----

    def update(self, instance: Instance, record: Record) -> None:
        """Raises LoadRejected, UnsupportedKind (nothing changed), NotReady for a stub."""
        record = checked_port(record, instance.ref)
        self._check_networks(record)
        slot = instance.slot
        if self._words.word(slot).state == C.PORT_STUB:
            raise NotReady(f"port {instance.ref.mac} is a stub: it only redirects", hint="purge it")
        before = instance.entry.record
        if record["connections_max"] != before["connections_max"]:
            self._resize(instance, record["connections_max"])
        moved = (record["network"], record["trunk"]) != (before["network"], before["trunk"])
        here = moved and self._words.gate(slot)[0] == C.GATE_LOCAL
        instance.entry = replace(instance.entry, record=record)
        self.configure(instance)
        wanted = self.flags(record)
        known = C.PORT_F_ANTISPOOF | C.PORT_F_LEARNING | C.PORT_F_TRUNK
        self._words.flag(slot, add=wanted, drop=known & ~wanted)
        if moved:
            self._move_networks(instance, here=here)
        self._ledger.save_port(instance.entry)

    def _move_networks(self, instance: Instance, *, here: bool) -> None:
        slot, wanted = instance.slot, self._memberships(instance)
        self._floods.discard(lambda i, m: m[0] != C.L2_PORT or m[2] != slot or (i, m) in wanted)
        self._floods.add(wanted)
        if here:
            keys, _ = self._places.entries_of(slot)
            networks = list(self._fdb.networks_of(instance).values())
            self._kernel.l2.delete_many(keys[~np.isin(keys["network"], networks)])
            self._places.take(*self._fdb.own_places(instance))

    def _resize(self, instance: Instance, entries: int) -> None:
        """Another table with the same connections. Raises NotReady when they do not fit; then the old one stays."""
        if self._words.running(instance.slot):
            with self._paused(instance):
                self._copy_table(instance, entries)
        else:
            self._copy_table(instance, entries)

    @contextlib.contextmanager
    def _paused(self, instance: Instance) -> Iterator[None]:
        """The active port's table stands still; frames of both directions wait in the hold taps meanwhile."""
        slot, epoch, ports = instance.slot, instance.ref.epoch, self._kernel.ports
        (_, held), committed, clock = self._words.gate(slot), ports.load(slot, "commit"), self._words.clock(slot)
        self._words.set_gate(slot, C.GATE_LOCAL, shut=True)
        ports.store(slot, "commit", 0)  # or the guest's next frame opens it
        self._words.change(slot, epoch, (C.PORT_ACTIVE,), C.PORT_STAGED)
        barrier()
        self._words.advance_clock(slot, clock)
        try:
            yield
        finally:
            self.go_on(instance, committed, held=held)

    def go_on(self, instance: Instance, committed: int, *, held: bool) -> None:
        """End of a pause, also of one that a crash of the agent cut off."""
        slot = instance.slot
        self._words.change(slot, instance.ref.epoch, (C.PORT_STAGED,), C.PORT_ACTIVE)
        self._kernel.ports.store(slot, "commit", committed)
        self._holds.pump_from(instance)
        if not held:
            self._words.set_gate(slot, C.GATE_LOCAL)
            self._holds.pump_to(instance)

    def _copy_table(self, instance: Instance, entries: int) -> None:
        fresh = self._kernel.conntracks.new(entries)
        for keys, values in instance.table.dump():
            if fresh.load(keys, values).refused:
                fresh.close()
                raise NotReady(
                    f"port {instance.ref.mac} has more than {entries} connections",
                    hint="choose a larger connections_max",
                )
        self._kernel.conntracks.put(instance.slot, fresh)
        instance.table.close()
        instance.table = fresh

    def set_rules(self, instance: Instance, rules: Sequence[Record]) -> None:
        """Rules of the port's policy (valid ones). Connections are judged again at their next packet."""
        self._policies.set(instance.slot, rules)
        instance.entry = replace(instance.entry, rules=tuple(rules))
        self._ledger.save_rules(instance.entry)

    # ---- redirects that end here ----

    def accept(self, instance: Instance, channel: int, source: np.ndarray[Any, np.dtype[Any]]) -> None:
        """`source`: struct host. What the source counts comes later: expired connections stay until then."""
        record = np.zeros((), CHANNEL)
        record["from"], record["slot"], record["epoch"] = source["addr"], instance.slot, instance.ref.epoch
        self._kernel.channels.set(channel, record)
        self._words.flag(instance.slot, add=C.PORT_F_UNSETTLED | C.PORT_F_AWAITS_SOURCE | C.PORT_F_NO_BROADCAST)
        queues.widen(instance)

    # ---- purge ----

    def shrink(self, instance: Instance) -> None:
        """Take away all but what a redirect needs."""
        slot = instance.slot
        states = (C.PORT_QUIESCED, C.PORT_STUB)
        self._words.change(slot, instance.ref.epoch, states, C.PORT_STUB)
        self._plugs.unplug(instance)
        self._floods.discard(lambda _, member: member[0] != C.L2_PORT or member[2] != slot)
        self._take_tables(slot)
        instance.entry = replace(instance.entry, state="stub")
        self._ledger.save_port(instance.entry)

    def purge(self, instance: Instance) -> None:
        """Ports of this host may still send through its redirect: they get the new place before that ends."""
        self._places.leave(instance.slot)
        barrier()
        self._words.set_gate(instance.slot, C.GATE_NONE)
        self._kernel.ports.store(instance.slot, "word", 0)
        self._plugs.unplug(instance)
        self._holds.drop(instance)
        instance.table.close()
        if instance.dirty is not None:
            instance.dirty.close()
        self.wipe(instance.slot)

    def wipe(self, slot: int) -> None:
        """Leave nothing in a slot, whatever there is."""
        self._kernel.ports.store(slot, "word", 0)
        self._kernel.ports.store(slot, "gate", 0)
        self._floods.discard(lambda _, member: member[0] != C.L2_PORT or member[2] != slot)
        self._places.leave(slot)
        self._take_tables(slot)
        keys, channels = self._kernel.channels.read()
        self._kernel.channels.delete_many(keys[channels["slot"] == slot])
        keys, devices = self._kernel.devices.read()
        self._kernel.devices.delete_many(keys[devices["slot"] == slot])
        self._holds.remove(slot)
        self._kernel.ports.view[slot] = np.zeros((), self._kernel.ports.value)
        self._ledger.forget_port(slot)
        self._instances.release(slot)

    def _take_tables(self, slot: int) -> None:
        self._kernel.conntracks.remove(slot)
        self._kernel.dirty.remove(slot)
        self._kinds.clear(slot)
        self._policies.clear(slot)
        self._kernel.ports.view["address"][slot] = 0
        set_addresses(self._kernel.addresses, slot, ())
        self._set_trunks(slot, {})
        self._counters.clear(slot)
