"""A VM moves between agents with switches in memory: everything but the kernel is real."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from datapath.provider import PortRef
from migrator._pb import migrator_pb2 as pb
from migrator.agent.stream import PeerStream
from tests.unit.pair import MACS, Side, eventually, world


def test_all_ports_and_all_state_move_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 1000)
            before = w.connections("a")
            report = await w.finish(await w.migrate("b"))
            assert (report.outcome, list(report.warnings)) == ("complete", []), report
            assert report.leading
            assert report.moved["conntrack"] == 2000
            assert not report.not_moved
            assert not w.active("a")
            assert [ref.mac for ref in w.active("b")] == list(MACS)
            assert w.connections("b") == before
            await w.quiet()
            assert not w.statuses("a")

    asyncio.run(scenario())


def test_there_and_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 100)
            before = w.connections("a")
            for to in ("b", "a", "b", "a"):
                report = await w.finish(await w.migrate(to))
                assert report.outcome == "complete", report
                await eventually(lambda to=to: len(w.active(to)) == 2)
            assert w.connections("a") == before
            await w.quiet()
            assert {ref.epoch for ref in w.active("a")} == {report.epoch}
            assert not w.statuses("b")

    asyncio.run(scenario())


def test_without_a_hypervisor_the_commit_is_the_resume(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b", guests="none") as w:
            w.fill("a", 10)
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == "complete", report
            assert len(w.active("b")) == 2

    asyncio.run(scenario())


def test_without_state_the_tables_stay_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 10)
            report = await w.finish(await w.migrate("b", without_state=True))
            assert report.outcome == "complete", report
            assert w.connections("b") == {mac: set() for mac in MACS}
            rules = [len(t) for ref in w.active("b") for t in w.driver("b").dump(ref, "acl")]
            assert rules == [1, 1]

    asyncio.run(scenario())


def test_a_guest_that_comes_back_gets_its_ports_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 10)
            before = w.connections("a")
            w.hypervisor.fail = True
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == "aborted", report
            assert w.connections("a") == before
            await w.quiet()
            assert not w.statuses("b")
            w.hypervisor.fail = False
            assert (await w.finish(await w.migrate("b"))).outcome == "complete"

    asyncio.run(scenario())


def test_a_guest_that_stops_by_itself_is_followed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 10)
            w.hypervisor.converged = False
            before = w.connections("a")
            migration = await w.migrate("b")
            await eventually(lambda: any(end.state.phase == "watching" for end in w.agents["a"].ends))
            w.hypervisor.stop()
            report = await w.finish(migration)
            assert report.outcome == "complete", report
            assert not report.leading
            assert report.frames["may_be_lost"] == 2 * len(MACS)
            assert w.connections("b") == before

    asyncio.run(scenario())


def test_the_guest_does_not_stand_still_for_what_changed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has changed by the time its frames are held is at the destination when it is stopped."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", drain_interval_s=60.0) as w:
            w.fill("a", 10)
            w.hypervisor.converged = False
            migration = await w.migrate("b")
            await eventually(lambda: any(end.state.phase == "watching" for end in w.agents["a"].ends))
            w.fill("a", 20)
            there: list[int] = []
            suspend = Side.suspend

            async def suspended(side: Side, vm: str) -> None:
                refs = [status.ref for status in w.statuses("b")]
                there.extend(len(t) for ref in refs for t in w.driver("b").dump(ref, "conntrack"))
                await suspend(side, vm)

            monkeypatch.setattr(Side, "suspend", suspended)
            w.hypervisor.converged = True
            assert (await w.finish(migration)).outcome == "complete"
            assert there == [20] * len(MACS)

    asyncio.run(scenario())


def test_an_operator_may_abort_while_memory_is_copied(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 10)
            w.hypervisor.converged = False
            migration = await w.migrate("b")
            await eventually(lambda: any(end.state.phase == "watching" for end in w.agents["a"].ends))
            w.cluster.migrations.abort(migration)
            report = await w.finish(migration)
            assert report.outcome == "aborted", report
            assert len(w.active("a")) == 2
            assert w.hypervisor.place == "a" and not w.hypervisor.moving
            await w.quiet()
            assert not w.statuses("b")

    asyncio.run(scenario())


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            report = await w.finish(await w.migrate("b", dry_run=True))
            assert report.outcome == "complete", report
            await w.quiet()
            assert len(w.active("a")) == 2
            assert not w.statuses("b")

    asyncio.run(scenario())


def test_a_destination_without_the_network_refuses(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.driver("b").set_network = lambda _: None  # type: ignore[method-assign]  # a late Sync brings it back
            w.driver("b").remove_network("blue")
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == "refused", report
            assert "blue" in report.reason
            assert len(w.active("a")) == 2
            await w.quiet()

    asyncio.run(scenario())


def test_the_guest_is_stopped_when_what_is_left_fits_the_wanted_downtime(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.hypervisor.needed_ms = 250
            short = await w.migrate("b", downtime_ms=249)
            await eventually(lambda: any(end.state.phase == "watching" for end in w.agents["a"].ends))
            w.cluster.migrations.abort(short)
            assert (await w.finish(short)).outcome == "aborted"
            await w.quiet()
            assert (await w.finish(await w.migrate("b", downtime_ms=250))).outcome == "complete"

    asyncio.run(scenario())


def test_the_ports_open_with_the_newest_rules_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's rules come after the coordinator's newer ones, and the guest never meets them."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            send, changed = PeerStream.send, asyncio.Event()

            async def late(stream: PeerStream, message: pb.FromSource) -> None:
                if message.HasField("section"):
                    await changed.wait()
                await send(stream, message)

            monkeypatch.setattr(PeerStream, "send", late)
            driver: Any = w.driver("b")
            opening, met = driver.open, []

            def watched(ref: PortRef, **options: Any) -> Any:
                rules = [rule for table in driver.dump(ref, "acl") for rule in table.records or ()]
                met.append([first for rule in rules for first, _ in rule["ports"]])
                return opening(ref, **options)

            driver.open = watched
            migration = await w.migrate("b")
            await eventually(lambda: any(str(end.state.phase) == "copying" for end in w.agents["a"].ends))
            rule = pb.Rule(direction="to", action="allow", protocol="tcp", ports=["80"], priority=10)
            w.cluster.apply(pb.ApplyRequest(config=pb.Config(policies=[pb.Policy(name="web", rules=[rule])])))
            revision = w.cluster.store.catalog.revisions["policy", "web"]
            arrival: Any = w.agents["b"].ends.destination(migration)
            await eventually(lambda: arrival.arrival.revision == revision)
            changed.set()
            running = w.cluster.migrations._execution.running[migration]
            assert (await w.finish(migration)).outcome == "complete"
            assert met == [[80], [80]]
            assert running.opened_with == revision

    asyncio.run(scenario())
