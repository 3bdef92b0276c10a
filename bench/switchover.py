"""The switchover, in the parts that the protocol names: real agents, a VM with many connections, more beginning.

A VM moves between two hosts, there and back, under datagrams from outside of which most begin a connection, and
datagrams of its own. The guest is a process that stops and resumes as QEMU does (`migrator.lab.vnic`), 20 ms apart;
it loses no frame itself, so that each one that is missing, or comes twice, is the switch's.

  paused to committed   the guest stood -> the source has the destination's word that all is there
  resumed to delivered  the guest runs there -> all frames that were held for it have been sent on

Both are told by the hypervisor's clock and the source agent's, which on one machine are one.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from bench.figures import Figures, verify
from bench.losses import Gap, Move, told
from bench.plot import Lines
from bench.workload import HOUR_NS, connections
from datapath.state.kind import Table
from migrator._pb import migrator_pb2 as pb
from migrator.lab.cluster import Cluster
from migrator.lab.errors import LabError
from migrator.lab.machines import GUEST_DEVICE, Machine, Port, add_outsider, add_vm
from migrator.lab.processes import Worker, wait_until
from migrator.snapshot import Header, KindInfo, SnapshotReader, snapshot

STEADY_PER_S = 500
UDP_TIMEOUT_MS = 2_000  # of connections that began and went no further: how many there are beside the table's
MEMORY_MS = 20
LATE_S = 30.0
STAGE_MOVES, STAGE_S = 15, 60
CHUNK = 1 << 20
PARTS = ("hold", "idle_wait", "suspend", "quiesce", "drain", "final", "committed", "held_delivered")
NETWORK, HOSTS = "blue", ("h1", "h2")
DIRECTIONS = ("to the guest", "from the guest")
POLICY = {
    "name": "bench",
    "rules": [{"direction": way, "priority": 1, "protocol": "udp", "action": "allow"} for way in ("to", "from")],
}


@dataclass(frozen=True)
class Load:
    """`entries` connections, `new` more a second, and how many moves are made of it."""

    entries: int
    new: int
    moves: int

    @property
    def name(self) -> str:
        return f"{self.entries:,} connections, {self.new:,} new/s"

    @property
    def budgeted(self) -> bool:
        return (self.entries, self.new) == (100_000, 5_000)


QUICK = (Load(1_000, 0, 4), Load(10_000, 1_000, 6))
WHOLE = (
    Load(1_000, 0, 10),
    Load(10_000, 0, 10),
    Load(100_000, 0, 10),
    Load(1_000_000, 0, 3),
    Load(1_000, 5_000, 10),
    Load(10_000, 5_000, 10),
    Load(100_000, 5_000, 150),
    Load(1_000_000, 5_000, 3),
    Load(100_000, 1_000, 10),
    Load(100_000, 20_000, 12),
)


@dataclass
class Moves:
    """What moves of one load took, in milliseconds, by part; and what became of the frames."""

    times: dict[str, list[float]] = field(default_factory=dict)
    sent: int = 0
    lost: int = 0
    doubled: int = 0
    gaps: list[str] = field(default_factory=list)
    """Of the lost ones: when in which move, in words."""

    def add(self, name: str, value: float) -> None:
        self.times.setdefault(name, []).append(value)


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    charts = {
        "entries": Lines("Switchover by size of the table, 5,000 new/s", "connections", "ms"),
        "new": Lines("Switchover by new connections, 100,000 in the table", "new connections/s", "ms", log_x=False),
    }
    sent = lost = doubled = moved = 0
    for load in QUICK if quick else WHOLE:
        moves = _moves(load)
        _report(figures, charts, load, moves)
        sent, lost, doubled = sent + moves.sent, lost + moves.lost, doubled + moves.doubled
        moved += load.moves
    figures.add(f"frames lost, of {sent:,} in {moved} moves", "", [lost], "<1")
    figures.add(f"frames doubled, of {sent:,}", "", [doubled], "<1")
    for name, chart in charts.items():
        if chart.points:
            figures.chart(name, chart)
    return figures


def _report(figures: Figures, charts: dict[str, Lines], load: Load, moves: Moves) -> None:
    budget, tail = ("<5", "<15") if load.budgeted else ("", "")
    for part in ("paused to committed", "resumed to delivered"):
        figure = figures.add(f"{load.name}: {part}", "ms", moves.times[part], budget, tail)
        if load.new in (0, 5_000):
            title = part if load.new else f"{part}, no new ones"
            charts["entries"].add(title, load.entries, figure)
        if load.entries == 100_000:
            charts["new"].add(part, load.new, figure)
    figures.add(f"{load.name}: whole move", "ms", moves.times["total"])
    figures.add(f"{load.name}: frames lost, of {moves.sent:,}", "", [moves.lost], "<1")
    figures.notes += moves.gaps
    if load.budgeted:
        for part in PARTS:
            figures.add(f"{load.name}: {part}", "ms", moves.times[part])


def _moves(load: Load) -> Moves:
    """Move a VM with this load that often; after some moves a fresh one, for a move keeps what began from ending."""
    moves = Moves()
    for first in range(0, load.moves, STAGE_MOVES):
        with stage(load) as place:
            hosts = itertools.cycle(("h2", "h1"))
            for _ in range(min(STAGE_MOVES, load.moves - first)):
                _one(place, load, next(hosts), moves)
            place.account(load, moves)
    return moves


def _one(place: Stage, load: Load, to: str, moves: Moves) -> None:
    began = time.monotonic()
    report = place.cluster.migrate(place.vm, to, deadline_s=120.0)
    verify("outcome", (report.outcome, report.reason), ("complete", ""))
    verify("led by the agent", report.leading, True)
    verify("frames that the agents fear for", (report.frames["dropped"], report.frames["may_be_lost"]), (0, 0))
    verify("records left behind", sum(report.not_moved.values()), 0)
    verify("all connections moved", report.moved["conntrack"] >= load.entries, True)
    times = dict(report.times_ms)
    stood = place.vm.order("status")["times"]
    place.moves.append(Move(len(place.moves) + 1, to, began, stood["stopped"], stood["resumed"], time.monotonic()))
    there = 1e3 * (stood["resumed"] - stood["stopped"])
    moves.add("paused to committed", times["committed"])
    moves.add("resumed to delivered", times["downtime"] + times["held_delivered"] - there)
    for name in (*PARTS, "total"):
        moves.add(name, times[name])


# ---- the stage ----


@dataclass
class Stage:
    cluster: Cluster
    vm: Machine
    outside: Machine
    moves: list[Move] = field(default_factory=list)
    senders: tuple[Worker, Worker] = field(init=False)
    counters: tuple[Worker, Worker] = field(init=False)

    def begin(self, load: Load) -> None:
        """Frames both ways, and all of them counted at the other end."""
        ends = (self.outside, self.vm)
        self.senders = (self._worker(ends[0], "send"), self._worker(ends[1], "send"))
        self.counters = (self._worker(ends[1], "count"), self._worker(ends[0], "count"))
        for counter in self.counters:
            counter.call("count")
        for sender, (source, destination), new in zip(self.senders, (ends, ends[::-1]), (load.new, 0), strict=True):
            sender.call(
                "send",
                source_mac=source.ports[0].mac,
                destination_mac=destination.ports[0].mac,
                source=source.ports[0].silent[0],
                destination=destination.ports[0].silent[0],
                steady=STEADY_PER_S,
                new=new,
            )
        wait_until("frames arrive", lambda: all(c.call("counted")["came"] > 50 for c in self.counters), 20.0)

    def account(self, load: Load, moves: Moves) -> None:
        """No more frames: what has become of all that were sent. None of them was lost by this rig itself."""
        gaps: list[Gap] = []
        for sender, counter, way in zip(self.senders, self.counters, DIRECTIONS, strict=True):
            sent = sender.call("stop")["sent"]
            with suppress(LabError):  # what is missing after so long is lost
                wait_until("all frames have arrived", partial(_arrived, counter, sent), LATE_S)
            counted = counter.call("counted")
            verify(f"frames {way} that the counter had no room for", counted["no_room"], 0)
            moves.sent += sent
            moves.lost += sent - counted["different"]
            moves.doubled += counted["came"] - counted["different"]
            gaps += _gaps(sender, counter, way, sent)
        nic = self.vm.order("status")
        verify("frames that the guest's taps refused or swallowed", (nic["refused"], nic["swallowed"]), (0, 0))
        moves.gaps += told(load.name, gaps, self.moves, self.drops())

    def drops(self) -> list[str]:
        """What the ports that are there have dropped: host, state, reason, frames."""
        ports = [(host, port) for host in HOSTS for port in self.cluster.ports(host)]
        return [
            f"{host} {port.instance.state} {reason} {count}"
            for host, port in ports
            for reason, count in port.drops.items()
            if count
        ]

    def fill(self, load: Load) -> None:
        """Give the VM its table."""
        request = pb.VmRequest(vm=self.vm.uuid)
        stub = self.cluster.agent_stub("h1")
        before = b"".join(part.data for part in stub.Checkpoint(request, timeout=60))
        data = _with_connections(before, load.entries, self.vm.address)
        parts = [pb.RestoreChunk(data=data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
        stub.Restore(iter([pb.RestoreChunk(head=pb.RestoreHead()), *parts]), timeout=120)
        wait_until("all connections are there", lambda: self.tracked("h1") >= load.entries, 20.0)

    def tracked(self, host: str) -> int:
        """Connections of the VM on a host."""
        return sum(port.connections for port in self.cluster.ports(host) if port.instance.vm == self.vm.uuid)

    def _worker(self, machine: Machine, what: str) -> Worker:
        lab, title = self.cluster, f"{machine.name}-{what}"
        namespace, log = lab.name(machine.name), lab.directory / f"{title}.log"
        worker = Worker(title, namespace, "bench.crowd", {"device": GUEST_DEVICE}, log)
        lab.adopt(worker)
        return worker


@contextmanager
def stage(load: Load) -> Iterator[Stage]:
    """Two hosts with agents, a VM at the first with its table, and frames both ways."""
    network = {"name": NETWORK, "kind": "uplink", "uplink": "up0"}
    with Cluster(HOSTS, [network], migration_options={"redirect_idle_s": 1.0}) as cluster:
        cluster.apply(policies=[POLICY])
        vm = add_vm(
            cluster,
            "vm",
            "h1",
            [Port("02:00:00:00:00:01", NETWORK, ("10.1.0.1",), silent=("10.1.128.1",))],
            policy="bench",
            behaviour={"memory_ms": MEMORY_MS, "swallow": False},
            connections_max=max(65_536, 2 * load.entries + STAGE_S * load.new),
            timeouts_ms={"udp": UDP_TIMEOUT_MS},
        )
        outside = add_outsider(
            cluster, "out", Port("02:00:00:00:00:02", NETWORK, ("10.1.0.2",), silent=("10.1.128.2",))
        )
        cluster.declare(vm)
        place = Stage(cluster, vm, outside)
        place.fill(load)
        place.begin(load)
        yield place


def _with_connections(before: bytes, count: int, address: str) -> bytes:
    """A snapshot with that many connections in its table."""
    reader = SnapshotReader(io.BytesIO(before))
    tables = [(section.port, section.table) for section in reader if section.table and section.kind != "conntrack"]
    header = reader.header
    tables.append((header.ports[0], Table("conntrack", columns=connections(count, address), port_time_ns=HOUR_NS)))
    kinds = {name: KindInfo(info.version, info.optional) for name, info in header.kinds.items()}
    whole = Header(header.vm, header.source, header.driver, kinds, header.ports, header.rules_max, header.connections)
    return b"".join(snapshot(whole, tables))


def _gaps(sender: Worker, counter: Worker, way: str, sent: int) -> list[Gap]:
    runs = counter.call("missing", sent=sent)["runs"]
    times = sender.call("when", numbers=[first for first, _ in runs])["times"]
    return [Gap(way, first, last, at) for (first, last), at in zip(runs, times, strict=True)]


def _arrived(counter: Worker, sent: int) -> bool:
    return bool(counter.call("counted")["different"] >= sent)
