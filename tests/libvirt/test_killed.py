# SPDX-License-Identifier: GPL-2.0-only
"""Daemons killed at each call of the hook and in each phase of a move that libvirt makes, and started again.

Whatever died: the guest runs on one host, its connections live, nothing of it is left on the other host, and the next
move works. The matrix is made of the machines' own phases: one that is new is in it by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import libvirt
import pytest

from migrator import faults
from tests.netns import standing

from .bench import Bench, Kept, killable
from .hooked import LIVE, UNHURRIED, Moving

pytestmark = pytest.mark.slow
HOOKS = {"h1": ("stopped", "release"), "h2": ("migrate", "prepare", "start", "started")}
"""Operations of the hook in a move from h1 to h2, each at its host."""
DAEMONS = ("h1", "h2", "coordinator")
ELSEWHERE = {  # phases that a move does not come to when nothing goes wrong
    "source": {"drained", "aborting", "aborted", "released"},
    "destination": {"fenced", "waiting", "settled", "aborted"},
    "coordinator": {"closed", "aborting", "aborted", "in-doubt"},
}
PHASES = [f"{role}.{phase}" for role in faults.PHASES for phase in faults.PHASES[role] if phase not in ELSEWHERE[role]]
AT_THE_PAUSE = ("source.suspending", "source.draining", "source.final", "source.redirecting", "source.settling")
COMMITTING = ("destination.committing", "destination.committed", "destination.opening")
CASES = [
    *((f"hook.{operation}", host, daemon) for host in HOOKS for operation in HOOKS[host] for daemon in DAEMONS),
    *((point, "", standing.BY_ROLE[point.partition(".")[0]]) for point in PHASES),
    *((point, "", "h2") for point in AT_THE_PAUSE),
    *((point, "", "h1") for point in COMMITTING),
]


@pytest.fixture(scope="module")
def benches() -> Iterator[Kept[Bench]]:
    """The agent stops the guest in QEMU's first pass over its memory."""
    kept = Kept(partial(killable, max_passes="1"))
    yield kept
    kept.drop()


def move(bench: Bench) -> Moving:
    return Moving(bench.guest, "h2", LIVE, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: UNHURRIED})


@pytest.mark.parametrize(("point", "host", "killed"), CASES, ids=lambda value: value)
def test_a_daemon_dies(bench: Bench, point: str, host: str, killed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(standing.BY_ROLE, "hook", host)
    bench.go_home()
    daemon = bench.cluster.daemon(killed)
    with bench.cluster.standing(point):
        moving = move(bench)
        bench.cluster.wait_for(point)
        daemon.kill()
    moving.join()
    bench.cluster.restart(daemon)
    assert bench.guest.place() == ("h1" if moving.error is not None else "h2"), moving.error
    bench.settled()
    bench.traffic.check()


def test_no_phase_of_a_move_is_left_out(bench: Bench) -> None:
    bench.go_home()
    record = bench.cluster.fault_file.with_suffix(".points")
    record.unlink(missing_ok=True)
    bench.cluster.fault_file.write_text(faults.RECORD)
    try:
        moving = move(bench)
        moving.join()
        assert moving.error is None
        bench.settled()
    finally:
        bench.cluster.fault_file.unlink()
    passed = set(record.read_text().split())
    phases = {point for point in passed if point.partition(".")[0] in faults.PHASES and point.count(".") == 1}
    hooks = {point for point in passed if point.startswith("hook.")}
    ends = {"source.released", "destination.settled", "coordinator.closed"}  # nothing is to come any more
    assert phases - ends == set(PHASES)
    assert hooks == {f"hook.{operation}" for operations in HOOKS.values() for operation in operations}
