"""An agent dies, the coordinator goes, the other end cannot take it: moved completely, or not moved at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from datapath.drivers.dummy import DummyDriver
from datapath.errors import NotReady
from datapath.provider import PortRef, PortState
from datapath.state.kind import Table
from migrator._pb import migrator_pb2 as pb
from migrator.agent.ends import Ends
from migrator.agent.stream import PeerStream
from migrator.errors import PeerLost
from migrator.lifecycle import source_words as words
from tests.unit.pair import MACS, VM, World, connections, eventually, world


def phase(ends: Ends) -> str:
    """Of the newest end of the VM, "" for none."""
    return next((str(end.state.phase) for end in ends.of(VM)), "")


async def reach(w: World, host: str, *phases: str) -> None:
    await eventually(lambda: phase(w.agents[host].ends) in phases)


def owners(w: World) -> list[str]:
    return [host for host in w.agents if w.active(host)]


@pytest.mark.parametrize("host", ["a", "b"])
def test_an_agent_restarts_while_memory_is_copied(tmp_path: Path, host: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 50)
            before = w.connections("a")
            w.hypervisor.converged = False
            migration = await w.migrate("b")
            await reach(w, "a", "watching")
            await w.stop(host)
            await w.start(host)
            report = await w.finish(migration, 20.0)
            assert report.outcome == "aborted", report
            assert not w.hypervisor.moving and w.hypervisor.running
            await eventually(lambda: owners(w) == ["a"])
            await w.quiet()
            assert w.connections("a") == before
            assert not w.statuses("b")
            w.hypervisor.converged = True
            assert (await w.finish(await w.migrate("b"))).outcome == "complete"

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["a", "b"])
def test_rule_an_agent_restarts_between_commit_and_resume(tmp_path: Path, host: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 50)
            before = w.connections("a")
            w.hypervisor.downtime_s = 1.0
            migration = await w.migrate("b")
            await reach(w, "a", "committed")
            await w.stop(host)
            await w.start(host)
            report = await w.finish(migration, 20.0)
            assert report.outcome == "complete", report
            assert owners(w) == ["b"]
            assert w.connections("b") == before
            await w.quiet()
            assert not w.statuses("a")

    asyncio.run(scenario())


def test_an_agent_that_is_started_again_renews_its_leases_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been away for almost as long as they last: a redirect must not stop before its first interval."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", redirect_idle_s=1000.0, lease_s=1000.0) as w:
            await w.finish(await w.migrate("b"))
            await reach(w, "a", "stub")
            await w.stop("a")
            leases: list[float | None] = []
            monkeypatch.setattr(DummyDriver, "set_lease", lambda *what: leases.append(what[-1]))
            await w.start("a")
            assert leases == [1000.0] * len(MACS)

    asyncio.run(scenario())


def test_the_guest_resumes_while_the_destination_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 50)
            before = w.connections("a")
            w.hypervisor.downtime_s = 0.3
            migration = await w.migrate("b")
            await reach(w, "a", "committed")
            await w.stop("b")
            await eventually(lambda: w.hypervisor.place == "b")
            await w.start("b")
            report = await w.finish(migration, 20.0)
            assert report.outcome == "complete", report
            assert owners(w) == ["b"]
            assert w.connections("b") == before

    asyncio.run(scenario())


def test_the_guest_arrives_while_its_source_is_away(tmp_path: Path) -> None:
    """The last changes are missing: the ports open all the same, and the operator is told."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", last_changes_s=0.2) as w:
            w.fill("a", 50)
            before = w.connections("a")
            w.hypervisor.converged = False
            migration = await w.migrate("b")
            await reach(w, "a", "watching")
            await w.stop("a")
            w.hypervisor.place, w.hypervisor.running = "b", False
            w.hypervisor.moving = ""
            w.hypervisor.resume("b", "migrated")
            await eventually(lambda: owners(w) == ["b"])
            await w.start("a")
            report = await w.finish(migration, 20.0)
            assert report.outcome == "degraded", report
            assert owners(w) == ["b"]
            assert w.connections("b") == before
            await w.quiet()
            assert not w.statuses("a")

    asyncio.run(scenario())


@asynccontextmanager
async def stuck_at_the_first_section(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncio.Event]:
    """A source that has not sent a section yet stands until the end."""
    send, stuck = PeerStream.send, asyncio.Event()

    async def nothing(stream: PeerStream, message: pb.FromSource) -> None:
        if message.HasField("section"):
            stuck.set()
            await asyncio.Event().wait()
        await send(stream, message)

    with monkeypatch.context() as patched:
        patched.setattr(PeerStream, "send", nothing)
        yield stuck


def test_rule_a_guest_that_had_to_begin_without_its_state_gets_it_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stopped by itself, and its source's agent was dead before the first copy. What it began since is its own."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", last_changes_s=0.2) as w:
            w.fill("a", 50)
            before = w.connections("a")
            async with stuck_at_the_first_section(monkeypatch) as stuck:
                migration = await w.migrate("b")
                await stuck.wait()
            await w.stop("a")
            w.hypervisor.place, w.hypervisor.running, w.hypervisor.moving = "b", False, ""
            w.hypervisor.resume("b", "migrated")
            await eventually(lambda: owners(w) == ["b"])
            assert not any(w.connections("b").values())
            own = {**connections(5), "id": np.arange(1000, 1005, dtype="<u8")}
            for ref in w.active("b"):
                w.driver("b").load(ref, Table("conntrack", columns=own))
            await w.start("a")
            report = await w.finish(migration, 20.0)
            assert report.outcome == "degraded", report
            assert w.connections("b") == before
            assert identities(w, "b") == {ref.mac: {*range(1000, 1005), *range(6, 51)} for ref in w.active("b")}
            await w.quiet()
            assert not w.statuses("a")

    asyncio.run(scenario())


def identities(w: World, host: str) -> dict[str, set[int]]:
    """Ids of connections by MAC."""
    tables = {ref.mac: list(w.driver(host).dump(ref, "conntrack")) for ref in w.active(host)}
    return {mac: {int(one) for table in found for one in (table.columns or {})["id"]} for mac, found in tables.items()}


def test_ports_whose_rules_were_still_to_come_have_them_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source dies before it has sent them, and the guest arrives."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", last_changes_s=0.2) as w:
            before = rules(w, "a")
            async with stuck_at_the_first_section(monkeypatch) as stuck:
                migration = await w.migrate("b")
                await stuck.wait()
            await w.stop("a")
            w.hypervisor.place, w.hypervisor.running, w.hypervisor.moving = "b", False, ""
            w.hypervisor.resume("b", "migrated")
            await eventually(lambda: owners(w) == ["b"])
            await eventually(lambda: rules(w, "b") == before)
            await w.start("a")
            assert (await w.finish(migration, 20.0)).outcome == "degraded"

    asyncio.run(scenario())


def rules(w: World, host: str) -> dict[str, list[object]]:
    """In force, by MAC."""
    found: dict[str, list[object]] = {}
    for ref in w.active(host):
        records = [record for table in w.driver(host).dump(ref, "acl") for record in table.records or ()]
        found[ref.mac] = [(record["direction"], record["ports"], record["action"]) for record in records]
    assert len(found) == len(MACS)
    return found


def test_from_the_authorisation_on_nobody_needs_the_coordinator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 50)
            before = w.connections("a")
            w.hypervisor.converged = False
            await w.migrate("b")
            await reach(w, "a", "watching")
            for session in w.cluster.roster:
                w.cluster.roster._sessions.clear()
                session.close()
            w.hypervisor.converged = True
            await eventually(lambda: owners(w) == ["b"])
            assert w.connections("b") == before

    asyncio.run(scenario())


def test_a_destination_that_cannot_load_gives_the_guest_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 50)
            before = w.connections("a")
            driver: Any = w.driver("b")

            def refuse(ref: PortRef, table: Table) -> None:
                raise NotReady(f"no memory for {len(table)} records of {ref.mac}")

            driver.load = refuse
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == "aborted", report
            assert "no memory" in report.reason
            assert owners(w) == ["a"]
            assert w.connections("a") == before
            await w.quiet()
            assert not w.statuses("b")

    asyncio.run(scenario())


def test_rule_more_changes_than_can_be_noted_begin_the_copy_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 50)
            driver: Any = w.driver("a")
            drain, times = driver.drain, iter([True])

            def overflow(ref: PortRef) -> list[Table]:
                if next(times, False):
                    raise NotReady("the note of changes overflowed")
                tables: list[Table] = drain(ref)
                return tables

            driver.drain = overflow
            before = w.connections("a")
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == "complete", report
            assert any("begun again" in warning for warning in report.warnings), report
            assert w.connections("b") == before
            assert report.moved["conntrack"] == 100

    asyncio.run(scenario())


def test_rule_no_copy_begins_in_the_pause_for_what_changed_before_it(tmp_path: Path) -> None:
    """More changes than can be noted, after the last drain and before the stop: the guest goes on until all is sent."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", drain_interval_s=60.0, idle_s=0.0, idle_deadline_s=5.0) as w:
            w.fill("a", 50)
            driver: Any = w.driver("a")
            driver._options["tracked_max"] = 100
            busy = Busy(driver)
            report = await w.finish(await w.migrate("b"))
            assert report.outcome == "complete", report
            assert report.leading
            assert sorted(len(keys) for keys in w.connections("b").values()) == [50, 200]
            assert len(busy.held) == 2 * len(MACS)  # it was let go in between
            assert set(busy.dumped) == {PortState.ACTIVE}
            assert any("begun again" in warning for warning in report.warnings), report

    asyncio.run(scenario())


class Busy:
    """A port at which much changes in the moment when the guest has emptied its queue and all drains have been made."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.held: list[PortRef] = []
        self.dumped: list[PortState] = []
        self.drained: set[PortRef] = set()  # since they were held
        self.hold, self.dump, self.drain, self.idle = driver.hold, driver.dump, driver.drain, driver.idle
        driver.hold, driver.dump, driver.drain, driver.idle = self.on_hold, self.on_dump, self.on_drain, self.on_idle

    def on_hold(self, ref: PortRef) -> None:
        self.hold(ref)
        self.held.append(ref)
        self.drained.clear()

    def on_dump(self, ref: PortRef, kind: str) -> Iterator[Table]:
        self.dumped.append(self.driver.port(ref).state)
        found: Iterator[Table] = self.dump(ref, kind)
        return found

    def on_drain(self, ref: PortRef) -> list[Table]:
        self.drained.add(ref)
        found: list[Table] = self.drain(ref)
        return found

    def on_idle(self, ref: PortRef) -> bool:
        if self.held and len(self.drained) < len(MACS):
            return False
        if len(self.held) == len(MACS) and ref == self.held[-1]:
            self.driver.load(ref, Table("conntrack", columns=connections(200)))
        return True


def test_rule_frames_left_in_the_guests_queue_are_carried(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            ref = w.active("a")[0]
            w.hypervisor.converged = False
            migration = await w.migrate("b")
            await reach(w, "a", "watching")
            left = [bytes(12) + bytes([i]) * 60 for i in range(3)]
            w.driver("a").inject(ref, left, judged=True)
            w.hypervisor.stop()
            report = await w.finish(migration)
            assert report.outcome == "complete", report
            there = next(new for new in w.active("b") if new.mac == ref.mac)
            came = w.driver("b").take(there)
            assert [frame for frame in came if frame in left] == left

    asyncio.run(scenario())


def test_rule_frames_left_in_the_guests_queue_come_back_on_a_rollback(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            ref = w.active("a")[0]
            w.hypervisor.converged, w.hypervisor.fail = False, True
            migration = await w.migrate("b")
            await reach(w, "a", "watching")
            left = [bytes(12) + bytes([i]) * 60 for i in range(3)]
            w.driver("a").inject(ref, left, judged=True)
            w.hypervisor.stop()
            report = await w.finish(migration)
            assert report.outcome == "aborted", report
            assert w.driver("a").take(ref) == left

    asyncio.run(scenario())


async def with_frames_taken(w: World) -> tuple[str, PortRef, list[bytes]]:
    """The guest stopped by itself, three frames were in its queue, and the destination has committed."""
    ref = w.active("a")[0]
    w.hypervisor.converged, w.hypervisor.downtime_s = False, 1.5
    migration = await w.migrate("b")
    await reach(w, "a", "watching")
    left = [bytes(12) + bytes([i]) * 60 for i in range(3)]
    w.driver("a").inject(ref, left, judged=True)
    w.hypervisor.stop()
    await reach(w, "a", "committed")
    return migration, ref, left


@pytest.mark.parametrize("fail", [False, True], ids=["moved", "rolled back"])
def test_frames_taken_from_the_guests_queue_outlive_the_agent(tmp_path: Path, fail: bool) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.hypervisor.fail = fail
            migration, ref, left = await with_frames_taken(w)
            await w.stop("a")
            await w.start("a")
            report = await w.finish(migration, 20.0)
            host, outcome = ("a", "aborted") if fail else ("b", "complete")
            assert report.outcome == outcome, report
            there = next(new for new in w.active(host) if new.mac == ref.mac)
            assert [frame for frame in w.driver(host).take(there) if frame in left] == left
            await w.quiet()
            assert not list(w.directory.glob("*/migrations/*"))

    asyncio.run(scenario())


def test_frames_that_may_have_been_passed_on_are_not_sent_twice_but_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            migration, ref, left = await with_frames_taken(w)
            await w.stop("a")
            taken = next((w.directory / "a" / "migrations").glob("*.frames"))
            taken.write_bytes(b"p" + taken.read_bytes()[1:])
            await w.start("a")
            report = await w.finish(migration, 20.0)
            assert report.frames["may_be_lost"] == len(left), report
            assert any("may be lost" in warning for warning in report.warnings), report
            there = next(new for new in w.active("b") if new.mac == ref.mac)
            assert not [frame for frame in w.driver("b").take(there) if frame in left]

    asyncio.run(scenario())


def test_a_second_migration_of_the_vm_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b", "c") as w:
            w.hypervisor.converged = False
            migration = await w.migrate("b")
            await reach(w, "a", "watching")
            with pytest.raises(Exception, match="moved"):
                await w.migrate("c")
            order = pb.StartSource(migration="other", vm=VM, epoch=99, epochs={"52:54:00:00:00:01": 1})
            with pytest.raises(Exception, match="being moved"):
                w.agents["a"].ends.start(order)
            w.cluster.migrations.abort(migration)
            assert (await w.finish(migration)).outcome == "aborted"

    asyncio.run(scenario())


def test_without_a_hypervisor_doubt_is_resolved_by_the_operator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b", guests="none", step_s=0.2) as w:
            w.fill("a", 50)
            before = w.connections("a")
            driver: Any = w.driver("b")
            gone = asyncio.Event()
            commit, loop = driver.commit, asyncio.get_running_loop()

            def commit_and_die(ref: PortRef) -> None:
                commit(ref)
                loop.call_soon_threadsafe(gone.set)

            driver.commit = commit_and_die
            migration = await w.migrate("b")
            await gone.wait()
            await w.stop("b")
            await reach(w, "a", "final", "committed")
            assert not w.active("a")
            await w.cluster.migrations.resolve(migration, "a")
            await eventually(lambda: owners(w) == ["a"])
            assert w.connections("a") == before

    asyncio.run(scenario())


def test_a_source_whose_peer_is_given_up_connects_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream breaks before the accounting, and the destination cannot be reached: it is given up meanwhile."""
    open_stream, send, opened = PeerStream.open, PeerStream.send, []

    async def once(stream: PeerStream, begin: pb.Begin, timeout_s: float) -> None:
        opened.append(stream)
        if len(opened) > 1:
            stream._channel = grpc.aio.insecure_channel("127.0.0.1:1")
        await open_stream(stream, begin, timeout_s)

    async def broken(stream: PeerStream, message: pb.FromSource) -> None:
        if message.HasField("settle_end"):
            raise PeerLost("the stream broke")
        await send(stream, message)

    monkeypatch.setattr(PeerStream, "open", once)
    monkeypatch.setattr(PeerStream, "send", broken)

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.fill("a", 50)
            before = w.connections("a")
            with capture_logs() as said:
                migration = await w.migrate("b")
                await eventually(lambda: len(opened) == 2)
                (end,) = w.agents["a"].ends.of(VM)
                end.post(words.PeerFailed("its host is gone"))
                await reach(w, "a", "stub")
                await eventually(lambda: "connect" not in end._beside)
                await w.finish(migration)
            assert not [line for line in said if line["log_level"] in {"error", "critical"}]
            assert owners(w) == ["b"] and w.connections("b") == before

    asyncio.run(scenario())
