"""Checkpoint and restore of a VM's connections, end to end: kernel map to snapshot bytes and back.

Beside them, in turns and with the same connections in nf_conntrack of a namespace of its own, what a user would
otherwise use: `conntrack -L` (plain, and as text that `-R` reads), `conntrack -R`, pyroute2's conntrack class, and the
kernel's own netlink messages copied and given back, which is the bound of any program that goes this way. Each
workload is counted before its time is used.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from bench.figures import Figure, Figures, Took, measured, verify
from bench.netfilter import Netfilter, nf_conntrack
from bench.netlink import PYROUTE2_LOADS
from bench.plot import Lines
from bench.workload import HOUR_NS, connections
from datapath.provider import PortRef
from datapath.state.kind import Table
from migrator.checkpoint import checkpoint
from migrator.snapshot import SnapshotReader
from tests.contract.hosts import Host, ebpf_host

PYROUTE2_MOST = 10_000
"""It takes a millisecond an entry: once, and no more of them."""
OURS = ("checkpoint", "restore")
BUDGETS = {"checkpoint": (">2e6", "conntrack -L", ">8"), "restore": (">6e5", "conntrack -R", ">6")}


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    charts = {what: Lines(f"{what} of a connection table", "connections", "entries/s") for what in OURS}
    for count in (1_000, 10_000) if quick else (1_000, 10_000, 100_000, 1_000_000):
        _report(figures, charts, count, _one_size(count, 2 if count > 100_000 else 3 if quick else 5))
    for what, chart in charts.items():
        figures.chart(what, chart)
    figures.notes.append(
        f"pyroute2 was asked once, to list at most {PYROUTE2_MOST:,} and to make at most {PYROUTE2_LOADS:,}; "
        "netlink's copy is of messages that were made before: the bound of any such program"
    )
    return figures


def staged(host: Host, count: int, epoch: int, *, last: int = 1, limit: int = 0) -> PortRef:
    """A port that holds `count` connections."""
    mac = f"02:00:00:00:00:{last:02x}"
    ref = host.stage(epoch, mac=mac, connections_max=limit or max(2 * count, 65_536))
    loaded = host.driver.load(ref, Table("conntrack", columns=connections(count), port_time_ns=HOUR_NS))
    verify("connections loaded", loaded.loaded, count)
    return ref


@dataclass
class Size:
    """What each way took, round by round, and bytes of a snapshot by codec."""

    took: dict[str, list[Took]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, took: Took) -> None:
        self.took.setdefault(name, []).append(took)


def _one_size(count: int, rounds: int) -> Size:
    size = Size()
    with nf_conntrack(count) as peer, ebpf_host() as host:  # its thread leaves the namespace of the limits
        ref = staged(host, count, 1)
        for number in range(-1 if count <= 100_000 else 0, rounds):  # the first is to warm up
            kept = size if number >= 0 else Size()
            _ours(kept, host, ref, count, 3 + number)
            _peers(kept, peer)
        if count <= PYROUTE2_MOST:
            _netlink(size, peer, "pyroute2")
    return size


def _ours(size: Size, host: Host, ref: PortRef, count: int, epoch: int) -> None:
    for name, codec in (("checkpoint, compressed", "zstd"), ("checkpoint", "none")):
        took, data = measured(lambda codec=codec: _snapshot(host, ref, codec))  # type: ignore[misc]
        size.add(name, took)
        size.sizes[codec] = len(data)
    target = host.stage(epoch, mac="02:00:00:00:00:02", connections_max=max(2 * count, 65_536))
    took, loaded = measured(lambda: _restored(host, data, target))
    verify("connections restored", loaded, count)
    size.add("restore", took)
    host.driver.purge(target)


def _peers(size: Size, peer: Netfilter) -> None:
    size.add("conntrack -R", peer.fill())
    size.add("conntrack -L", peer.listed())
    size.add("conntrack -L -o save", peer.listed("-o", "save"))
    _netlink(size, peer, "raw")


def _netlink(size: Size, peer: Netfilter, how: str) -> None:
    for what, took in peer.netlink(how).items():
        size.add(f"{'netlink copy' if how == 'raw' else how}, {what}", took)


def _snapshot(host: Host, ref: PortRef, codec: str) -> bytes:
    return b"".join(checkpoint(host.driver, [ref], "bench", codec=codec))


def _restored(host: Host, data: bytes, ref: PortRef) -> int:
    loaded = 0
    for section in SnapshotReader(io.BytesIO(data)):
        if section.kind == "conntrack" and section.table is not None:
            loaded += host.driver.load(ref, section.table).loaded
    return loaded


def _report(figures: Figures, charts: dict[str, Lines], count: int, size: Size) -> None:
    large = count >= 100_000
    rates: dict[str, Figure] = {}
    for name, took in size.took.items():
        budget = BUDGETS[name][0] if name in BUDGETS and large else ""
        rates[name] = figures.add(f"{name} {count:,}", "entries/s", [count / one.wall_s for one in took], budget)
        loads = name in ("restore", "conntrack -R") or name.endswith("load")
        charts["restore" if loads else "checkpoint"].add(name, count, rates[name])
    for what, (_, tool, budget) in BUDGETS.items():
        figures.ratio(f"{what} {count:,}: ours / {tool}", rates[what], rates[tool], budget if large else "")
    for name, took in size.took.items():
        figures.add(f"{name} {count:,}: CPU", "ns an entry", [1e9 * one.cpu_s / count for one in took])
        if large:
            figures.add(f"{name} {count:,}: memory", "MiB", [one.peak / (1 << 20) for one in took])
    limit = ("<110", "<25") if large else ("", "")
    figures.add(f"bytes a connection {count:,}", "B", [size.sizes["none"] / count], limit[0])
    figures.add(f"bytes a connection {count:,}, compressed", "B", [size.sizes["zstd"] / count], limit[1])
