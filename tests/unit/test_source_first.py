# SPDX-License-Identifier: GPL-2.0-only
"""What comes to the destination by itself waits for the frames that the source passed on, and not only for its word."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datapath.provider import PortRef, Pumped
from migrator.agent import destination
from migrator.agent.destination import PASSED_ON_S, SOURCE_FIRST_S

from .pair import MACS, World, world

SENT = 5


def watched(w: World, came: Callable[[int], int]) -> list[tuple[int, float]]:
    """The source has redirected SENT frames of each port; `came(n)`: how many are there when asked for the n-th time.
    For each port that is let go: how often it was asked before, and for how long."""
    source, there = w.driver("a"), w.driver("b")
    asked: list[float] = []
    released: list[tuple[int, float]] = []

    def passed_on(_: PortRef) -> tuple[int, int]:
        asked.append(time.monotonic())
        return 0, came(len(asked))

    def set_broadcast(ref: PortRef, on: bool) -> Pumped:
        released.append((len(asked), time.monotonic() - asked[0]))
        return type(there).set_broadcast(there, ref, on)

    source.passed_on = lambda _: (SENT, 0)  # type: ignore[method-assign]
    there.passed_on = passed_on  # type: ignore[method-assign]
    there.set_broadcast = set_broadcast  # type: ignore[method-assign]
    return released


@pytest.mark.parametrize("lost", [False, True], ids=["all come", "one is lost"])
def test_rule_the_frames_of_the_source_come_first(tmp_path: Path, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not lost:  # however slowly the machine asks
        monkeypatch.setattr(destination, "PASSED_ON_S", 30.0)

    async def scenario() -> list[tuple[int, float]]:
        async with world(tmp_path, "a", "b") as w:
            released = watched(w, lambda asked: min(asked, SENT - 1) if lost else asked)
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == "complete"
            await w.quiet()
            return released

    released = asyncio.run(scenario())
    first, waited_s = released[0]
    assert len(released) >= len(MACS)
    assert first >= SENT, "let go before all had come"
    if lost:
        assert PASSED_ON_S * 0.95 <= waited_s < SOURCE_FIRST_S  # it is measured from a little later
