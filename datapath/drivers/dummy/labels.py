"""Marks and labels of connections in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from datapath.drivers.dummy.instance import Instance
from datapath.drivers.dummy.tables import ColumnTable
from datapath.errors import LoadRejected, UnsupportedKind
from datapath.state.acl import ACL
from datapath.state.check import checked_columns
from datapath.state.conntrack import CONNTRACK, RELABELLED
from datapath.state.kind import Columns, Op, Table


def relabel(port: Instance, columns: Columns) -> int:
    """Change what `RELABELLED` names of connections that are there. Raises UnsupportedKind, LoadRejected."""
    table, needed = port.tables.get(CONNTRACK.name), (*CONNTRACK.key, *RELABELLED)
    if not isinstance(table, ColumnTable):
        raise UnsupportedKind(f"kind {CONNTRACK.name} is not held here")
    if missing := set(needed) - set(columns):
        raise LoadRejected(f"{CONNTRACK.name}: column {min(missing)} is missing", hint="nothing was changed")
    given = Table(CONNTRACK.name, Op.ACCOUNT, {name: columns[name] for name in needed})
    return table.relabel(checked_columns(CONNTRACK, given))


def versions(ports: Iterable[Instance]) -> Mapping[str, int]:
    """Of kind `acl`, as far as the ports' rules need it."""
    tables = [port.tables[ACL.name] for port in ports if ACL.name in port.tables]
    rules = [rule for table in tables for part in table.dump() for rule in part.records or ()]
    return {ACL.name: ACL.version_of(rules)} if tables else {}
