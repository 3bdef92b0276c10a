# SPDX-License-Identifier: GPL-2.0-only
"""`migrator demo`: a VM moves between two hosts under traffic, first without its network state, then with it.

Everything runs in network namespaces of this machine and is gone at the end.
"""

from __future__ import annotations

import json as formats
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from migrator._pb import migrator_pb2 as pb
from migrator.lab import outcome
from migrator.lab import plot as picture
from migrator.lab.cluster import Cluster
from migrator.lab.scene import NETWORK, POLICY, SAMPLE_S, Scene

CONNECTIONS = 1000
ENTRIES = 100_000
LEAD_S = 1.5  # traffic before a move and after it, for the picture
LOST_AFTER_S = 6.0  # a connection that is silent for so long is lost
PARTS = ("held", "drained", "committed", "resumed", "open")


@dataclass
class Move:
    """What one move did: one column of the table, one object of the JSON."""

    source: str
    destination: str
    outcome: str
    connections_total: int
    connections_lost: int
    bytes_verified: int
    probes_sent: int
    probes_lost: int
    frames_duplicated: int
    entries_moved: int
    rounds: int
    switchover_ms: float  # guest stopped -> first frame judged and delivered at the destination
    snapshot_bytes: int
    parts_ms: dict[str, float] = field(default_factory=dict)  # of the switchover
    times_ms: dict[str, float] = field(default_factory=dict)  # all that the agents measured
    warnings: list[str] = field(default_factory=list)


@dataclass
class Rates:
    """Checkpoint and restore of the whole VM through its agent: dump or load, digests, compression and RPC."""

    entries: int
    checkpoint_entries_per_s: float
    restore_entries_per_s: float


def main(
    *, json: bool = False, plot: Path | None = None, connections: int = CONNECTIONS, entries: int = ENTRIES
) -> int:
    """Run it, print the table (or one JSON object); 0 when nothing was lost with state and much without."""
    console = Console(stderr=json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves by the same door
    network = {"name": NETWORK, "kind": "uplink", "vlan": 0, "uplink": "up0"}
    console.print(f"two hosts, one VM, {connections} connections, {entries} background entries, default-drop policy")
    with Cluster(("h1", "h2"), [network], migration_options={"redirect_idle_s": 1.0}) as cluster:
        cluster.apply(policies=[POLICY])
        console.print("moving without state …")
        without, bare, _ = _run(cluster, 1, ["h2"], connections, entries, without_state=True)
        console.print("moving with state, there and back …")
        with_state, full, rates = _run(cluster, 2, ["h2", "h1"], connections, entries, without_state=False)
    if plot:
        picture.write(plot, [bare, full])
    if json:
        moves = {"without_state": asdict(without[0]), "with_state": [asdict(move) for move in with_state]}
        print(formats.dumps({**moves, "rates": asdict(rates)}))
    else:
        outcome.show(console, without[0], with_state, rates)
    return 0 if outcome.convincing(without[0], with_state) else 1


def _run(
    cluster: Cluster, number: int, route: list[str], connections: int, entries: int, *, without_state: bool
) -> tuple[list[Move], picture.Panel, Rates]:
    """One VM along a route."""
    with cluster.scope():
        scene = Scene(cluster, connections, entries)
        scene.begin(number)
        begin = time.monotonic()
        scene.watch(LEAD_S)
        moves, stops = [], []
        for destination in route:
            moves.append(_move(scene, destination, without_state=without_state))
            stops.append(scene.vm.order("status")["times"]["stopped"] - begin)
            scene.watch(LEAD_S)
        panel = _panel(scene, begin, stops, route, without_state=without_state)
        rates = _rates(scene, route[-1])
        cluster.withdraw(scene.vm)
    return moves, panel, rates


def _move(scene: Scene, destination: str, *, without_state: bool) -> Move:
    source = scene.vm.place()
    before, verified = scene.probe_counts(), scene.verified()
    report, times = scene.move(destination, without_state=without_state)
    checked = scene.check(LOST_AFTER_S)
    after = scene.probe_counts()
    return Move(
        source,
        destination,
        report.outcome,
        connections_total=checked["total"],
        connections_lost=checked["lost"],
        bytes_verified=checked["bytes"] - verified,
        probes_sent=after["sent"] - before["sent"],
        probes_lost=after["lost"] - before["lost"],
        frames_duplicated=after["doubled"] - before["doubled"],
        entries_moved=report.moved.get("conntrack", 0),
        rounds=report.rounds,
        switchover_ms=round((times["first_frame"] - times["stopped"]) * 1e3, 3),
        snapshot_bytes=len(scene.checkpoint(destination)),
        parts_ms=_parts(report, times),
        times_ms={name: round(value, 3) for name, value in sorted(report.times_ms.items())},
        warnings=list(report.warnings),
    )


def _parts(report: pb.Migration, times: dict[str, float]) -> dict[str, float]:
    """Parts of the switchover. Held begins before the guest stops; drained and committed count from the stop."""
    agents = report.times_ms
    parts = {
        "held": agents.get("hold", 0.0) + agents.get("idle_wait", 0.0),
        "drained": agents.get("quiesce", 0.0) + agents.get("drain", 0.0),
        "committed": agents.get("committed", 0.0),
        "resumed": (times["resumed"] - times["stopped"]) * 1e3,
        "open": agents.get("open", 0.0),
    }
    return {name: round(value, 3) for name, value in parts.items()}


def _rates(scene: Scene, host: str) -> Rates:
    """Take a snapshot of the VM and put it back in its place: after all else was counted."""
    entries, began = scene.tracked(host), time.monotonic()
    snapshot = scene.checkpoint(host)
    taken = time.monotonic()
    scene.restore(host, snapshot)
    restored = time.monotonic()
    return Rates(entries, round(entries / (taken - began)), round(entries / (restored - taken)))


def _panel(scene: Scene, begin: float, stops: list[float], route: list[str], *, without_state: bool) -> picture.Panel:
    sent, missing = scene.probe_times()
    end = scene.samples[-1].time - begin
    slots = [n * SAMPLE_S for n in range(int(end / SAMPLE_S))]

    def share(slot: float) -> float:
        due = [n for n, when in enumerate(sent) if slot <= when - begin < slot + SAMPLE_S]
        return sum(n not in missing for n in due) / len(due) if due else 1.0

    return picture.Panel(
        "without state: every connection dies" if without_state else "with state",
        [s.time - begin for s in scene.samples],
        [s.alive for s in scene.samples],
        scene.connections,
        slots,
        [share(slot) for slot in slots],
        [(s, f"moved to {d}") for s, d in zip(stops, route, strict=True)],
    )
