"""The configured kinds of state that this driver holds: a line for each (kindtable.py says what one is)."""

from __future__ import annotations

from datapath.drivers.ebpf.flow_export import FlowExport
from datapath.drivers.ebpf.kindtable import KindTable
from datapath.drivers.ebpf.mirroring import MirrorTable
from datapath.drivers.ebpf.qos import Qos
from datapath.drivers.ebpf.remap import RemapTable
from datapath.drivers.ebpf.sampling import SamplingTable
from datapath.drivers.ebpf.windows import WindowTable
from datapath.state.kind import Kind

TABLES: tuple[type[KindTable], ...] = (
    MirrorTable,
    RemapTable,
    Qos,
    SamplingTable,
    FlowExport,
    WindowTable,
)

CONFIGURED: tuple[Kind, ...] = tuple(table.kind for table in TABLES)
