"""What a look of a watch costs: dump a port's connections, put them together, compare them with the look before."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from bench.figures import Figures
from bench.tables import staged
from datapath.provider import PortRef
from datapath.registry import KINDS
from datapath.state.kind import Table
from migrator.watching.compare import compare, joined, take
from tests.contract.hosts import Host, ebpf_host

CHANGED = 20  # one of so many is another connection at the next look


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    for count in (1_000, 10_000) if quick else (1_000, 100_000, 1_000_000):
        _one_size(figures, count, 3 if quick else 7)
    return figures


def _one_size(figures: Figures, count: int, rounds: int) -> None:
    with ebpf_host() as host:
        ref = staged(host, count, 1)
        whole = _dumped(host, ref)
        assert len(whole) == count
        figures.add(f"dump of {count:,}", "ms of CPU", [_cpu_ms(lambda: _dumped(host, ref)) for _ in range(rounds)])
    after = _later(whole)
    assert len(compare(whole, after)) == 2 * len(range(0, count, CHANGED))
    for name, other in (("as before", whole), (f"1 of {CHANGED} another", after)):
        times = [_cpu_ms(lambda other=other: compare(whole, other)) for _ in range(rounds)]  # type: ignore[misc]
        figures.add(f"comparison of {count:,}, {name}", "ms of CPU", times)


def _dumped(host: Host, ref: PortRef) -> Table:
    return joined(KINDS["conntrack"], list(host.driver.dump(ref, "conntrack")))


def _later(whole: Table) -> Table:
    """The same in another order, with some connections ended and others begun."""
    after = take(whole, np.random.default_rng(1).permutation(len(whole)))
    assert after.columns is not None
    after.columns["id"][::CHANGED] += np.uint64(1)
    return after


def _cpu_ms(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)
