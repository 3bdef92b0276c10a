"""A source that leads stops no guest before the destination's switch has the devices that it will run on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from migrator.agent.daemon import Agent
from migrator.agent.destination import DestinationEnd
from tests.unit.pair import eventually, world

DEVICES = ("tap1", "tap2")


def test_the_guest_is_stopped_when_the_destination_has_its_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrator.agent.destination.DEVICES_S", 60.0)
    asked: list[str] = []

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            for device in DEVICES:
                w.driver("b").switch.plug(device, False)
            migration = await w.migrate("b")
            end = await waiting(w.agents["b"])
            has_devices = end._has_devices

            def counted() -> bool:
                asked.append("")
                return has_devices()

            monkeypatch.setattr(end, "_has_devices", counted)
            for device in DEVICES:
                asked.clear()
                await eventually(lambda: len(asked) > 3, 30.0)
                assert w.hypervisor.running and w.hypervisor.place == "a"
                w.driver("b").switch.plug(device, True)
            assert (await w.finish(migration, 30.0)).outcome == "complete"

    asyncio.run(scenario())


def test_a_device_that_does_not_come_keeps_no_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrator.agent.destination.DEVICES_S", 0.05)

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            for device in DEVICES:
                w.driver("b").switch.plug(device, False)
            assert (await w.finish(await w.migrate("b"), 30.0)).outcome == "complete"

    asyncio.run(scenario())


async def waiting(agent: Agent) -> DestinationEnd:
    """The end that loads, as soon as there is one."""
    found: list[DestinationEnd] = []

    def loads() -> bool:
        found[:] = [end for end in agent.ends if isinstance(end, DestinationEnd) and end.state.phase == "loading"]
        return bool(found)

    await eventually(loads, 30.0)
    return found[0]
