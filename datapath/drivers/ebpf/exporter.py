"""The exporter of one port: its sequence, its uptime, its templates, and datagrams that go to its collectors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import layout
from datapath.drivers.ebpf.collectors import Collectors
from datapath.drivers.ebpf.conntrack import ORIGIN_NS
from datapath.drivers.ebpf.flow_tables import FlowTables
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Records
from datapath.export import ipfix, netflow
from datapath.export.flow import Moment
from datapath.export.remainder import marked, records
from datapath.state.endpoint import endpoint
from datapath.state.flow_export import domain_of
from datapath.state.kind import Record

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

CONNECTIONS = 8
"""In one datagram: two records each of at most 79 bytes, and templates, fit into 1,500 bytes."""
ROOM_KEPT = 0.5
"""Connections that have ended wait for collectors while so much of their table is free."""
FORMATS: dict[int, ModuleType] = {9: netflow, 10: ipfix}


class Exporter:
    """Whoever calls holds the port's lock. The sequence and what goes with it are in the kernel's map `flow_exporters`:
    they outlive the agent."""

    def __init__(self, parts: Running, tables: FlowTables, instance: Instance, record: Record) -> None:
        self._kernel, self._words, self._tables, self._slot = parts.kernel, parts.words, tables, instance.slot
        self._format = FORMATS[record["version"]]
        self._endpoints = [endpoint(collector) for collector in record["collectors"]]
        self._collectors = Collectors(record["source"])
        self._domain = domain_of(record, instance.ref.mac)
        self._refresh_ns = record["template_refresh_s"] * 10**9
        self.shortest_s = min(record["active_timeout_s"], record["inactive_timeout_s"])
        self.active_ns = record["active_timeout_s"] * 10**9
        self.inactive_ns = record["inactive_timeout_s"] * 10**9
        self._stopped = False
        self._introduced = False

    def close(self) -> None:
        self._collectors.close()

    # ---- state ----

    def may_report(self, *, last: bool = False) -> bool:
        """The guest runs here, and everything that hosts before counted and reported is known, or at the `last` never
        will be: then what is told is what this host has counted."""
        word = self._words.word(self._slot)
        known = last or not word.flags & C.PORT_F_UNSETTLED
        return not self._stopped and word.state == C.PORT_ACTIVE and known

    def stop(self) -> None:
        self._stopped = True

    def go_on(self) -> None:
        self._stopped = False

    def _clock(self) -> int:
        """The port's, as it will begin where it has not begun yet."""
        return max(self._words.clock(self._slot), ORIGIN_NS)

    def _read(self) -> Any:
        found = self._kernel.flow_exporters.get(self._slot)
        return np.zeros((), layout.FLOW_EXPORTER) if found is None else found

    def live(self) -> Record:
        """Live fields of the record."""
        state, clock = self._read(), self._clock()
        began, template = int(state["began"]), int(state["template"])
        return {
            "sequence": int(state["sequence"]),
            "uptime_ms": (clock - began) // 10**6 if began else 0,
            "template_age_ms": (clock - template) // 10**6 if template else -1,
        }

    def restore(self, record: Record) -> None:
        """Live fields of another host's exporter."""
        state, clock = self._read(), self._clock()
        if "sequence" in record:
            state["sequence"] = record["sequence"]
        if record.get("uptime_ms"):
            state["began"] = max(clock - record["uptime_ms"] * 10**6, 1)
        if record.get("template_age_ms", -1) >= 0:
            state["template"] = max(clock - record["template_age_ms"] * 10**6, 1)
        self._kernel.flow_exporters.set(self._slot, state)

    # ---- reporting ----

    def parts(self, connections: Records, reasons: NDArray[np.uint8]) -> Iterator[tuple[Records, NDArray[np.uint8]]]:
        """What is due, a datagram each."""
        which = reasons != 0
        connections, reasons = connections[which], reasons[which]
        for start in range(0, len(connections), CONNECTIONS):
            yield connections[start : start + CONNECTIONS], reasons[start : start + CONNECTIONS]

    def report(self, connections: Records, reasons: NDArray[np.uint8], now: int) -> bool:
        """Note what a datagram says, then send it to all collectors. False: none could be sent it, tried again later.

        An agent that dies in between leaves a gap, which the sequence tells, and nothing that is counted twice, which
        nobody could see. The sequence goes first: what is noted and was not sent is missing there, too.
        """
        rows, state, before = records(connections, reasons, now), self._read(), self._read()
        clock = self._clock()
        state["began"] = state["began"] or max(now, 1)
        templates = not self._introduced or clock - int(state["template"]) >= self._refresh_ns
        uptime = max(clock - int(state["began"]), 0) // 10**6
        moment = Moment(time.time_ns() // 10**6, uptime, int(state["sequence"]), self._domain)
        datagram = self._format.datagram(rows, moment, templates=templates)
        state["sequence"] = self._format.following(int(state["sequence"]), len(rows))
        state["datagrams"] += 1
        state["records"] += len(rows)
        if templates:
            state["template"] = clock
        self._kernel.flow_exporters.set(self._slot, state)
        self._tables.report(self._slot, marked(connections, now))
        unsent = self._collectors.send(datagram, self._endpoints)
        if unsent == len(self._endpoints) and self._tables.room(self._slot) > ROOM_KEPT:
            self._tables.load(self._slot, connections)
            before["began"], before["errors"] = state["began"], before["errors"] + unsent
            self._kernel.flow_exporters.set(self._slot, before)
            return False
        self._introduced |= templates
        if unsent:
            state["errors"] += unsent
            self._kernel.flow_exporters.set(self._slot, state)
        return True
