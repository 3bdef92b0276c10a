"""Rules of the protocol that an agent keeps whatever fails beside it: a call of the driver, a write, the far end."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datapath.drivers.dummy import DummyDriver
from datapath.errors import KernelError, NotReady
from datapath.provider import PortRef, PortState
from datapath.registry import KINDS
from datapath.state.kind import Columns, Op, Table
from migrator._pb import migrator_pb2 as pb
from migrator.agent.end import End
from migrator.agent.quiet import QUIET
from migrator.agent.source import SourceEnd
from migrator.agent.store import Store
from migrator.agent.stream import PeerStream, ask
from migrator.errors import JournalFailed, PeerLost
from migrator.lifecycle.machine import Role
from tests.unit.pair import MACS, VM, World, connections, eventually, world


def run(scenario: Callable[[World], Any], directory: Path, *hosts: str, **settings: Any) -> None:
    async def whole() -> None:
        async with world(directory, *hosts, **settings) as w:
            await scenario(w)

    asyncio.run(whole())


def end_of(w: World, host: str, role: Role) -> End:
    return next(end for end in w.agents[host].ends if end.role is role)


def phase(w: World, host: str) -> str:
    return next((str(end.state.phase) for end in w.agents[host].ends.of(VM)), "")


async def reach(w: World, host: str, *phases: str) -> None:
    await eventually(lambda: phase(w, host) in phases)


def failing_once(driver: Any, name: str, ref: PortRef | None = None) -> None:
    """The first call of a driver's function for a port (None: any) fails after its effect is lost."""
    function, times = getattr(driver, name), iter([True])

    def fail(*arguments: Any, **options: Any) -> Any:
        if ref in (None, *arguments) and next(times, False):
            raise KernelError(f"{name}", 5)
        return function(*arguments, **options)

    setattr(driver, name, fail)


# ---- the source is active at once and without asking, when its guest runs there ----


def test_a_peer_that_reads_nothing_does_not_keep_the_guest_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(w: World) -> None:
        w.fill("a", 50)
        w.hypervisor.converged = False
        await w.migrate("b")
        await reach(w, "a", "watching")
        stalled = asyncio.Event()

        async def stall(*_: Any) -> None:
            stalled.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(PeerStream, "send", stall)
        w.fill("a", 60)  # there is something to send
        w.hypervisor.downtime_s = 30.0
        w.hypervisor.stop()
        await stalled.wait()
        await eventually(lambda: not w.active("a"))
        w.hypervisor.moving = ""
        w.hypervisor.resume("a", "cancelled")
        await eventually(lambda: len(w.active("a")) == len(MACS), 1.0)

    run(scenario, tmp_path, "a", "b", step_s=20.0)


def test_a_hypervisor_that_is_slow_to_cancel_does_not_keep_the_guest_waiting(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 30.0
        side: Any = w.agents["a"].guests
        asked = asyncio.Event()

        async def cancel(vm: str, *, certain: bool) -> bool:
            assert vm == VM and certain in (True, False)
            asked.set()
            await asyncio.Event().wait()
            return False

        side.cancel = cancel
        migration = await w.migrate("b")
        await reach(w, "a", "final", "committed")
        w.cluster.migrations.abort(migration)
        await asyncio.wait_for(asked.wait(), 5.0)
        w.hypervisor.moving = ""
        w.hypervisor.resume("a", "cancelled")
        await eventually(lambda: len(w.active("a")) == len(MACS), 1.0)

    run(scenario, tmp_path, "a", "b")


def test_a_full_disk_does_not_keep_the_guest_waiting(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 30.0
        await w.migrate("b")
        await reach(w, "a", "final", "committed")
        store: Any = w.agents["a"].store

        def full(*_: Any) -> None:
            raise JournalFailed("no space left")

        store.save_end = full
        w.hypervisor.moving = ""
        w.hypervisor.resume("a", "failed")
        await eventually(lambda: len(w.active("a")) == len(MACS), 1.0)

    run(scenario, tmp_path, "a", "b")


def test_rule_what_is_not_journalled_is_not_promised(tmp_path: Path) -> None:
    """A source that cannot write down that the destination may commit does not let it."""

    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 1.0  # it can still be had back
        store: Any = w.agents["a"].store
        save = store.save_end

        def full(name: str, fields: dict[str, Any]) -> None:
            if fields["state"].get("final"):
                raise JournalFailed("no space left")
            save(name, fields)

        store.save_end = full
        report = await w.finish(await w.migrate("b"))
        assert report.outcome == "aborted", report
        await eventually(lambda: len(w.active("a")) == len(MACS))
        assert not w.active("b")

    run(scenario, tmp_path, "a", "b", step_s=1.0)


@pytest.mark.parametrize("number", [0, 1])
def test_rule_one_port_that_fails_leaves_the_others_no_worse(tmp_path: Path, number: int) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.fail = True
        refs = w.active("a")
        failing_once(w.driver("a"), "untrack", refs[number])
        report = await w.finish(await w.migrate("b"))
        assert report.outcome == "aborted", report
        assert w.active("a") == refs

    run(scenario, tmp_path, "a", "b")


def test_rule_one_port_that_cannot_redirect_leaves_the_others(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        first, second = w.active("a")
        failing_once(w.driver("a"), "redirect", first)
        report = await w.finish(await w.migrate("b"))
        assert report.outcome == "degraded", report
        gates = {status.ref: status.gate for status in w.statuses("a")}
        assert gates[second] == "redirect"

    run(scenario, tmp_path, "a", "b", redirect_idle_s=60.0)


def test_rule_one_port_that_opens_late_leaves_the_others(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.migrate("b")
        driver: Any = w.driver("b")
        opening = driver.open

        def broken(ref: PortRef, **options: Any) -> Any:
            if ref.mac == MACS[0]:
                raise KernelError("open", 5)
            return opening(ref, **options)

        driver.open = broken
        await eventually(lambda: [ref.mac for ref in w.active("b")] == [MACS[1]], 3.0)
        driver.open = opening
        await eventually(lambda: len(w.active("b")) == len(MACS), 3.0)

    run(scenario, tmp_path, "a", "b", step_s=0.5)


# ---- crash points between what is stored and what is done ----


def stored(w: World, host: str, role: Role) -> Path:
    return next((w.directory / host / "migrations").glob(f"*.{role}.json"))


def test_a_source_that_died_after_its_purge_starts_again(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.finish(await w.migrate("b"))
        await reach(w, "a", "stub")
        path = stored(w, "a", Role.SOURCE)
        refs = [status.ref for status in w.statuses("a")]
        driver = w.driver("a")
        switch = driver.switch
        await w.stop("a")
        saved = json.loads(path.read_text())
        saved["state"]["phase"] = "released"
        path.write_text(json.dumps(saved))
        for ref in refs:
            del switch.ports[ref]
        await w.start("a")
        await w.quiet()

    run(scenario, tmp_path, "a", "b", redirect_idle_s=60.0)


@pytest.mark.parametrize("text", ["", "{", '{"role": "source"}'])
def test_a_damaged_file_does_not_keep_the_agent_from_starting(tmp_path: Path, text: str) -> None:
    async def scenario(w: World) -> None:
        await w.stop("a")
        path = w.directory / "a" / "migrations" / "one.source.json"
        path.write_text(text)
        await w.start("a")
        assert len(w.active("a")) == len(MACS)
        assert not path.exists()

    run(scenario, tmp_path, "a")


# ---- leases, redirects and the link go on ----


def test_a_vm_that_blocks_does_not_cost_others_their_lease(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 30.0
        await w.migrate("b")
        await reach(w, "b", "committed")
        free = threading.Event()
        agent = w.agents["b"]
        agent.around.lane("another").submit(free.wait)
        try:
            renewed: list[str] = []

            class Blocked:
                vm = "another"

                async def renew_lease(self) -> None:
                    await agent.around.call("another", renewed.append, "another")

            ends: Any = agent.ends
            ends._ends = {("blocked", Role.SOURCE): Blocked(), **ends._ends}
            switch = w.driver("b").switch
            before = min(port.lease_ns or 0 for port in switch.ports.values())
            await eventually(lambda: min(port.lease_ns or 0 for port in switch.ports.values()) > before, 2.0)
            assert not renewed
        finally:
            free.set()
            del ends._ends["blocked", Role.SOURCE]

    run(scenario, tmp_path, "a", "b", lease_s=0.5)


def test_a_hold_has_its_lease_from_the_beginning(tmp_path: Path) -> None:
    """An agent that dies right after it has begun to hold must not hold for ever."""

    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 30.0
        await w.migrate("b")
        await reach(w, "a", "final", "committed")
        switch = w.driver("a").switch
        assert all(port.lease_ns is not None for port in switch.ports.values())

    run(scenario, tmp_path, "a", "b", lease_s=1000.0)


def test_redirects_end_though_one_of_them_is_broken(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        failing_once(w.driver("a"), "redirect_idle_s")
        assert (await w.finish(await w.migrate("b"))).outcome == "complete"
        await w.quiet()
        assert not w.statuses("a")

    run(scenario, tmp_path, "a", "b")


def test_an_agent_comes_back_after_its_greeting_failed(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        link: Any = w.agents["a"].link
        greet, times = link._hello, iter([True, True])

        async def fail() -> pb.Hello:
            if next(times, False):
                raise KernelError("read the ports", 5)
            hello: pb.Hello = await greet()
            return hello

        link._hello = fail
        for session in w.cluster.roster:
            session.close()
        await eventually(lambda: not w.agents["a"].link.connected)
        await eventually(lambda: len(w.cluster.roster) == 1 and w.agents["a"].link.connected)
        assert next(times, None) is None

    run(scenario, tmp_path, "a")


# ---- the destination ----


def test_rule_what_the_source_sends_too_late_is_not_counted_against_it(tmp_path: Path) -> None:
    """The guest ran first and its ports opened without the last changes: accounting and broadcast follow still."""

    async def scenario(w: World) -> None:
        w.fill("a", 50)
        w.hypervisor.converged = False
        w.hypervisor.downtime_s = 0.0
        migration = await w.migrate("b")
        await reach(w, "a", "watching")
        driver: Any = w.driver("b")
        load, late = driver.load, iter([True])

        def slow(ref: PortRef, table: Any) -> Any:
            if next(late, False):
                threading.Event().wait(0.3)
            return load(ref, table)

        driver.load = slow
        w.fill("a", 60)
        w.hypervisor.stop()
        report = await w.finish(migration)
        assert report.outcome == "degraded", report
        assert "accounting" not in report.reason, report
        assert all(port.broadcast for port in w.driver("b").switch.ports.values())

    run(scenario, tmp_path, "a", "b", last_changes_s=0.05)


@pytest.mark.parametrize("times", [0, 2], ids=["lost", "doubled"])
def test_rule_a_section_that_is_lost_or_doubled_is_noticed_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    async def scenario(w: World) -> None:
        w.fill("a", 50)
        before = w.connections("a")
        send, first = PeerStream.send, iter([True])

        async def wrong(stream: PeerStream, message: pb.FromSource) -> None:
            for _ in range(times if message.HasField("section") and next(first, False) else 1):
                await send(stream, message)

        monkeypatch.setattr(PeerStream, "send", wrong)
        report = await w.finish(await w.migrate("b"))
        assert report.outcome == "aborted", report
        assert "lost or damaged" in report.reason or "they differ" in report.reason, report
        assert w.connections("a") == before
        await w.quiet()
        assert not w.statuses("b")

    run(scenario, tmp_path, "a", "b")


def test_rule_a_load_that_breaks_ends_the_migration(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.fill("a", 50)
        driver: Any = w.driver("b")

        def broken(*_: Any) -> Any:
            raise ValueError("no error that a driver may raise")

        driver.load = broken
        report = await w.finish(await w.migrate("b"))
        assert report.outcome == "aborted", report
        assert "no error that a driver may raise" in report.reason
        await w.quiet()
        assert not w.statuses("b")
        assert len(w.active("a")) == len(MACS)

    run(scenario, tmp_path, "a", "b")


def test_a_source_that_dies_keeps_nothing_waiting_at_the_destination(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 0.3
        await w.migrate("b")
        await reach(w, "b", "committed")
        await w.stop("a")
        await eventually(lambda: len(w.active("b")) == len(MACS))
        await eventually(lambda: all(port.broadcast for port in w.driver("b").switch.ports.values()), 3.0)

    run(scenario, tmp_path, "a", "b", settle_s=60.0)


def test_a_destination_that_forgot_looks_at_its_switch(tmp_path: Path) -> None:
    """`not committed` is a promise: only a host that has no such instance may give it."""

    async def scenario(w: World) -> None:
        migration = await w.migrate("b")
        report = await w.finish(migration)
        await w.quiet()
        await w.stop("b")
        await w.start("b")
        query = pb.MoveQuery(migration=migration, vm=VM, epoch=report.epoch)
        said = await ask(pb.StartSource(peer=w.agents["b"].peer), query, 5.0)
        assert (said.known, said.committed, said.opened) == (True, True, True)
        query.epoch += 1
        said = await ask(pb.StartSource(peer=w.agents["b"].peer), query, 5.0)
        assert (said.known, said.committed, said.opened) == (False, False, False)

    run(scenario, tmp_path, "a", "b")


def test_a_restarted_copy_keeps_a_change_of_the_configuration(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.converged = False
        await w.migrate("b")
        await reach(w, "a", "watching")
        ref = next(status.ref for status in w.statuses("b"))
        record = {**w.driver("b").port(ref).record, "addresses": ["10.1.0.99"], "revision": 1000}
        w.driver("b").update(ref, record)
        source: Any = end_of(w, "a", Role.SOURCE)
        await source.stream.send(pb.FromSource(restart=pb.Empty()))
        arrival: Any = end_of(w, "b", Role.DESTINATION)
        await eventually(lambda: arrival.arrival.copying_again)
        assert phase(w, "b") == "loading"
        assert w.driver("b").port(ref).record["addresses"] == ["10.1.0.99"]

    run(scenario, tmp_path, "a", "b")


FRAME = bytes(10) + bytes.fromhex("ffffffffffff" + MACS[0].replace(":", "") + "88b6") + bytes(46)


def overflow_in_the_pause(w: World, then: Callable[[], None]) -> None:
    """The last drain finds that more has changed at the source than could be noted: some connections have ended."""
    driver: Any = w.driver("a")
    drain, times = driver.drain, iter([True])

    def overflow(ref: PortRef) -> list[Table]:
        if driver.port(ref).state is not PortState.QUIESCED or not next(times, False):
            tables: list[Table] = drain(ref)
            return tables
        driver.switch.ports[ref].tables["conntrack"].load(Table("conntrack", Op.DELETE, keys_of_connections(10)))
        drain(ref)
        then()
        raise NotReady("the note of changes overflowed")

    driver.drain = overflow


def keys_of_connections(count: int) -> Columns:
    columns = connections(count)
    return {name: columns[name] for name in KINDS["conntrack"].key}


def test_rule_a_copy_that_begins_again_keeps_what_the_guest_has_sent(tmp_path: Path) -> None:
    """It may run at the destination while the second copy is under way: its frames wait in the hold of its port."""

    async def scenario(w: World) -> None:
        w.fill("a", 50)
        sent: list[int] = []
        w.hypervisor.converged = False
        migration = await w.migrate("b")
        await reach(w, "a", "watching")
        ref = next(status.ref for status in w.statuses("b") if status.ref.mac == MACS[0])
        overflow_in_the_pause(w, lambda: sent.append(w.driver("b").inject(ref, [FRAME], judged=False)))
        before = w.connections("a")
        w.hypervisor.stop()
        report = await w.finish(migration)
        assert sent == [1]
        assert report.outcome == "complete", report
        assert report.frames["released"] == 1
        there = w.connections("b")
        assert sorted(len(before[mac] - there[mac]) for mac in MACS) == [0, 10]
        assert not any(there[mac] - before[mac] for mac in MACS)
        await w.quiet()

    run(scenario, tmp_path, "a", "b")


def test_rule_a_copy_that_begins_again_ends_though_the_guest_is_known_to_run(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.fill("a", 50)
        w.hypervisor.converged = False
        migration = await w.migrate("b")
        await reach(w, "a", "watching")
        w.hypervisor.downtime_s = 0.0
        loop = asyncio.get_running_loop()
        arrived = threading.Event()

        def wait() -> None:
            asyncio.run_coroutine_threadsafe(reach(w, "b", "waiting"), loop).result(5.0)
            arrived.set()

        overflow_in_the_pause(w, wait)
        w.hypervisor.stop()
        report = await w.finish(migration)
        assert arrived.is_set()
        assert report.outcome == "complete", report
        assert sorted(len(keys) for keys in w.connections("b").values()) == [40, 50]
        await w.quiet()

    run(scenario, tmp_path, "a", "b", last_changes_s=20.0)


# ---- what carries an old epoch, or is nobody's, changes nothing ----


@pytest.mark.parametrize("wrong", ["epoch", "token", "migration"])
def test_rule_a_stream_that_is_not_the_agreed_one_is_refused(tmp_path: Path, wrong: str) -> None:
    async def scenario(w: World) -> None:
        w.hypervisor.converged = False
        migration = await w.migrate("b")
        await reach(w, "a", "watching")
        source = end_of(w, "a", Role.SOURCE)
        assert isinstance(source, SourceEnd)
        order = source.order
        begin = pb.Begin(migration=migration, vm=VM, epoch=order.epoch, token=order.token)
        bad: dict[str, Any] = {"epoch": order.epoch - 1, "token": b"x" * 16, "migration": "another"}
        setattr(begin, wrong, bad[wrong])
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        heard: list[pb.FromDestination] = []
        stream = PeerStream(pb.StartSource(peer=w.agents["b"].peer), heard.append, ended.set_result)
        try:
            await stream.open(begin, 5.0)
            reason = await asyncio.wait_for(ended, 5.0)
        except PeerLost as error:
            reason = str(error)
        finally:
            await stream.close()
        assert not heard and reason
        assert phase(w, "b") == "loading" and phase(w, "a") == "watching"

    run(scenario, tmp_path, "a", "b")


def test_late_messages_of_the_first_move_do_not_touch_the_port_that_came_back(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.fill("a", 20)
        before = w.connections("a")
        old = w.active("a")
        first = await w.migrate("b")
        there = (await w.finish(first)).epoch
        second = await w.migrate("a")
        await w.finish(second)
        new = w.active("a")
        assert new and new[0].epoch > there > old[0].epoch
        agent: Any = w.agents["a"]
        late = [
            pb.ToAgent(end_redirect=pb.EndRedirect(vm=VM, epoch=old[0].epoch)),
            pb.ToAgent(end_redirect=pb.EndRedirect(vm=VM, epoch=there)),
            pb.ToAgent(abort=pb.Abort(migration=first, reason="late")),
            pb.ToAgent(verdict=pb.Verdict(migration=first, guest_at="b", committed=True, opened=True)),
            pb.ToAgent(authorise=pb.Authorise(migration=first)),
            *(pb.ToAgent(remove=pb.PortRemoval(vm=VM, mac=ref.mac, epoch=ref.epoch)) for ref in old),
        ]
        await w.quiet()
        for message in late:
            await agent._order(message)
        await w.quiet()
        await asyncio.gather(*(task for task in agent._tasks if task.get_coro().__name__ == "_carry_out"))
        assert w.active("a") == new
        assert w.connections("a") == before

    run(scenario, tmp_path, "a", "b")


def test_an_order_for_an_instance_that_has_ended_makes_none(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        old = w.active("a")[0]
        port = w.cluster.store.catalog.ports[f"{VM}/{old.mac}"]
        order = w.cluster.store.catalog.order(port)
        await w.finish(await w.migrate("b"))
        await w.quiet()
        assert order.epoch == old.epoch
        await w.agents["a"].hosting.port(order)
        assert not w.statuses("a")

    run(scenario, tmp_path, "a", "b")


# ---- places ----


def test_rule_a_place_that_cannot_be_set_is_tried_again_and_keeps_no_other_back(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        driver: Any = w.driver("a")
        setting = driver.set_place
        known = set()

        def strict(place: Any) -> None:
            if place.host not in known:
                raise NotReady(f"host {place.host} is not known")
            setting(place)

        driver.set_place = strict
        known.add("b")
        places = [pb.Place(network="blue", mac=f"52:54:00:00:01:0{i}", host=h) for i, h in enumerate("dbd")]
        hosting = w.agents["a"].hosting
        with pytest.raises(NotReady):
            await hosting.places(pb.PlaceUpdate(places=places, revision=1))
        assert list(driver.switch.places.values()) == ["b"]
        known.add("d")
        await hosting.places(pb.PlaceUpdate(places=places, revision=1))
        assert sorted(driver.switch.places.values()) == ["b", "d", "d"]

    run(scenario, tmp_path, "a")


def test_an_agent_whose_disk_is_full_takes_what_it_is_told(tmp_path: Path) -> None:
    """The coordinator says it once, and waits for its acknowledgement before it ends a redirect."""

    async def scenario(w: World) -> None:
        agent = w.agents["a"]
        sync = agent.store.sync()
        sync.places.extend([pb.Place(network="blue", mac="52:54:00:00:01:01", host="b")])
        sync.hosts["b"] = "10.0.0.2"
        sync.revision = 10_000

        def refuse(_: pb.Sync) -> None:
            raise JournalFailed("no space left")

        agent.store.save_sync = refuse
        assert await agent.hosting.sync(sync) == ["not kept for the next start: no space left"]
        driver: Any = w.driver("a")
        assert list(driver.switch.places.values()) == ["b"]
        assert agent.hosting.places_known().revision == 10_000

    run(scenario, tmp_path, "a")


def test_an_agent_starts_though_a_place_cannot_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(w: World) -> None:
        sync = pb.Sync(places=[pb.Place(network="blue", mac="52:54:00:00:01:01", host="gone")])
        await w.stop("a")
        Store(w.directory / "a").save_sync(sync)

        def refuse(*_: Any) -> None:
            raise NotReady("host gone is not known")

        monkeypatch.setattr("datapath.drivers.dummy.DummyDriver.set_place", refuse)
        await w.start("a")
        assert len(w.active("a")) == len(MACS)

    run(scenario, tmp_path, "a")


def test_an_agent_starts_with_the_places_that_it_was_told_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last Sync may be months old; what was told since is not undone while there is no coordinator."""

    async def scenario(w: World) -> None:
        old, new = (pb.Place(network="blue", mac="52:54:00:00:01:01", host=host) for host in ("old", "new"))
        hosting = w.agents["a"].hosting
        sync = w.agents["a"].store.sync()
        sync.places.extend([old])
        sync.hosts.update({"old": "10.0.0.8", "new": "10.0.0.9"})
        sync.revision = 10_000
        await hosting.sync(sync)
        await hosting.places(pb.PlaceUpdate(places=[new], revision=10_001))
        await w.stop("a")
        told: list[str] = []
        setting = DummyDriver.set_place
        monkeypatch.setattr(DummyDriver, "set_place", lambda self, one: (told.append(one.host), setting(self, one)))
        await w.start("a")
        assert told == ["new"]

    run(scenario, tmp_path, "a")


# ---- purge ----


def test_the_source_keeps_everything_until_the_destination_has_settled(tmp_path: Path) -> None:
    """What the destination has not confirmed is not deleted, whatever it is told meanwhile."""

    async def scenario(w: World) -> None:
        w.fill("a", 20)
        driver: Any = w.driver("b")
        load, loop = driver.load, asyncio.get_running_loop()
        accounts, go_on = asyncio.Event(), threading.Event()

        def slow(ref: PortRef, table: Any) -> Any:
            if table.op is Op.ACCOUNT:
                loop.call_soon_threadsafe(accounts.set)
                go_on.wait(5.0)
            return load(ref, table)

        driver.load = slow
        migration = await w.migrate("b")
        await accounts.wait()
        try:
            assert {status.state for status in w.statuses("a")} == {PortState.QUIESCED}
            assert all(w.driver("a").switch.ports[status.ref].tables for status in w.statuses("a"))
        finally:
            go_on.set()
        assert (await w.finish(migration)).outcome == "complete"

    run(scenario, tmp_path, "a", "b")


def test_the_collector_comes_back_when_a_switchover_stays_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's memory is not collected during a switchover; one that hangs must not fill it."""
    monkeypatch.setattr(QUIET, "longest_s", 0.3)
    monkeypatch.setattr(QUIET, "_holders", {})

    async def scenario(w: World) -> None:
        w.hypervisor.downtime_s = 30.0
        await w.migrate("b")
        await reach(w, "a", "final", "committed")
        assert not gc.isenabled()
        await eventually(gc.isenabled, 5.0)
        w.hypervisor.moving = ""
        w.hypervisor.resume("a", "failed")
        await eventually(lambda: len(w.active("a")) == len(MACS))

    run(scenario, tmp_path, "a", "b")
