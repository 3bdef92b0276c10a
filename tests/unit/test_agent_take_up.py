"""What a crash left unfinished at a port that takes part in no migration any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

from datapath.provider import PortState
from tests.unit.pair import MACS, eventually, world


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
