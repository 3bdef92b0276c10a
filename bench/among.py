"""One VM among many: checkpoint of its 1,000 connections while the host holds those of others.

Beside it `conntrack -L` of 1,000 connections that have a mark, or a zone, of their own among as many others: netlink
filters, but walks the whole table.
"""

from __future__ import annotations

from bench.figures import Figure, Figures, alternately, measured
from bench.netfilter import MARKED, ZONE, nf_conntrack
from bench.plot import Lines
from bench.tables import staged
from datapath.provider import PortRef
from migrator.checkpoint import checkpoint
from tests.contract.hosts import Host, ebpf_host

FILTERS = {"mark": ("-m", str(ZONE)), "zone": ("-w", str(ZONE))}


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    chart = Lines(f"{MARKED:,} connections of one VM", "connections of others", "ms")
    alone: dict[str, Figure] = {}
    for others in (0, 20_000) if quick else (0, 100_000, 1_000_000):
        for name, values in _times(others, 5 if quick else 15).items():
            figure = figures.add(f"{name}, beside {others:,}", "ms", values)
            alone.setdefault(name, figure)
            chart.add(name, max(others, MARKED), figure)
            if others:
                budget = "<1.2" if name == "ours" else ""
                ratio = figure.median / alone[name].median
                figures.add(f"{name}: beside {others:,} / alone", "x", [ratio], budget)
    figures.chart("others", chart)
    return figures


def _times(others: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds. Of ours CPU: what another process takes of this one's time is no property of the table."""
    with nf_conntrack(others, marked=True) as peer, ebpf_host() as host:  # see tables
        ref = staged(host, MARKED, 1)
        if others:
            staged(host, others, 1, last=2)
        peer.fill()
        works = {"ours": lambda: _ours(host, ref)}
        for name, options in FILTERS.items():
            works[f"conntrack -L, by {name}"] = lambda options=options: 1e3 * peer.listed(*options).cpu_s  # type: ignore[misc]
        return alternately(rounds, works)


def _ours(host: Host, ref: PortRef) -> float:
    took, data = measured(lambda: b"".join(checkpoint(host.driver, [ref], "bench", codec="none")))
    assert len(data) > 64 * MARKED
    return 1e3 * took.cpu_s
