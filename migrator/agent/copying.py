"""The source's side of the transfer: which tables there are to send, cut into sections and rounds.

Runs in the VM's lane (one thread); knows no stream. Round 0 is a dump of everything; each later round is what changed
since. Nothing here loops over records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from datapath.errors import NotReady
from datapath.provider import Driver, PortRef
from datapath.registry import KINDS
from datapath.state.kind import Nature, Op, Table
from datapath.state.port import PORT
from migrator.snapshot import Tally, encode_table


@dataclass
class Batch:
    """Sections to send. `restart`: what was sent before counts no more, the destination begins afresh."""

    sections: list[bytes] = field(default_factory=list)
    records: int = 0
    restart: bool = False
    complete: bool = False  # nothing is left to send for now


@dataclass(frozen=True)
class RoundTotal:
    round: int
    records: int
    digest: int


class Copier:
    """What of these ports has been sent."""

    def __init__(self, driver: Driver, refs: Sequence[PortRef], *, with_state: bool) -> None:
        held = driver.kinds()
        wanted = [kind for name, kind in KINDS.items() if name in held and name != PORT.name]
        wanted = [kind for kind in wanted if kind.nature != Nature.ACCOUNTING]  # that comes with settle
        if not with_state:
            wanted = [kind for kind in wanted if Nature.CONFIGURATION in kind.nature]
        self._driver = driver
        self._refs = list(refs)
        self._kinds = [kind.name for kind in wanted]
        self._with_state = with_state
        self._rest: Iterator[tuple[PortRef, Table]] = iter(())
        self.dumped = False
        self.round = 0
        self.records = 0  # in all
        self.bytes = 0
        self.restarts = 0
        self._tally = Tally()

    def begin(self) -> None:
        """Note changes from now on, and begin the dump."""
        if self._with_state:
            for ref in self._refs:
                self._driver.track(ref)
        self._rest = self._dump()
        self.dumped = False

    def _dump(self) -> Iterator[tuple[PortRef, Table]]:
        for ref in self._refs:
            for kind in self._kinds:
                for table in self._driver.dump(ref, kind):
                    yield ref, table

    def chunk(self) -> Batch:
        """The next table of the dump; complete when there is none left."""
        found = next(self._rest, None)
        if found is None:
            self.dumped = True
            return Batch(complete=True)
        batch = Batch()
        self._encode(batch, *found)
        return batch

    def drain(self) -> Batch:
        """What changed since the last drain. When the note of changes overflowed: the beginning of a new dump."""
        batch = Batch(complete=True)
        if not self._with_state:
            return batch
        try:
            for ref in self._refs:
                for table in self._driver.drain(ref):
                    self._encode(batch, ref, table)
        except NotReady:
            return self._restart()
        return batch

    def _restart(self) -> Batch:
        self.restarts += 1
        self._tally = Tally()
        self.begin()
        return Batch(restart=True)

    def rest(self) -> Iterator[Batch]:
        """All that is not sent yet, of ports whose tables do not change any more."""
        if not self.dumped:
            yield from self._all_chunks()
        batch = self.drain()
        yield batch
        if batch.restart:
            yield from self._all_chunks()
            yield self.drain()

    def _all_chunks(self) -> Iterator[Batch]:
        while not (batch := self.chunk()).complete:
            yield batch

    def _encode(self, batch: Batch, ref: PortRef, table: Table) -> None:
        for section in encode_table(table, ref.mac, self.round):
            self._tally.add(section)
            batch.sections.append(section)
            self.bytes += len(section)
        self._tally.records += len(table)
        batch.records += len(table)
        self.records += len(table)

    def end_round(self) -> RoundTotal:
        """Close the round: what the destination has to have received in it."""
        total = RoundTotal(self.round, self._tally.records, self._tally.digest)
        self.round += 1
        self._tally = Tally()
        return total

    def late(self) -> Iterator[list[bytes]]:
        """Sections of what a guest that runs elsewhere by now had to begin without; it keeps what it has."""
        for ref in self._refs:
            for kind in self._kinds:
                for table in self._driver.dump(ref, kind) if KINDS[kind].late else ():
                    yield list(encode_table(replace(table, op=Op.FILL), ref.mac, self.round))

    def settle(self) -> Iterator[list[bytes]]:
        """Sections of accounting."""
        for ref in self._refs:
            for table in self._driver.settle(ref):
                yield list(encode_table(table, ref.mac, self.round))
