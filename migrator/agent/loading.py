"""The destination's side of the transfer: sections into the switch, and whether all of a round has come.

Runs in the VM's lane, except for `check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from datapath.provider import Driver, Loaded, PortRef
from datapath.registry import KINDS
from datapath.state.kind import Nature, Op, Table
from migrator.agent.report import Report
from migrator.agent.second_copy import SecondCopy
from migrator.errors import Corrupt
from migrator.snapshot import Section, Tally


class Arrival:
    """What has come of a VM's state."""

    def __init__(self, driver: Driver, refs: Sequence[PortRef], report: Report) -> None:
        self._driver = driver
        self._refs = {ref.mac: ref for ref in refs}
        self._report = report
        self._tally = Tally()
        self._moved: Counter[str] = Counter()
        self._again: dict[PortRef, Callable[[], None]] = {}
        self._known: set[tuple[PortRef, str]] = set()  # of which something came
        self._second: SecondCopy | None = None
        self.revisions: dict[PortRef, int] = {}
        self.loaded = 0

    @property
    def revision(self) -> int:
        """Of the configuration that all of the ports have, 0 when it is not known."""
        return min((self.revisions.get(ref, 0) for ref in self._refs.values()), default=0)

    def configured(self, ref: PortRef, revision: int, again: Callable[[], None]) -> None:
        """The coordinator changed a port while it is copied. The source's tables may be older: `again` follows them."""
        self.revisions[ref] = revision
        self._again[ref] = again

    def load(self, section: Section) -> None:
        """Apply one section. Raises Corrupt for a port that is not of this VM, LoadRejected as the driver does."""
        ref = self._refs.get(section.port)
        if ref is None:
            raise Corrupt(f"a section for port {section.port}, which is not of this VM", field="port")
        self._tally.add_section(section)
        self._report.bytes += section.size
        if section.table is None or section.kind not in self._driver.kinds():
            self._report.not_moved[f"{section.kind}: not known here"] += section.count
            return
        loaded = self._load(ref, section.table)
        if ref in self._again and section.op is Op.LOAD and Nature.CONFIGURATION in KINDS[section.kind].nature:
            self._again[ref]()
        self._report.entries += section.count
        self.loaded += loaded.loaded
        if section.op.whole:
            self._moved[section.kind] += loaded.loaded
        if section.op is Op.ACCOUNT:
            return  # of what has ended since the driver keeps the amounts: it has moved
        for reason, count in loaded.rejected:
            self._report.not_moved[f"{section.kind}: {reason}"] += count

    def _load(self, ref: PortRef, table: Table) -> Loaded:
        """A copy that begins again finds the earlier one's records in its way when a port is nearly full."""
        loaded = self._driver.load(ref, table)
        if table.op is not Op.LOAD:
            return loaded
        self._known.add((ref, table.kind))
        if self._second is None:
            return loaded
        if loaded.rejected and self._second.make_room(ref, table):
            loaded = self._driver.load(ref, table)
        self._second.note(ref, table)
        return loaded

    @property
    def copying_again(self) -> bool:
        """An earlier copy's records are still among those that are here."""
        return self._second is not None

    def restart(self) -> None:
        """What came before counts no more; it stays until the new copy is complete."""
        self._second = SecondCopy(self._driver, self._known)
        self._tally, self.loaded = Tally(), 0
        self._moved.clear()
        self._report.not_moved.clear()

    def check(self, number: int, records: int, digest: int) -> None:
        """The round is complete. Raises Corrupt when it is not what the source sent."""
        tally, self._tally = self._tally, Tally()
        if tally.records != records or tally.digest != digest:
            raise Corrupt(
                f"round {number}: {tally.records} of {records} records came, or they differ",
                hint="a section was lost or damaged on the way",
            )

    def finish_copy(self) -> None:
        """A round was complete: what a copy that began again has not brought is gone."""
        second, self._second = self._second, None
        if second is not None:
            second.finish()
            for again in self._again.values():
                again()

    def moved(self) -> Counter[str]:
        """Kind -> records loaded."""
        return self._moved
