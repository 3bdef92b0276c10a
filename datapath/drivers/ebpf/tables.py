"""Dump, load, settle: kinds of state, each sent to the part that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from datapath.drivers.ebpf.acl import validate
from datapath.drivers.ebpf.configured import CONFIGURED
from datapath.drivers.ebpf.flow_export import FlowExport
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.noting import note_connections, note_l2
from datapath.errors import LoadRejected, NotReady, UnsupportedKind
from datapath.provider import Loaded
from datapath.state.acl import ACL
from datapath.state.check import checked_columns, checked_records
from datapath.state.conntrack import CONNTRACK, RELABELLED
from datapath.state.fdb import FDB
from datapath.state.flow_export import FLOW_EXPORT
from datapath.state.flows import FLOWS
from datapath.state.kind import Columns, Kind, Op, Record, Table
from datapath.state.port import PORT

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

OWN = (PORT, ACL, FDB, CONNTRACK, FLOWS)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (*OWN, *CONFIGURED)}
VERSIONS: Mapping[str, int] = {name: kind.version for name, kind in KINDS.items()}


class Tables:
    """Whoever calls sees to it that one port has one caller."""

    def __init__(self, parts: Running) -> None:
        self._words, self._staging, self._ledger = parts.words, parts.staging, parts.ledger
        self._connections, self._fdb, self._counters = parts.connections, parts.fdb, parts.counters
        self._kinds = parts.kinds
        self._loads: dict[str, Callable[[Instance, Table], Loaded]] = {
            PORT.name: self._load_port,
            ACL.name: self._load_acl,
            FDB.name: self._load_fdb,
            CONNTRACK.name: self._load_conntrack,
            FLOWS.name: self._load_flows,
        }
        flows = parts.kinds.part(FLOW_EXPORT.name)
        assert isinstance(flows, FlowExport)
        self._flows = flows

    # ---- dump ----

    def dump(self, instance: Instance, kind: str) -> Iterator[Table]:
        """Raises UnsupportedKind, and NotReady for a stub, at once."""
        self._check(instance, kind)
        if kind == PORT.name:
            return iter([Table(PORT.name, records=[dict(instance.entry.record)])])
        if kind == ACL.name:
            return iter([Table(ACL.name, records=self._rules_with_hits(instance))])
        if kind in self._kinds:
            table = self._kinds.dump(instance, kind)
            return iter([table] if len(table) else [])
        if kind == FLOWS.name:
            return self._flows.flows(instance)
        if kind == FDB.name:
            return iter([self._fdb.dump(instance, opened=self._opened(instance))])
        return self._connections.dump(instance)

    def _rules_with_hits(self, instance: Instance) -> list[Record]:
        hits = self._counters.hits(instance)
        records = []
        for rule in instance.entry.rules:
            packets, amount = hits.get(rule["id"], (0, 0))
            records.append({**rule, "hits": packets, "hit_bytes": amount})
        return records

    # ---- load ----

    def load(self, instance: Instance, table: Table) -> Loaded:
        """Raises UnsupportedKind, LoadRejected, NotReady; then nothing of the table was applied."""
        self._check(instance, table.kind)
        if table.kind in self._kinds:
            return self._kinds.load(instance, table)
        return self._loads[table.kind](instance, table)

    def _check(self, instance: Instance, kind: str) -> None:
        if kind not in KINDS:
            raise UnsupportedKind(
                f"the ebpf driver holds no state of kind {kind!r}", hint=f"it holds {', '.join(KINDS)}"
            )
        if self._words.word(instance.slot).state == C.PORT_STUB:
            raise NotReady(f"port {instance.ref.mac} is a stub: its tables are gone", hint="it only redirects")

    def relabel(self, instance: Instance, columns: Columns) -> int:
        """Raises LoadRejected, and NotReady for a port that is not active."""
        if self._words.word(instance.slot).state != C.PORT_ACTIVE:
            raise NotReady(f"port {instance.ref.mac} is not active", hint="try again when its VM has moved")
        wanted = {name: columns[name] for name in (*CONNTRACK.key, *RELABELLED) if name in columns}
        if missing := {*CONNTRACK.key, *RELABELLED} - set(wanted):
            raise LoadRejected(f"conntrack: column {min(missing)} is missing", hint="nothing was changed")
        given = checked_columns(CONNTRACK, Table(CONNTRACK.name, Op.ACCOUNT, wanted))
        return self._connections.relabel(instance, given)

    def _opened(self, instance: Instance) -> bool:
        """Its places are in the kernel's table."""
        return self._words.gate(instance.slot)[0] != C.GATE_NONE

    def _load_conntrack(self, instance: Instance, table: Table) -> Loaded:
        if table.op is Op.FILL:
            table = self._flows.without_ended(instance, table)
        if table.op is not Op.ACCOUNT:
            done = self._connections.load(instance, table)
            note_connections(self._words, instance, table)
            return done
        closed = self._flows.closed(instance)
        loaded, ended = self._connections.account(instance, table, assign=not closed)
        if len(ended):
            if not closed:
                self._flows.late(instance, ended)
            known = instance.entry.carried.get("ended", {})
            amounts = {str(number): list(amount) for number, amount in ended.amounts().items()}
            self._carry(instance, "ended", {**known, **amounts})
        return loaded

    def _load_flows(self, instance: Instance, table: Table) -> Loaded:
        return self._flows.load_flows(instance, table)

    def _load_fdb(self, instance: Instance, table: Table) -> Loaded:
        opened = self._opened(instance)
        loaded = self._fdb.load(instance, table, opened=opened)
        if opened:
            note_l2(self._words, instance, self._fdb.keys_of(instance, table))
        return loaded

    def _load_port(self, instance: Instance, table: Table) -> Loaded:
        records = [one for one in checked_records(PORT, table) if one["mac"] == instance.ref.mac]
        if len(records) != len(table):
            raise LoadRejected(
                f"port: a record of another port than {instance.ref.mac}", hint="load it to its own port"
            )
        if table.op is Op.DELETE:
            raise LoadRejected("port: a port is deleted by purge", hint="call purge")
        for record in records:
            if table.op is Op.LOAD:
                self._staging.update(instance, record)
            if "counters" in record:
                self._carry(instance, "counters", _counts(record["counters"]))
        return Loaded(len(records))

    def _load_acl(self, instance: Instance, table: Table) -> Loaded:
        records = checked_records(ACL, table)
        if table.op is Op.LOAD:
            validate(records)
            new = {record["id"] for record in records}
            rules = [rule for rule in instance.entry.rules if rule["id"] not in new]
            self._staging.set_rules(instance, [*rules, *(_without_counts(record) for record in records)])
        elif table.op is Op.DELETE:
            gone = {record["id"] for record in records}
            self._staging.set_rules(instance, [rule for rule in instance.entry.rules if rule["id"] not in gone])
            self._counters.forget_hits(instance.slot, gone)
            carried = instance.entry.carried.get("hits", {})
            self._carry(instance, "hits", {rule: amounts for rule, amounts in carried.items() if int(rule) not in gone})
        self._carry_hits(instance, table.op, records)
        return Loaded(len(records))

    def _carry_hits(self, instance: Instance, op: Op, records: Sequence[Record]) -> None:
        counted = {
            str(record["id"]): [record.get("hits", 0), record.get("hit_bytes", 0)]
            for record in records
            if "hits" in record or "hit_bytes" in record
        }
        if counted and op is not Op.DELETE:
            self._carry(instance, "hits", {**instance.entry.carried.get("hits", {}), **counted})

    def _carry(self, instance: Instance, part: str, values: Mapping[str, object]) -> None:
        if instance.entry.carried.get(part, {}) == values:
            return
        instance.entry = instance.entry.with_carried(part, values)
        self._ledger.save_carried(instance.entry)

    # ---- settle ----

    def settle(self, instance: Instance) -> Iterator[Table]:
        """What was counted, here and before: tables of op account."""
        self._check(instance, CONNTRACK.name)
        yield from self._connections.counted(instance)
        yield from self._flows.flows(instance, Op.ACCOUNT)
        yield Table(ACL.name, Op.ACCOUNT, records=self._counters.hit_records(instance))
        yield from self._kinds.settle(instance)
        counters = self._counters.total(instance)
        yield Table(PORT.name, Op.ACCOUNT, records=[{"mac": instance.ref.mac, "counters": counters}])

    def settled(self, instance: Instance) -> None:
        """No more comes: ended connections' amounts become part of the port's counters, tombstones may go."""
        carried = instance.entry.carried
        if carried.get("ended"):
            sums = dict(carried.get("counters", {}))
            for amounts in carried["ended"].values():
                for name, amount in zip(_ENDED, amounts, strict=True):
                    sums[name] = sums.get(name, 0) + amount
            self._carry(instance, "counters", sums)
            self._carry(instance, "ended", {})
        self._words.flag(instance.slot, drop=C.PORT_F_UNSETTLED)


_ENDED = ("ended_packets_from", "ended_packets_to", "ended_bytes_from", "ended_bytes_to")


def _counts(counters: Mapping[str, object]) -> dict[str, int]:
    for name, value in counters.items():
        if not isinstance(name, str) or type(value) is not int or value < 0:
            raise LoadRejected(f"port: counter {name!r} is {value!r}", hint="counters are names and whole numbers")
    return {name: value for name, value in counters.items() if isinstance(value, int)}


def _without_counts(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in ACL.accounting}
