"""What the exhaustive model (tests/model) has found, each with the real agents: red before it was repaired."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from migrator.agent.stream import PeerStream
from migrator.lifecycle import coordinator as c
from migrator.lifecycle import destination as b
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source as a
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Guest, Role, Verdict
from tests.unit.pair import VM, Side, World, eventually
from tests.unit.test_rules_agent import end_of, reach, run


def ports(w: World, host: str) -> list[Any]:
    return list(w.driver(host).switch.ports.values())


def test_a_hold_that_comes_too_late_does_not_shut_a_source_that_goes_on(tmp_path: Path) -> None:
    """The guest turns out to run here in the moment in which the hold is ordered: both were in the queue."""

    async def scenario(w: World) -> None:
        w.hypervisor.converged = False
        await w.migrate("b")
        await reach(w, "a", "watching")
        end = end_of(w, "a", Role.SOURCE)
        end.post(aw.GuestFits())
        end.post(Verdict(guest_at=Role.SOURCE))
        await eventually(lambda: not w.agents["a"].ends.of(VM))
        await w.agents["a"].around.call(VM, lambda: None)  # what was in the VM's lane has been done
        assert [status.gate for status in w.statuses("a")] == ["local", "local"]

    run(scenario, tmp_path, "a", "b")


def test_a_guest_that_we_stop_after_the_move_was_given_up_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hypervisor carries out our stop when the abort is already through."""

    async def scenario(w: World) -> None:
        asked, late, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        suspend = Side.suspend

        async def in_a_thread(side: Side, vm: str) -> None:
            asked.set()
            await late.wait()
            await suspend(side, vm)
            done.set()

        async def slow(side: Side, vm: str) -> None:
            await asyncio.shield(asyncio.create_task(in_a_thread(side, vm)))

        monkeypatch.setattr(Side, "suspend", slow)
        migration = await w.migrate("b")
        await asked.wait()
        w.cluster.migrations.abort(migration)
        await reach(w, "a", "aborted", "")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await eventually(lambda: not w.agents["a"].ends.of(VM))  # if nothing keeps it from forgetting
        late.set()
        await done.wait()
        await eventually(lambda: not w.agents["a"].ends.of(VM))
        await eventually(lambda: w.hypervisor.running)
        assert w.hypervisor.place == "a"

    run(scenario, tmp_path, "a", "b")


def test_ports_that_are_shut_early_have_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest stops before the source has reached the destination: no renewal is due in that phase."""

    async def scenario(w: World) -> None:
        async def never(*_: Any) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(PeerStream, "open", never)
        await w.migrate("b")
        await reach(w, "a", "connecting")
        end_of(w, "a", Role.SOURCE).post(aw.GuestPaused(moving=True))
        await eventually(lambda: all(status.gate.endswith("shut") for status in w.statuses("a")))
        assert all(port.lease_ns is not None for port in ports(w, "a"))

    run(scenario, tmp_path, "a", "b", lease_s=1000.0)


def test_a_refusal_is_over_at_once(tmp_path: Path) -> None:
    """The destination has forgotten what it refused when it is told to undo it: that is an answer as well."""

    async def scenario(w: World) -> None:
        w.driver("b").probe = lambda _: ["no room"]
        assert (await w.finish(await w.migrate("b"))).outcome == "refused"
        await eventually(lambda: not w.cluster.migrations.migrating())
        await eventually(lambda: not w.cluster.migrations._execution.running)

    run(scenario, tmp_path, "a", "b")


def test_accounting_waits_for_the_destinations_own_word() -> None:
    """Told by others that the ports are open, the source redirects; its counts wait until the destination says so."""
    committed = a.State(
        phase=aw.Phase.COMMITTED, guest=Guest.GONE, authorised=True, peer=True, final=True, drained=True
    )
    state, actions = a.step(committed, Verdict(guest_at=Role.DESTINATION, committed=True, opened=True))
    assert actions == (aw.Redirect(),)
    state, actions = a.step(state, aw.Redirected())
    assert aw.Settle() not in actions
    state, actions = a.step(state, aw.PeerOpened())
    assert actions == (aw.Settle(),)
    assert a.step(state, aw.PeerOpened()) == (state, ())


@pytest.mark.parametrize(("guest", "word"), [(Guest.RUNNING, "rolled-back"), (Guest.GONE, "aborted")])
def test_the_last_word_of_a_source_that_has_ended_is_how_it_ended(guest: Guest, word: str) -> None:
    """Its hypervisor says that the move failed when it has been rolled back: who was away hears only the last word."""
    _, actions = a.step(a.State(phase=aw.Phase.ABORTED, guest=guest), aw.Failed("the hypervisor gave up"))
    assert actions == (aw.Tell("failed", "the hypervisor gave up"), aw.Tell(word))


def test_a_source_hears_of_open_ports_when_they_are_open(tmp_path: Path) -> None:
    """What it redirects on that word must not find them shut."""

    async def scenario(w: World) -> None:
        driver: Any = w.driver("b")
        opening, may_open = driver.open, threading.Event()

        def slow(*arguments: Any, **options: Any) -> Any:
            assert may_open.wait(10.0)
            return opening(*arguments, **options)

        driver.open = slow
        w.hypervisor.converged = False
        await w.migrate("b")
        await reach(w, "b", "loading")
        w.hypervisor.place, w.hypervisor.moving = "b", ""
        w.hypervisor.resume("b", "migrated")
        await reach(w, "b", "waiting")
        end: Any = end_of(w, "b", Role.DESTINATION)
        asking = asyncio.create_task(end.ask())
        try:
            done, _ = await asyncio.wait({asking}, timeout=0.3)
            assert not done, asking.result()
        finally:
            may_open.set()
        answer = await asyncio.wait_for(asking, 5.0)
        assert answer.opened and len(w.active("b")) == 2

    run(scenario, tmp_path, "a", "b", last_changes_s=60.0)


def test_a_guest_that_stands_where_its_move_was_given_up_is_started_by_the_next_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The move fails while we stop the guest, and our agent dies before it hears that the guest has stopped."""

    async def scenario(w: World) -> None:
        async def unheard(side: Side, vm: str) -> None:
            assert vm == VM
            side.all.moving, side.all.running = "", False

        async def never(*_: Any, **__: Any) -> bool:
            return await asyncio.Event().wait()

        monkeypatch.setattr(Side, "suspend", unheard)
        monkeypatch.setattr(Side, "cancel", never)
        migration = await w.migrate("b")
        await eventually(lambda: not w.hypervisor.running)
        end_of(w, "a", Role.SOURCE).post(aw.Failed("the move failed"))
        await reach(w, "a", "aborting")
        await w.stop("a")
        monkeypatch.undo()
        await w.start("a")
        await eventually(lambda: w.hypervisor.running)
        assert w.hypervisor.place == "a"
        assert (await w.finish(migration)).outcome == "aborted"
        assert len(w.active("a")) == 2

    run(scenario, tmp_path, "a", "b")


def test_the_last_word_of_a_destination_that_purges_is_not_of_its_commit() -> None:
    """The commit was under way when the guest was back at its source: who was away would wait for a guest here."""
    committing = b.State(phase=bw.Phase.COMMITTING, committing=True, asked=True)
    state, actions = b.step(committing, bw.SourceAborted("the guest runs at the source again"))
    assert [type(action) for action in actions] == [bw.Answer, bw.Purge, bw.Tell]
    assert b.step(state, bw.CommitDone()) == (state, ())


def test_a_source_that_comes_back_is_asked_what_the_destinations_purge_left_open() -> None:
    """It was away when the destination said that it had purged, and has forgotten what it rolled back."""
    state, actions = c.step(c.State(phase=c.Phase.COMMITTED), c.Said(Role.DESTINATION, "aborted", "the guest is back"))
    assert actions == (c.Send(Role.SOURCE, c.Order.ABORT, "the guest is back"),)  # and nobody hears it
    state, again = c.step(state, c.Back(Role.SOURCE))
    assert again == actions
    state, _ = c.step(state, c.Said(Role.SOURCE, "aborted"))
    assert state.over


@pytest.mark.parametrize("phase", [c.Phase.COMMITTED, c.Phase.IN_DOUBT])
def test_a_source_that_comes_back_says_whether_it_has_forgotten(phase: c.Phase) -> None:
    """Its word that it has rolled back was lost with the coordinator, and its abort with the stream."""
    state, actions = c.step(c.State(phase=phase), c.Back(Role.SOURCE))
    assert actions == (c.Tell(Role.SOURCE, Verdict(guest_at=None)),)
    state, actions = c.step(state, c.Said(Role.SOURCE, "aborted"))  # as of a migration that is not known there
    assert actions == (c.Tell(Role.DESTINATION, Verdict(guest_at=Role.SOURCE)),)
