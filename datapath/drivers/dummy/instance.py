"""One port instance of the switch in memory: word, gate, clock, queues, tables."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from datapath.drivers.dummy.tables import ColumnTable, KindTable, RecordTable
from datapath.provider import PortRef, PortState
from datapath.state.kind import Kind, Record

Gate = str  # "none" | "local" | "redirect"

_LIMITS = {"conntrack": "connections_max"}
_UNBOUNDED = 1 << 62


@dataclass
class Redirect:
    """Where a source's gate leads: the channel's id and the far host; `last_ns` is when it last passed a frame."""

    channel: int
    host: str
    last_ns: int


@dataclass
class Instance:
    """A port instance. `device` is its configured name, `present` whether that device is there.

    `queue` is the device's queue: what the guest has not read yet. `held_to` has frames with whether they were judged.
    """

    ref: PortRef
    record: Record
    device: str
    kinds: Mapping[str, Kind]
    clock: Callable[[], int]
    present: bool = True
    ifindex: int = 0
    state: PortState = PortState.STAGED
    committed: bool = False
    gate: Gate = "none"
    shut: bool = False
    redirect: Redirect | None = None
    broadcast: bool = True
    came: int = 0  # frames that came by a redirect
    lease_ns: int | None = None
    trace: bool = False
    tracking: bool = False
    overflow: bool = False
    time_base: int | None = None
    time_frozen: int = 0
    queue: deque[bytes] = field(default_factory=deque)
    held_to: deque[bytes] = field(default_factory=deque)
    held_from: deque[bytes] = field(default_factory=deque)
    counters: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    tables: dict[str, KindTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in self.kinds.items():
            limit = int(self.record[_LIMITS[name]]) if name in _LIMITS else _UNBOUNDED
            sort = ColumnTable if kind.columns else RecordTable
            self.tables[name] = sort(kind, limit, self.port_time)

    def port_time(self) -> int:
        """The port's clock in nanoseconds: it goes only while the port is active."""
        return self.time_frozen if self.time_base is None else self.clock() - self.time_base

    def run_clock(self) -> None:
        """Let the clock go on from where it stood. Idempotent."""
        if self.time_base is None:
            self.time_base = self.clock() - self.time_frozen

    def stop_clock(self) -> None:
        """Idempotent."""
        self.time_frozen, self.time_base = self.port_time(), None

    def lease_over(self) -> bool:
        """Has the lease of a state that is leased run out? An open, active port has none."""
        if self.state is PortState.ACTIVE and self.gate == "local" and not self.shut:
            return False
        return self.lease_ns is not None and self.clock() > self.lease_ns

    def configure(self, record: Record) -> None:
        """Take a new record of kind `port` and the limits in it."""
        self.record = record
        for name, field_name in _LIMITS.items():
            if name in self.tables:
                self.tables[name].limit = int(record[field_name])

    def totals(self) -> dict[str, int]:
        """The port's counters: counted here plus what was carried."""
        carried = self.carried()
        ended = sum(len(table.ended) for table in self.tables.values() if isinstance(table, ColumnTable))
        names = dict.fromkeys((*self.counters, *carried))
        totals = {name: self.counters[name] + carried.get(name, 0) for name in names}
        return {**totals, "ended": ended} if ended else totals

    def carried(self) -> Mapping[str, int]:
        """Port counters that other hosts counted before."""
        table = self.tables.get("port")
        if not isinstance(table, RecordTable):
            return {}
        counters: Mapping[str, int] = table.carried.get((self.ref.mac,), {}).get("counters", {})
        return counters
