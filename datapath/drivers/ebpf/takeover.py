"""Maps of another layout are taken over in place, by the way that a migration takes, from one generation to the next.

    prepare   the old programs forward; tables are copied, connections are dumped while their changes are noted
    pause     every port stands: frames wait in its hold taps, which belong to no generation
    turn      last changes, the ports themselves, then the next maps are the ones from now on (bpffs.Pins.turn)
    finish    each hook point gets the new programs, ports open, what waited goes on, in order; then accounting

Until the turn the old maps are the truth: what fails gives the ports back to the old programs. After it the new ones
are, and an agent that died in between finishes at its next start. A VM that is being moved keeps its host from it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from datapath.drivers.ebpf import bpffs, evolve, moved_flows, syscall
from datapath.drivers.ebpf.adopted import Adopted
from datapath.drivers.ebpf.attach import Direction
from datapath.drivers.ebpf.clock import barrier
from datapath.drivers.ebpf.flow_tables import FlowTables
from datapath.drivers.ebpf.generation import Generation
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.ledger import PortEntry
from datapath.drivers.ebpf.maps import Mapped
from datapath.drivers.ebpf.mirroring import begin_counting
from datapath.drivers.ebpf.moved_tables import HINT, copy_changed, copy_floods, copy_tables, refuse_unknown
from datapath.errors import NotReady
from datapath.state.kind import Op, Table

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

_log = logging.getLogger(__name__)
_ENDED = ("ended_packets_from", "ended_packets_to", "ended_bytes_from", "ended_bytes_to")


def carry_out(parts: Running, differences: list[str]) -> None:
    """Bring everything of the old maps into those of `parts`, which are the next ones.

    Raises NotReady (a port takes part in a migration), UnsupportedKind (something has no place in this version),
    KernelError; the old programs go on then.
    """
    _log.info("pinned maps of another layout are taken over: %s", "; ".join(differences[:4]))
    with contextlib.ExitStack() as close, contextlib.ExitStack() as undo:
        old = Generation(Adopted(parts.pins.of(bpffs.MAPS)), parts.ledger)
        close.callback(old.close)
        undo.callback(parts.pins.mend)
        takeover = Takeover(parts, old)
        takeover.prepare(undo)
        began = time.monotonic()
        takeover.pause()
        takeover.last_changes()
        parts.pins.turn()
        undo.pop_all()
        takeover.finish()
        _log.info(
            "switch taken over: %d ports stood for %.1f ms, %d connections, %d changed meanwhile",
            len(takeover.standing),
            1e3 * (takeover.opened - began),
            takeover.connections,
            takeover.changed,
        )


def resume(parts: Running) -> None:
    """An agent died after the turn: what it had left to do."""
    _log.warning("a takeover of the switch was cut off: it is finished now")
    with contextlib.ExitStack() as close:
        old = Generation(Adopted(parts.pins.of(bpffs.BEFORE)), parts.ledger)
        close.callback(old.close)
        Takeover(parts, old).finish()


class Takeover:
    """From `old` to the switch of `parts`. One thread; nobody else writes either."""

    def __init__(self, parts: Running, old: Generation) -> None:
        self._parts, self._old, self._new = parts, old, parts.kernel
        self._instances: dict[int, Instance] = {}
        self._flows = FlowTables(parts.kernel)
        self.standing: list[int] = []  # slots of ports that stop for it
        self.connections = self.changed = 0
        self.opened = 0.0

    # ---- the old programs forward ----

    def prepare(self, undo: contextlib.ExitStack) -> None:
        """`undo` gets what gives everything back."""
        parts = self._parts
        refuse_unknown(self._old.switch, self._new.switch)
        self._check_room()
        self.standing = [slot for slot in self._old.slots() if self._stands(slot)]
        copy_tables(self._old.switch, self._new.switch)
        begin_counting(self._new)
        copy_floods(self._old, parts.floods, list(parts.networks.known()))
        parts.policies.restore([(slot, self._old.entries[slot].rules) for slot in self.standing])
        for slot in self.standing:
            self._prepare_port(slot, undo)
        for slot in self.standing:
            self._load_changes(slot)

    def _check_room(self) -> None:
        last = max(self._old.slots(), default=0)
        if last >= self._new.slots:
            raise NotReady(
                f"slot {last} is in use and {self._new.slots} are configured",
                hint=f"raise the driver's option `slots`; {HINT}",
            )

    def _stands(self, slot: int) -> bool:
        """An active port does, a redirect goes along as it is; anything else takes part in a migration."""
        word, entry = self._old.words.word(slot), self._old.entries[slot]
        if word.state == C.PORT_STUB:
            return False
        moving = word.flags & (C.PORT_F_UNSETTLED | C.PORT_F_AWAITS_SOURCE | C.PORT_F_NO_BROADCAST)
        cut_off = word.state == C.PORT_STAGED and entry.state == "active"  # a takeover that died
        shut = self._old.words.gate(slot)[1]
        if cut_off or (word.state == C.PORT_ACTIVE and not moving and not shut):
            return True
        raise NotReady(
            f"port {entry.ref.mac} of VM {entry.ref.vm} takes part in a migration: its tables stay as they are",
            hint=HINT,
        )

    def _prepare_port(self, slot: int, undo: contextlib.ExitStack) -> None:
        parts = self._parts
        entry = replace(self._old.entries[slot], state="active", committed=True)
        parts.ledger.save_port(entry)  # who finishes after a crash opens what was open
        table = self._new.conntracks.new(entry.record["connections_max"])
        self._new.conntracks.put(slot, table)
        moved_flows.prepare(self._flows, entry)
        self._instances[slot] = Instance(entry, table, *parts.holds.make(slot))
        undo.callback(self._give_back, slot)
        self._old.track(slot)
        self.connections += self._load(slot, self._old.dump(slot))

    def _load(self, slot: int, tables: Iterable[Table]) -> int:
        instance, count = self._instances[slot], 0
        for table in tables:
            done = self._parts.connections.load(instance, table)
            if done.rejected:
                reasons = ", ".join(f"{number} {reason}" for reason, number in done.rejected)
                raise NotReady(f"connections of port {instance.ref.mac} do not fit: {reasons}", hint=HINT)
            count += len(table) if table.op is Op.LOAD else 0
        return count

    def _load_changes(self, slot: int) -> int:
        changes = self._old.drain(slot)
        if changes is not None:
            return self._load(slot, changes)
        instance = self._instances[slot]
        instance.table.close()
        instance.table = self._new.conntracks.new(instance.entry.record["connections_max"])
        self._new.conntracks.put(slot, instance.table)
        return self._load(slot, self._old.dump(slot))

    # ---- every port stands ----

    def pause(self) -> None:
        for slot in self.standing:
            self._old.stop(slot)
        barrier()

    def _give_back(self, slot: int) -> None:
        """The old programs have it again, with what waited."""
        instance = self._instances[slot]
        for tap in (instance.hold_to, instance.hold_from):
            self._parts.attachments.attach(tap.ifindex, Direction.INGRESS, self._old.switch.program("from_hold"))
        self._old.untrack(slot)
        self._old.go_on(slot)
        self._pump(slot, self._old.ports)
        self._close(instance)

    def last_changes(self) -> None:
        for slot in self.standing:
            self.changed += self._load_changes(slot)
        copy_changed(self._old.switch, self._new.switch, "l2")
        for name in ("samplings", "flow_lost", "windows"):
            if name in self._old.switch.maps:
                copy_changed(self._old.switch, self._new.switch, name)
        host = self._old.kernel.counters.get(0)
        if host is not None:
            self._new.counters.set(0, host)
        self._parts.ledger.save_held({slot: self._copy_port(slot) for slot in self._old.slots()})

    def _copy_port(self, slot: int) -> tuple[int, int]:
        """Returns what the old programs had counted as held when it was copied."""
        record = evolve.by_name(self._old.ports.view[slot : slot + 1].copy(), self._new.ports.value)
        for counter in ("alarm_full", "evicted"):  # they go with what is carried
            record[counter] = 0
        self._new.ports.view[slot] = record[0]
        self._copy_buckets(slot)
        return int(record["held_to"][0]), int(record["held_from"][0])

    def _copy_buckets(self, slot: int) -> None:
        """Again: they were copied while frames passed."""
        if "qos" in self._old.switch.maps:
            with self._old.switch.mapped("qos") as before:
                found = before.view[2 * slot : 2 * slot + 2].copy()
                self._new.qos.view[2 * slot : 2 * slot + 2] = evolve.by_name(found, self._new.qos.value)

    # ---- the new maps are the truth ----

    def finish(self) -> None:
        """Everything in it may be done again by an agent that starts after a crash of this one."""
        active = [slot for slot in self._old.slots() if self._old.words.word(slot).state == C.PORT_STAGED]
        self._parts.replace_programs()
        barrier()
        self._count_held()
        for slot in active:
            self._open(slot)
        self.opened = time.monotonic()
        for slot in active:
            self._account(slot)
        bpffs.clear(self._parts.pins.of(bpffs.BEFORE).maps)
        self._new.switch.keep_own_programs()
        for instance in self._instances.values():
            self._close(instance)
        self._flows.close()

    def _count_held(self) -> None:
        """What the old programs put into hold taps since their counters were copied."""
        held, ports = self._parts.ledger.held(), self._old.ports.view
        self._parts.ledger.forget_held()
        for slot, (to, from_) in held.items():
            more = {"to": int(ports["held_to"][slot]) - to, "from": int(ports["held_from"][slot]) - from_}
            self._new.run("port_count_held", self._new.context("port_held", slot=slot, **more))

    def _open(self, slot: int) -> None:
        """Its clock never stopped: connections are as old as they were."""
        words, epoch = self._parts.words, self._old.entries[slot].ref.epoch
        if words.word(slot).state == C.PORT_STAGED:
            words.change(slot, epoch, (C.PORT_STAGED,), C.PORT_ACTIVE)
            self._new.ports.store(slot, "commit", epoch)
            words.set_gate(slot, C.GATE_LOCAL)  # frames that come now queue behind those that wait
        if slot in self._instances:  # else when the port is adopted
            self._pump(slot, self._new.ports)

    def _pump(self, slot: int, ports: Mapped) -> None:
        instance = self._instances[slot]
        for tap, held in ((instance.hold_from, "held_from"), (instance.hold_to, "held_to")):
            tap.pump(lambda held=held: int(ports.view[held][slot]))  # type: ignore[misc]

    def _account(self, slot: int) -> None:
        """What was counted is carried, as that of another host would be; only once, whatever dies."""
        instance = self._instances.get(slot) or self._old.instance(slot)  # its slot is what counts: the port is active
        ended = [0] * len(_ENDED)
        for table in self._old.counted(slot):
            late = self._parts.connections.account(instance, table)[1]
            self._flows.late(slot, late)
            for amounts in late.amounts().values():
                ended = [one + other for one, other in zip(ended, amounts, strict=True)]
        moved_flows.carry(self._flows, self._old, slot)
        self._carry(self._old.entries[slot], dict(zip(_ENDED, ended, strict=True)))

    def _carry(self, entry: PortEntry, ended: dict[str, int]) -> None:
        generation = syscall.map_info(self._old.ports.fd).id
        if entry.carried.get("generation") == generation:
            return
        carried = self._old.totals(entry.slot)
        for name, amount in ended.items():
            if amount:
                carried["counters"][name] = carried["counters"].get(name, 0) + amount
        kinds = {name: part for name, part in entry.carried.items() if name in self._parts.kinds}
        self._parts.ledger.save_carried(replace(entry, carried={**kinds, **carried, "generation": generation}))

    def _close(self, instance: Instance) -> None:
        for handle in (instance.table, instance.hold_to, instance.hold_from):
            handle.close()
