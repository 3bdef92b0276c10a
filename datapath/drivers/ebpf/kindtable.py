"""A configured kind of state in the kernel: what each of them is to the driver, and all of them together.

The driver keeps the records in its ledger and knows when a port comes, changes, moves and goes; a KindTable brings
records into the kernel and reads from it what the switch counted or changed by itself. Kinds with tables of their own
in the packet path's data model (port, acl, fdb, conntrack) are not among them: tables.py has these.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.ledger import Ledger, PortEntry
from datapath.errors import LoadRejected
from datapath.provider import Loaded, Place
from datapath.state.check import checked_records
from datapath.state.kind import Kind, Nature, Op, Record, Table

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running


Keyed = dict[tuple[Any, ...], Record]


class KindTable(abc.ABC):
    """One kind. One port has one caller; different ports may be in hand side by side.

    Between a pause and the commit only `quiesced`, `dump` and `restore` are called: these wait for no disk and no RCU.
    """

    kind: ClassVar[Kind]

    def __init__(self, parts: Running) -> None:
        """`parts`: the running switch; when this is called its kernel, words, networks and instances are there."""
        self._parts = parts

    @abc.abstractmethod
    def apply(self, instance: Instance, records: Sequence[Record], before: Sequence[Record]) -> None:
        """Make the port so: `records` are all it has of the kind, each checked against the kind; `before` the last.

        Also called, with nothing before, for a port that is made, that an agent finds again at its start, and after its
        maps were taken over: whatever is there, this is what it has to be. Live state that is there stays.
        Raises LoadRejected or UnsupportedKind; then nothing has changed.
        """

    def amend(
        self,
        instance: Instance,
        records: Sequence[Record],
        before: Sequence[Record],
        *,
        gone: Sequence[Record],  # noqa: ARG002
        new: Sequence[Record],  # noqa: ARG002
    ) -> None:
        """As `apply`, of a port that this process knows: `gone` is no more, or otherwise, and `new` is.

        For a kind with so many records that a change of one may not look at the others.
        """
        self.apply(instance, records, before)

    @abc.abstractmethod
    def clear(self, slot: int) -> None:
        """Nothing of the kind is left in a slot, whatever there was."""

    def dump(self, instance: Instance, records: Sequence[Record]) -> list[Record]:  # noqa: ARG002
        """The same records with what is live and counted in them, carried included."""
        return list(records)

    def restore(self, instance: Instance, records: Sequence[Record]) -> None:  # noqa: B027
        """Live fields of records that another host dumped (those that have any)."""

    def account(self, instance: Instance, records: Sequence[Record]) -> None:  # noqa: B027
        """What other hosts counted: assigned beside what is counted here, so that doing it twice does no harm."""

    def counted(self, instance: Instance, records: Sequence[Record]) -> list[Record]:  # noqa: ARG002
        """Keys and accounting fields, here and before, for `account` elsewhere."""
        return []

    def obstacles(self, records: Sequence[Record]) -> list[str]:  # noqa: ARG002
        """Why this host cannot hold such records, each a sentence that names the thing."""
        return []

    def opened(self, instance: Instance) -> None:  # noqa: B027
        """The guest runs here from now on."""

    def quiesced(self, instance: Instance) -> None:  # noqa: B027
        """The port has stopped; the next `dump` is what goes to the other host. A rollback is told by `opened`."""

    def changed(self) -> None:  # noqa: B027
        """Devices, networks or hosts are others than a moment ago. From any thread."""

    def placed(self, place: Place) -> None:  # noqa: B027
        """Where a MAC is that is not here, by word of the coordinator. From any thread."""

    def unplaced(self, network: str, mac: str) -> None:  # noqa: B027
        """The end of `placed`."""

    def ended(self, instance: Instance) -> None:  # noqa: B027
        """The active port is about to go, and its guest runs nowhere else: the last moment to say something of it."""

    def plugged(self, instance: Instance) -> None:  # noqa: B027
        """The port's device is there now, or another one is: `ifindex` of the port says which. From any thread."""

    def held(self, instance: Instance) -> None:  # noqa: B027
        """No frame comes to the guest from now on; it still runs. A rollback is told by `opened`."""

    def idle(self, instance: Instance) -> bool:  # noqa: ARG002
        """After `held`: does nothing wait any more in a queue of the kind?"""
        return True

    def start(self) -> None:  # noqa: B027
        """Threads and sockets. Ports of an earlier run have been applied by then."""

    def stop(self) -> None:  # noqa: B027
        """The end of `start`; the switch goes on."""

    def destroy(self) -> None:  # noqa: B027
        """Take off the host what belongs to no port; all ports have been cleared. `close` follows."""

    def close(self) -> None:  # noqa: B027
        """Let go of descriptors: nothing is called any more."""


class KindTables:
    """All of them by name, and their records of each port in the ledger."""

    def __init__(self, tables: Iterable[KindTable], ledger: Ledger) -> None:
        self._tables: Mapping[str, KindTable] = {table.kind.name: table for table in tables}
        self._ledger = ledger
        self._keyed: dict[tuple[int, str], tuple[Sequence[Record], Keyed]] = {}  # of slot and kind: of what, and it

    def __contains__(self, name: str) -> bool:
        return name in self._tables

    # ---- life ----

    def start(self) -> None:
        for table in self._tables.values():
            table.start()

    def stop(self) -> None:
        for table in self._tables.values():
            table.stop()

    def destroy(self) -> None:
        for table in self._tables.values():
            table.destroy()

    def close(self) -> None:
        for table in self._tables.values():
            table.close()

    def plugged(self, instance: Instance) -> None:
        for table, _ in self._used(instance):
            table.plugged(instance)

    def held(self, instance: Instance) -> None:
        for table, _ in self._used(instance):
            table.held(instance)

    def idle(self, instance: Instance) -> bool:
        return all(table.idle(instance) for table, _ in self._used(instance))

    def applied(self, instance: Instance) -> None:
        """A port is made, or found again: what the ledger says of it comes into the kernel."""
        for name, table in self._tables.items():
            table.apply(instance, instance.entry.kinds.get(name, ()), ())

    def opened(self, instance: Instance) -> None:
        for table, _ in self._used(instance):
            table.opened(instance)

    def quiesced(self, instance: Instance) -> None:
        for table, _ in self._used(instance):
            table.quiesced(instance)

    def changed(self) -> None:
        for table in self._tables.values():
            table.changed()

    def placed(self, place: Place) -> None:
        for table in self._tables.values():
            table.placed(place)

    def unplaced(self, network: str, mac: str) -> None:
        for table in self._tables.values():
            table.unplaced(network, mac)

    def ended(self, instance: Instance) -> None:
        for table, _ in self._used(instance):
            table.ended(instance)

    def part(self, name: str) -> KindTable:
        """The table of a kind."""
        return self._tables[name]

    def clear(self, slot: int) -> None:
        for name, table in self._tables.items():
            table.clear(slot)
            self._keyed.pop((slot, name), None)

    def _used(self, instance: Instance) -> list[tuple[KindTable, Sequence[Record]]]:
        """Those that the port has records of."""
        return [(self._tables[name], records) for name, records in self.used(instance.entry).items()]

    # ---- state ----

    def used(self, entry: PortEntry) -> Mapping[str, Sequence[Record]]:
        """Kinds that a port has records of."""
        return {name: records for name, records in entry.kinds.items() if records and name in self._tables}

    def obstacles(self, configured: Mapping[str, Sequence[Record]]) -> list[str]:
        """Why this host cannot hold such records."""
        known = [(self._tables[name], records) for name, records in configured.items() if name in self._tables]
        return [sentence for table, records in known for sentence in table.obstacles(records)]

    def dump(self, instance: Instance, name: str) -> Table:
        table, records = self._tables[name], instance.entry.kinds.get(name, ())
        return Table(name, records=table.dump(instance, records) if records else [])

    def last(self, instance: Instance) -> list[Table]:
        """All that is live of a port that has stopped."""
        live = [name for name, table in self._tables.items() if Nature.LIVE in table.kind.nature]
        return [found for name in live if len(found := self.dump(instance, name))]

    def settle(self, instance: Instance) -> Iterator[Table]:
        for table, records in self._used(instance):
            counted = table.counted(instance, records)
            if counted:
                yield Table(table.kind.name, Op.ACCOUNT, records=counted)

    def load(self, instance: Instance, table: Table) -> Loaded:
        """Raises LoadRejected, UnsupportedKind; then nothing of the table was applied."""
        part = self._tables[table.kind]
        records = checked_records(part.kind, table)
        if table.op is Op.ACCOUNT:
            part.account(instance, records)
        else:
            self._configure(part, instance, table.op, records)
        if table.op is Op.LOAD:
            part.restore(instance, [one for one in records if any(name in one for name in part.kind.live)])
            part.account(instance, [one for one in records if any(name in one for name in part.kind.accounting)])
        return Loaded(len(records))

    def _configure(self, part: KindTable, instance: Instance, op: Op, records: Sequence[Record]) -> None:
        kind = part.kind
        before = instance.entry.kinds.get(kind.name, ())
        named = {kind.key_of(record): record for record in records}
        if len(named) != len(records):
            raise LoadRejected(f"{kind.name}: two records have one key", hint=f"{', '.join(kind.key)} differ in each")
        known = self._by_key(kind, instance.slot, before)
        bare = {key: kind.bare(record) for key, record in named.items()} if op is Op.LOAD else {}
        new = {key: record for key, record in bare.items() if known.get(key) != record}
        gone = {key: known[key] for key in named if key in known and (key in new or key not in bare)}
        if not new and not gone:
            return
        wanted = {**known, **new}
        for key in gone.keys() - new.keys():
            del wanted[key]
        after = tuple(wanted.values())
        part.amend(instance, after, before, gone=tuple(gone.values()), new=tuple(new.values()))
        self._keyed[instance.slot, kind.name] = (after, wanted)
        instance.entry = replace(instance.entry, kinds={**instance.entry.kinds, kind.name: after})
        self._ledger.amend_kind(instance.entry, kind, gone=[*(gone.keys() - new.keys())], new=[*new.values()])

    def _by_key(self, kind: Kind, slot: int, records: Sequence[Record]) -> Keyed:
        """A port's records by their keys: made once, as long as they are the same."""
        made_of, keyed = self._keyed.get((slot, kind.name), ((), {}))
        return keyed if made_of is records else {kind.key_of(record): record for record in records}
