"""What is left to report of a port's flows, from one generation of maps to the next (takeover.py)."""

from __future__ import annotations

import numpy as np

from datapath.drivers.ebpf import flow_tables
from datapath.drivers.ebpf.evolve import by_name
from datapath.drivers.ebpf.flow_tables import FlowTables
from datapath.drivers.ebpf.generation import Generation
from datapath.drivers.ebpf.layout import CT_ENTRY, CT_KEY, FLOW_END, FLOW_REPORT
from datapath.drivers.ebpf.ledger import PortEntry
from datapath.drivers.ebpf.maps import Records
from datapath.state.flow_export import FLOW_EXPORT


def prepare(flows: FlowTables, entry: PortEntry) -> None:
    """Tables are there before a program of the new generation may end a connection. Waits for RCU."""
    if entry.kinds.get(FLOW_EXPORT.name):
        flows.make(entry.slot, entry.record["connections_max"])


def carry(flows: FlowTables, old: Generation, slot: int) -> None:
    """After the ports have opened on the new maps, and before anything is reported from these. May be done again."""
    if not old.entries[slot].kinds.get(FLOW_EXPORT.name):
        return
    keys, entries = old.instance(slot).table.read()
    ends, last = _inner(old, "flow_ends", slot)
    ids, reports = _inner(old, "flow_reports", slot)
    ends = None if ends is None else by_name(ends, FLOW_END)
    last = None if last is None else by_name(last, CT_ENTRY)
    found = flow_tables.of(by_name(keys, CT_KEY), by_name(entries, CT_ENTRY), ends, last, stands=True)
    if ids is not None and reports is not None:
        flow_tables.join(ids, by_name(reports, FLOW_REPORT), found)
    flows.load(slot, found)


def _inner(old: Generation, name: str, slot: int) -> tuple[Records | None, Records | None]:
    """Keys and values of a port's table, if that version had such."""
    if name not in old.switch.maps:
        return None, None
    with old.switch.outer(name) as outer:
        table = outer.inner(slot)
        if table is None:
            return None, None
        with table:
            keys, values = table.read()
            return np.array(keys), values
