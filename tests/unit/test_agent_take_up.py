"""What a crash left unfinished at a port, and the driver's books do not know."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from datapath.provider import PortState
from migrator.agent.source import SourceEnd
from migrator.lifecycle.source_words import Phase
from tests.unit.pair import MACS, VM, eventually, world
from tests.unit.test_rules_agent import reach


def test_a_port_that_was_rolled_back_and_is_quiesced_again_opens(tmp_path: Path) -> None:
    """The host crashed before the end of the move was in the driver's books; the agent's own say that it has ended."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            await w.outage()
            driver = w.agents["a"].driver
            for ref in w.active("a"):
                driver.hold(ref)
                driver.quiesce(ref)
            assert {status.state for status in w.statuses("a")} == {PortState.QUIESCED}
            await w.recover()
            await eventually(lambda: len(w.active("a")) == len(MACS), 30.0)
            assert {status.gate for status in w.statuses("a")} == {"local"}

    asyncio.run(scenario())


def test_a_source_that_is_rebooted_right_after_the_switchover_stays_shut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's books say that its ports are active: found by `coordinator.open+reboot-A` of the crash matrix."""

    async def nothing(*_: object) -> None:
        pass

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            with monkeypatch.context() as patch:
                patch.setattr(SourceEnd, "_settle", nothing)
                migration = await w.migrate("b")
                await reach(w, "a", Phase.SETTLING)
                switch = w.driver("a").switch
                await w.stop("a")
            for port in switch.ports.values():
                switch.activate(port)
            await w.stop("b")
            await w.agent("a")
            assert {status.state for status in w.statuses("a")} == {PortState.QUIESCED}
            await w.start("b")
            assert (await w.finish(migration)).outcome in {"complete", "degraded"}  # the accounting may be late
            await w.quiet()
            assert not [status for status in w.statuses("a") if status.ref.vm == VM]
            assert len(w.active("b")) == len(MACS)

    asyncio.run(scenario())


def test_a_destination_that_is_rebooted_right_after_it_opened_opens_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's books say that its ports are staged: found by `destination.open+reboot-B` of the crash matrix."""

    async def nothing(*_: object) -> None:
        pass

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            with monkeypatch.context() as patch:
                patch.setattr(SourceEnd, "_settle", nothing)
                migration = await w.migrate("b")
                await reach(w, "a", Phase.SETTLING)
                switch = w.driver("b").switch
                await w.stop("a")
                await w.stop("b")
            for port in switch.ports.values():
                port.state, port.gate = PortState.STAGED, "none"
            await w.agent("b")
            assert {status.state for status in w.statuses("b")} == {PortState.ACTIVE}
            await w.start("a")
            assert (await w.finish(migration)).outcome in {"complete", "degraded"}  # the accounting may be late
            await w.quiet()
            assert {(status.state, status.gate) for status in w.statuses("b")} == {(PortState.ACTIVE, "local")}

    asyncio.run(scenario())
