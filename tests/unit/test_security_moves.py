# SPDX-License-Identifier: GPL-2.0-only
"""What a guest can do to its own move: keep it from converging, and no more than that."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

from datapath.provider import PortRef
from datapath.state.kind import Table

from .pair import World, connections, world

TIMEOUT_S = 2.0


def flooding(w: World) -> Callable[[], None]:
    """A guest that has opened new connections whenever the agent looks what changed. Returns what ends it."""
    driver, seeds = w.driver("a"), itertools.count(1000, 50)
    drain = driver.drain

    def flooded(ref: PortRef) -> list[Table]:
        driver.load(ref, Table("conntrack", columns=connections(50, next(seeds))))
        return drain(ref)

    driver.drain = flooded  # type: ignore[method-assign]
    return lambda: setattr(driver, "drain", drain)


def test_a_guest_that_keeps_its_move_from_converging_stays_where_it_is(tmp_path: Path) -> None:
    """By the move's deadline; and it can be moved when it has stopped."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", small_round=10, steady_round=40, drain_interval_s=0.01) as w:
            w.fill("a", 100)
            end = flooding(w)
            report = await w.finish(await w.migrate("b", timeout_s=TIMEOUT_S), 60)
            end()
            assert report.outcome == "aborted", report
            assert len(w.active("a")) == 2
            assert w.hypervisor.place == "a" and not w.hypervisor.moving
            await w.quiet()
            assert not w.statuses("b")
            before = w.connections("a")
            assert (await w.finish(await w.migrate("b"), 60)).outcome == "complete"
            assert w.connections("b") == before

    asyncio.run(scenario())
