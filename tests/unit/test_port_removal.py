"""A port that the operator removed goes from the switch, whatever its agent was busy with, or if it was away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from datapath.provider import PortState
from migrator._pb import migrator_pb2 as pb
from tests.unit.pair import MACS, VM, eventually, world
from tests.unit.scripted import MAC, Agent, Bench, configuration
from tests.unit.scripted import VM as SHOP

REMOVAL = pb.Removal(sort="port", name=f"{SHOP}/{MAC}")
HERE = pb.Instance(vm=SHOP, mac=MAC, epoch=1, state="active")


def test_a_port_goes_though_the_redirect_of_an_earlier_move_is_still_here(tmp_path: Path) -> None:
    """A→B→A: the first move's stub is in hand at A, and the port that is removed is another instance."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", redirect_idle_s=60.0) as w:
            for host in ("b", "a"):
                assert (await w.finish(await w.migrate(host))).outcome == "complete"
            assert any(status.state is PortState.STUB for status in w.statuses("a"))
            for mac in MACS:
                w.cluster.remove(pb.Removal(sort="port", name=f"{VM}/{mac}"))
            await eventually(lambda: not w.active("a"), 1.0)
            assert {status.state for status in w.statuses("a")} == {PortState.STUB}

    asyncio.run(scenario())


def test_a_port_that_takes_part_in_a_migration_goes_when_that_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is dead, so the destination waits for its accounting; the coordinator waits no longer."""
    monkeypatch.setattr("migrator.coordinator.removals.RETRY_S", 0.1)

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", settle_s=1.0) as w:
            w.cluster.migrations._execution.deadlines = w.cluster._deadlines.model_copy(update={"settle_s": 0.2})
            w.hypervisor.downtime_s = 0.3
            migration = await w.migrate("b")
            await eventually(lambda: any(end.state.phase == "committed" for end in w.agents["b"].ends))
            await w.stop("a")
            assert (await w.finish(migration)).outcome == "degraded"
            assert any(end.state.phase == "open" for end in w.agents["b"].ends)
            w.cluster.remove(pb.Removal(sort="port", name=f"{VM}/{MACS[0]}"))
            await eventually(lambda: [ref.mac for ref in w.active("b")] == [MACS[1]])
            assert not any(end.state.phase == "open" for end in w.agents["b"].ends)

    asyncio.run(scenario())


def test_an_agent_that_refuses_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrator.coordinator.removals.RETRY_S", 0.05)

    async def scenario() -> None:
        async with Bench(tmp_path) as bench:
            a, _ = await bench.two_hosts()
            a.refuse.add("remove")
            await bench.stub.Remove(REMOVAL)
            await a.hear("remove", 3)
            a.refuse.clear()
            count = a.names().count("remove")
            told = await a.hear("remove", count + 1)
            assert (told.vm, told.mac, told.epoch) == (SHOP, MAC, 1)
            await bench.attach(again := Agent("h1", instances=[HERE]))
            assert (await bench.stub.Hosts(pb.Empty())).hosts
            assert "remove" not in again.names()  # it has been confirmed: whoever made it since wants it

    asyncio.run(scenario())


@pytest.mark.parametrize("restart", [False, True])
def test_rule_an_agent_that_was_away_is_told_when_it_comes(tmp_path: Path, restart: bool) -> None:
    async def scenario() -> None:
        async with Bench(tmp_path) as bench:
            a, b = await bench.two_hosts()
            a.stop()
            await eventually(lambda: len(bench.cluster.roster) == 1)
            await bench.stub.Remove(REMOVAL)
            if restart:
                await bench.kill()
                await bench.begin()
            another = pb.Instance(vm="00000000-0000-0000-0000-000000000001", mac=MAC, epoch=1, state="active")
            await bench.attach(back := Agent("h1", instances=[HERE, another]))
            told = await back.hear("remove")
            assert (told.vm, told.mac, told.epoch) == (SHOP, MAC, 1)
            assert back.names().count("remove") == 1
            assert b.host == "h2"

    asyncio.run(scenario())


def test_a_port_that_was_declared_anew_comes_when_the_old_one_has_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Bench(tmp_path) as bench:
            a, _ = await bench.two_hosts()
            a.stop()
            await eventually(lambda: len(bench.cluster.roster) == 1)
            await bench.stub.Remove(REMOVAL)
            await bench.stub.Apply(pb.ApplyRequest(config=configuration()))
            await bench.attach(back := Agent("h1", instances=[HERE]))
            assert (await back.hear("remove")).epoch == 1
            assert (await back.hear("port")).epoch == 2
            assert back.names().index("remove") < back.names().index("port")

    asyncio.run(scenario())
