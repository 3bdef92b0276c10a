"""Kind `flow_export`: a port's flow records go to its collectors, from a thread of the driver's.

Exactness (docs/netflow.md): of each connection the switch knows what it counted in all, and what was reported. A
datagram goes out, and what it said is noted, under the port's lock; `quiesced` takes that lock. So after it nothing is
reported here any more, and what is noted is what was sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from datapath.drivers.ebpf import flow_columns, flow_tables
from datapath.drivers.ebpf.clock import barrier
from datapath.drivers.ebpf.collectors import unreachable
from datapath.drivers.ebpf.connections import Ended
from datapath.drivers.ebpf.conntrack import ORIGIN_NS
from datapath.drivers.ebpf.exporter import Exporter
from datapath.drivers.ebpf.flow_tables import FlowTables
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kindtable import KindTable
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Records
from datapath.errors import DatapathError, LoadRejected
from datapath.export.remainder import FORCED, due, has_left
from datapath.provider import Loaded
from datapath.state.check import checked_columns
from datapath.state.endpoint import endpoint
from datapath.state.flow_export import COUNTS, FLOW_EXPORT, NAME, FlowExportDocument
from datapath.state.flows import FLOWS
from datapath.state.kind import Op, Record, Table

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

TICK_S = 0.25
PACE_MAX_S = 2.0
COST = 20
"""A round that took a second is followed by this many seconds without one."""
_log = logging.getLogger(__name__)


class FlowExport(KindTable):
    """The kind's table, and the thread."""

    kind = FLOW_EXPORT

    def __init__(self, parts: Running) -> None:
        super().__init__(parts)
        self.tables = FlowTables(parts.kernel)
        self._exporters: dict[int, Exporter] = {}
        slots = range(parts.kernel.slots)
        self._locks = [threading.RLock() for _ in slots]  # of what is sent and noted: held for a datagram
        self._busy = [threading.RLock() for _ in slots]  # of the tables themselves: held for a round
        self._due: dict[int, float] = {}
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- configuration ----

    def apply(self, instance: Instance, records: Sequence[Record], before: Sequence[Record]) -> None:
        slot = instance.slot
        for record in records:
            _check(record)
        with self._busy[slot]:
            if records:
                self.tables.make(slot, instance.entry.record["connections_max"])
                made = Exporter(self._parts, self.tables, instance, records[0])
                if before and before[0]["version"] != records[0]["version"]:
                    made.restore({"sequence": 0})  # it counts something else
                self._replace(slot, made)
                self._feature(slot, on=True)
            elif before:
                self._end(instance)

    def _end(self, instance: Instance) -> None:
        """No more is exported: what is left goes out, also of what ended while it did."""
        self.ended(instance)
        self._feature(instance.slot, on=False)
        barrier()
        self.ended(instance)
        self.clear(instance.slot)

    def _replace(self, slot: int, made: Exporter | None) -> None:
        with self._locks[slot]:
            old = self._exporters.pop(slot, None)
            if old is not None:
                old.close()
            if made is not None:
                self._exporters[slot] = made

    def _feature(self, slot: int, *, on: bool) -> None:
        self._parts.words.feature(slot, add=C.FEATURE_EXPORT if on else 0, drop=C.FEATURE_EXPORT)

    def clear(self, slot: int) -> None:
        with self._busy[slot]:
            self._replace(slot, None)
            self.tables.remove(slot)
            self._due.pop(slot, None)

    def obstacles(self, records: Sequence[Record]) -> list[str]:
        found = []
        for record in records:
            for collector in record["collectors"]:
                reason = unreachable(*endpoint(collector), record["source"])
                if reason:
                    found.append(f"flow_export: collector {collector} cannot be reached from this host: {reason}")
        return found

    # ---- what changes by itself ----

    def dump(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        counts = self._counts(instance)
        with self._locks[instance.slot]:
            exporter = self._exporters.get(instance.slot)
            live = exporter.live() if exporter is not None else {}
        return [{**record, **live, **counts} for record in records]

    def restore(self, instance: Instance, records: Sequence[Record]) -> None:
        with self._locks[instance.slot]:
            exporter = self._exporters.get(instance.slot)
            for record in records:
                if exporter is not None:
                    exporter.restore(record)

    def _own(self, slot: int) -> dict[str, int]:
        sent, lost = self._parts.kernel.flow_exporters.get(slot), self._parts.kernel.flow_lost.get(slot)
        own = {name: int(sent[name]) for name in ("datagrams", "records", "errors")} if sent is not None else {}
        return own | ({f"lost_{name}": int(lost[name]) for name in lost.dtype.names} if lost is not None else {})

    def _counts(self, instance: Instance) -> dict[str, int]:
        own, carried = self._own(instance.slot), instance.entry.carried.get(self.kind.name, {})
        return {name: own.get(name, 0) + int(carried.get(name, 0)) for name in COUNTS}

    def counted(self, instance: Instance, records: Sequence[Record]) -> list[Record]:  # noqa: ARG002
        return [{"name": NAME, **self._counts(instance)}]

    def account(self, instance: Instance, records: Sequence[Record]) -> None:
        for record in records:
            carried = {name: record.get(name, 0) for name in COUNTS}
            if carried != instance.entry.carried.get(self.kind.name, {}):
                instance.entry = instance.entry.with_carried(self.kind.name, carried)
                self._parts.ledger.save_carried(instance.entry)

    # ---- kind `flows` ----

    def flows(self, instance: Instance, op: Op = Op.LOAD) -> Iterator[Table]:
        """What is left to report, of a port that exports flows."""
        with self._busy[instance.slot]:
            clock = self._parts.words.clock(instance.slot)
            stands = self._parts.words.word(instance.slot).state == C.PORT_QUIESCED
            found = self.tables.connections(instance.slot, stands=stands)
        if len(found):
            columns = flow_columns.columns(found, clock)
            yield Table(FLOWS.name, op, columns=columns, port_time_ns=max(clock - ORIGIN_NS, 0))

    def load_flows(self, instance: Instance, table: Table) -> Loaded:
        """LOAD, DELETE, ACCOUNT. Once a port reports by itself it knows better: then nothing is done. Nor where it
        ceased to."""
        columns = checked_columns(FLOWS, table)
        slot, words = instance.slot, self._parts.words
        with self._busy[slot]:
            if table.op is Op.DELETE:
                self.tables.forget(slot, columns["id"])
                return Loaded(len(table))
            if self.closed(instance) or (words.running(slot) and slot not in self._exporters):
                return Loaded(len(table))
            clock = table.port_time_ns + ORIGIN_NS
            if not words.running(slot):
                words.advance_clock(slot, clock)
            self.tables.make(slot, instance.entry.record["connections_max"])
            found = flow_columns.connections(columns, clock)
            self._go_on(instance, found)
            done = self.tables.load(slot, found)
        reasons = (("the table of flows that have ended is full", len(done.refused)),) if done.refused else ()
        return Loaded(len(table) - len(done.refused), reasons)

    def _go_on(self, instance: Instance, found: Records) -> None:
        """What ended elsewhere since it was copied, and nobody had said so when the port opened: it goes on here."""
        over = np.flatnonzero(found["ended"])
        if len(over) and self._parts.words.running(instance.slot):
            keys, entries = flow_tables.keys_of(found[over]), flow_tables.entries_of(found[over])
            lives = self._parts.connections.assign(instance, keys, entries)
            found["ended"][over[lives]] = 0

    # ---- life ----

    def opened(self, instance: Instance) -> None:
        with self._locks[instance.slot]:
            exporter = self._exporters.get(instance.slot)
            if exporter is not None:
                exporter.go_on()

    def quiesced(self, instance: Instance) -> None:
        """Waits for the datagram that is being sent."""
        with self._locks[instance.slot]:
            exporter = self._exporters.get(instance.slot)
            if exporter is not None:
                exporter.stop()

    def ended(self, instance: Instance) -> None:
        """All that is left goes out. The port is still active."""
        self._round(instance, everything=True)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="flow-export", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._leave.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for slot in list(self._exporters):
            self._replace(slot, None)
        self.tables.close()

    # ---- the thread ----

    def _run(self) -> None:
        while not self._leave.wait(TICK_S):
            for instance in self._parts.instances:
                if instance.slot in self._exporters and self._due.get(instance.slot, 0) <= time.monotonic():
                    self._try(instance)

    def _try(self, instance: Instance) -> None:
        began = time.monotonic()
        try:
            self._round(instance)
        except DatapathError:
            if instance.slot in self._exporters:  # else the port went away meanwhile
                _log.exception("flows of port %s were not reported, tried again", instance.ref.mac)
        took = time.monotonic() - began
        self._due[instance.slot] = time.monotonic() + max(self._pace_s(instance.slot), COST * took)

    def _pace_s(self, slot: int) -> float:
        exporter = self._exporters.get(slot)
        return PACE_MAX_S if exporter is None else min(exporter.shortest_s / 4, PACE_MAX_S)

    def late(self, instance: Instance, ended: Ended) -> None:
        """What hosts before had counted of connections that ended here before it was known, or did not come."""
        with self._busy[instance.slot]:
            self.tables.late(instance.slot, ended)

    def without_ended(self, instance: Instance, table: Table) -> Table:
        """Of connections those that have not ended here: what comes late begins none of them again."""
        with self._busy[instance.slot]:
            ended = self.tables.ended(instance.slot)
        if not len(ended) or table.columns is None or "id" not in table.columns:
            return table
        rest = ~np.isin(table.columns["id"], ended)
        return replace(table, columns={name: column[rest] for name, column in table.columns.items()})

    def closed(self, instance: Instance) -> bool:
        """The port reports by itself. What another host counted has come, or was taken as told."""
        slot, words = instance.slot, self._parts.words
        return slot in self._exporters and words.running(slot) and not words.has(slot, C.PORT_F_UNSETTLED)

    def _round(self, instance: Instance, *, everything: bool = False) -> None:
        with self._busy[instance.slot]:
            self._report(instance, everything=everything)

    def _report(self, instance: Instance, *, everything: bool) -> None:
        """Report what is due. A switchover waits for one datagram, not for the reading."""
        exporter = self._exporters.get(instance.slot)
        if exporter is None or not exporter.may_report(last=everything):
            return
        self.tables.fit(instance.slot, instance.entry.record["connections_max"])
        now = self._parts.words.clock(instance.slot)
        found = self.tables.connections(instance.slot)
        reasons = due(found, now, exporter.active_ns, exporter.inactive_ns)
        if everything:
            reasons[(reasons == 0) & has_left(found)] = FORCED
        told = (found["ended"] != 0) & (reasons == 0)
        for part, why in exporter.parts(found, reasons):
            with self._locks[instance.slot]:
                if self._exporters.get(instance.slot) is not exporter or not exporter.may_report(last=everything):
                    return
                if not exporter.report(part, why, now):
                    return
        with self._locks[instance.slot]:
            if exporter.may_report(last=everything) and told.any():
                self.tables.report(instance.slot, found[told])


def _check(record: dict[str, Any]) -> None:
    """Raise LoadRejected when it is none that a document could give."""
    try:
        FlowExportDocument(**{name: record[name] for name in FlowExportDocument.model_fields})
    except ValueError as error:
        raise LoadRejected(f"flow_export: {error}", hint="the sender has a newer version, or it is damaged") from error
