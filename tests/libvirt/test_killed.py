# SPDX-License-Identifier: GPL-2.0-only
"""Daemons killed at each call of the hook and in each phase of a move that libvirt makes, and started again.

Whatever died: the guest runs on one host, its connections live, nothing of it is left on the other host, and the next
move works.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns import standing

from .bench import Bench, Kept, killable
from .hooked import Moving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benches() -> Iterator[Kept[Bench]]:
    kept = Kept(killable)
    yield kept
    kept.drop()


@pytest.mark.parametrize(
    ("point", "killed"),
    [
        ("hook.migrate", "h2"),
        ("hook.migrate", "h1"),
        ("hook.migrate", "coordinator"),
        ("hook.prepare", "h2"),
        ("hook.prepare", "h1"),
        ("hook.start", "h2"),
        ("hook.started", "h2"),
        ("source.watching", "h1"),
        ("source.draining", "h1"),
        ("source.draining", "h2"),
        ("source.final", "h1"),
        ("destination.committing", "h2"),
        ("destination.committed", "h2"),
        ("destination.opening", "h2"),
        ("source.redirecting", "h1"),
        ("source.settling", "coordinator"),
    ],
)
def test_a_daemon_dies(bench: Bench, point: str, killed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(standing.BY_ROLE, "hook", "h2")
    bench.go_home()
    daemon = bench.cluster.daemon(killed)
    with bench.cluster.standing(point):
        moving = Moving(bench.guest, "h2")
        bench.cluster.wait_for(point)
        daemon.kill()
    moving.join()
    bench.cluster.restart(daemon)
    assert bench.guest.place() == ("h1" if moving.error is not None else "h2"), moving.error
    bench.settled()
    bench.traffic.check()
