"""An operator changes marks and labels while the VM moves between agents: once and for all, or refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from datapath.errors import NotReady
from datapath.provider import PortRef, PortState
from datapath.state.kind import Columns
from migrator._pb import migrator_pb2 as pb
from migrator.agent.local import refs_of
from migrator.agent.relabelling import PIECE, Relabelling
from tests.unit.pair import MACS, VM, World, eventually, world

COUNT = 2 * PIECE + 100
EVERY = pb.RelabelRequest(vm=VM, mark="0x7", label="0x1/0x1")


def run(directory: Path, scenario: Callable[[World], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with world(directory, "a", "b") as w:
            w.fill("a", COUNT)
            await scenario(w)

    asyncio.run(whole())


def phase(w: World, host: str) -> str:
    return next((str(end.state.phase) for end in w.agents[host].ends.of(VM)), "")


async def relabel(w: World, host: str, change: Relabelling) -> None:
    """As the service Agent does it."""
    agent = w.agents[host]
    await change.carry_out(agent.around, await refs_of(agent, VM), agent.watching.switching)


def marked(w: World, host: str) -> int:
    """Connections at a host that have what is asked."""
    tables = [table for ref in w.active(host) for table in w.driver(host).dump(ref, "conntrack")]
    last = bytes(15) + b"\1"
    return sum(
        int(mark) == 7 and label == last
        for table in tables
        for mark, label in zip(table.columns["mark"], table.columns["label"].tolist(), strict=True)  # type: ignore[index]
    )


def interrupted(w: World, meanwhile: Callable[[], None]) -> list[int]:
    """`meanwhile` runs within the first piece that is changed. Returns the sizes of pieces as they are changed."""
    sizes: list[int] = []
    driver: Any = w.driver("a")
    change = driver.relabel

    def relabel_so(ref: PortRef, columns: Columns) -> int:
        sizes.append(len(columns["id"]))
        if len(sizes) == 1:
            meanwhile()
        return int(change(ref, columns))

    driver.relabel = relabel_so
    return sizes


def test_the_lane_does_other_things_in_between(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        order: list[int] = []
        others: list[asyncio.Task[None]] = []
        loop, agent, asked = asyncio.get_running_loop(), w.agents["a"], threading.Event()

        def ask() -> None:
            others.append(asyncio.ensure_future(agent.around.call(VM, lambda: order.append(len(sizes)))))
            loop.call_soon(asked.set)

        def meanwhile() -> None:
            loop.call_soon_threadsafe(ask)
            assert asked.wait(20)

        sizes = interrupted(w, meanwhile)
        change = Relabelling(EVERY)
        await relabel(w, "a", change)
        await asyncio.gather(*others)
        assert order == [1], "it waits for one piece, not for all"
        assert sizes == [PIECE, PIECE, 100] * len(MACS)
        assert change.matched == change.changed == marked(w, "a") == COUNT * len(MACS)

    run(tmp_path, scenario)


def test_what_was_changed_when_the_switchover_begins_goes_along(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.converged = False
        migration = await w.migrate("b")
        await eventually(lambda: phase(w, "a") == "watching", 20.0)
        begun = threading.Event()
        source = next(iter(w.agents["a"].ends.of(VM)))

        def meanwhile() -> None:
            w.hypervisor.converged = True
            assert begun.wait(20)

        async def look() -> None:
            await eventually(lambda: str(source.state.phase) == "holding", 20.0)
            begun.set()

        interrupted(w, meanwhile)
        looking = asyncio.ensure_future(look())
        change = Relabelling(EVERY)
        with pytest.raises(
            NotReady, match=f"just being switched over.*{PIECE} connections were changed before"
        ) as error:
            await relabel(w, "a", change)
        assert error.value.hint == "do it again when the VM has moved, on the host where it is then"
        await looking
        assert (await w.finish(migration)).outcome == "complete"
        assert marked(w, "b") == PIECE
        again = Relabelling(EVERY)
        await relabel(w, "b", again)
        assert marked(w, "b") == again.changed == COUNT * len(MACS)

    run(tmp_path, scenario)


def test_it_is_refused_at_both_ends_while_the_guest_stands(tmp_path: Path) -> None:
    """Where nothing matches, too: that says nothing of what the VM has."""

    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 1.0
        migration = await w.migrate("b")
        await eventually(lambda: phase(w, "b") == "committed", 20.0)
        nothing = pb.RelabelRequest(vm=VM, mark="1", matches=[pb.FieldMatch(field="lport", values=["1"])])
        for host, state in (("a", PortState.QUIESCED), ("b", PortState.STAGED)):
            with pytest.raises(NotReady, match=f"port {MACS[0]} is {state} here"):
                await relabel(w, host, Relabelling(nothing))
        assert (await w.finish(migration)).outcome == "complete"
        assert marked(w, "b") == 0

    run(tmp_path, scenario)
