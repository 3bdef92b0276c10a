# SPDX-License-Identifier: GPL-2.0-only
"""When a copy has converged: rounds are small, or as small as they get of a guest that is that busy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.agent.config import MigrationSection
from migrator.agent.copying import Batch, RoundTotal
from migrator.agent.report import Report
from migrator.agent.rounds import Rounds


class Changing:
    """A copier whose drains find so many records, one after the other; the last again and again."""

    def __init__(self, found: Iterable[int]) -> None:
        self.left = list(found)
        self.round = self.records = self.bytes = self.drains = 0
        self.dumped = True

    def begin(self) -> None: ...

    def chunk(self) -> Batch:
        return Batch(complete=True)

    def drain(self) -> Batch:
        self.drains += 1
        return Batch(complete=True, records=self.left.pop(0) if len(self.left) > 1 else self.left[0])

    def end_round(self) -> RoundTotal:
        self.round += 1
        return RoundTotal(self.round - 1, 0, 0)


def converged_after(found: list[int], drains: int, **settings: Any) -> int | None:
    """Drains until the copy has converged; None when it has not after so many."""
    copier, report = Changing(found), Report("m", "vm", 1, "a", "b")
    at: list[int] = []

    async def scenario() -> None:
        async def call(function: Any, *arguments: Any) -> Any:
            await asyncio.sleep(0)
            return function(*arguments)

        async def write(message: pb.FromSource) -> None:
            if message.WhichOneof("message") == "round_end":
                rounds.loaded(pb.RoundDone(round=message.round_end.round))

        def small() -> None:
            at.append(copier.drains)
            rounds.halt()

        def progress() -> None:
            if copier.drains >= drains:
                rounds.halt()

        section = MigrationSection(**settings)
        rounds = Rounds(copier, report, section, call=call, write=write, small=small, progress=progress)  # type: ignore[arg-type]
        rounds._tell = progress  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            await rounds.run()

    asyncio.run(scenario())
    return at[0] if at else None


@pytest.mark.parametrize(
    ("found", "after"),
    [
        ([0], 1),
        ([512], 1),
        ([5_000, 2_000, 700, 300], 4),
        ([5_000, 2_000, 1_700, 1_600], 3),  # shrinks no more
        ([900, 1_200], 2),
        ([60_000, 20_000, 19_000, 10_000, 9_000], 5),  # too many for a pause, at first
        ([20_000], None),
    ],
)
def test_a_copy_has_converged_when_its_rounds_are_as_small_as_they_get(found: list[int], after: int | None) -> None:
    assert converged_after(found, 40) == after


def test_how_many_that_may_be_is_the_operators() -> None:
    assert converged_after([900, 900], 40, steady_round=800) is None
    assert converged_after([900, 900], 40, small_round=1_000) == 1


def test_the_last_round_before_the_stop_says_so() -> None:
    """Also when nothing has changed: the destination is to be at it when the guest stands."""
    said: list[bool] = []
    copier, report = Changing([5, 0]), Report("m", "vm", 1, "a", "b")

    async def scenario() -> None:
        async def call(function: Any, *arguments: Any) -> Any:
            return function(*arguments)

        async def write(message: pb.FromSource) -> None:
            if message.WhichOneof("message") == "round_end":
                said.append(message.round_end.pausing)
                rounds.loaded(pb.RoundDone(round=message.round_end.round))

        rounds = Rounds(
            copier,  # type: ignore[arg-type]
            report,
            MigrationSection(),
            call=call,
            write=write,
            small=lambda: None,
            progress=lambda: None,
        )
        rounds.task = asyncio.create_task(rounds.run())
        async with asyncio.timeout(10):
            await rounds.near.wait()
            assert not any(said)
            before = len(said)
            await rounds.hurry()
            await rounds.halted()
        assert said[before] and not copier.left[0]

    asyncio.run(scenario())
