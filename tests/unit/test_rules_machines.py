"""Rules of the protocol that the pure machines keep, and one that takes all three parties."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.agent.stream import PeerStream
from migrator.lifecycle import coordinator as c
from migrator.lifecycle import destination as b
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source as a
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Guest, Role, Verdict
from tests.unit.pair import eventually, world


@pytest.mark.parametrize("strict", [False, True])
def test_a_guest_that_came_while_its_ports_were_staged_is_not_forgotten(strict: bool) -> None:
    state, _ = b.step(b.begin(strict=strict)[0], bw.GuestRunning())
    state, actions = b.step(state, bw.Staged())
    assert (bw.Open(degraded=True) in actions) is not strict
    assert state.phase is (bw.Phase.FENCED if strict else bw.Phase.OPENING)
    assert bw.Accept() in actions


@pytest.mark.parametrize("phase", [c.Phase.OPEN, c.Phase.DONE])
def test_a_source_that_was_away_learns_that_its_guest_has_left(phase: c.Phase) -> None:
    _, actions = c.step(c.State(phase=phase), c.Back(Role.SOURCE))
    assert actions == (c.Tell(Role.SOURCE, Verdict(guest_at=Role.DESTINATION, committed=True, opened=True)),)


@pytest.mark.parametrize("phase", sorted(bw.RUNNING | {bw.Phase.COMMITTED, bw.Phase.COMMITTING}))
def test_no_late_abort_takes_what_is_committed_or_runs(phase: bw.Phase) -> None:
    committed = phase is not bw.Phase.COMMITTING
    state = b.State(phase=phase, committed=committed, committing=not committed, guest=phase in bw.RUNNING)
    after, actions = b.step(state, bw.AbortAsked("late"))
    assert after.phase is phase
    assert bw.Purge() not in actions


@pytest.mark.parametrize("phase", sorted(aw.LEFT))
@pytest.mark.parametrize("event", [aw.AbortAsked("late"), aw.Authorised(), aw.GuestPaused(moving=True), aw.Held()])
def test_no_late_word_brings_back_a_source_that_has_left(phase: aw.Phase, event: Any) -> None:
    state = a.State(phase=phase, guest=Guest.GONE, authorised=True, final=True, drained=True)
    after, actions = a.step(state, event)
    assert after.phase is phase
    assert aw.Resume() not in actions


def test_a_source_whose_copy_begins_again_stops_no_guest_and_holds_no_frames() -> None:
    state, actions = a.step(a.State(phase=aw.Phase.HOLDING, authorised=True, peer=True), aw.Outrun())
    assert (state.phase, actions) == (aw.Phase.WATCHING, (aw.LetGo(), aw.Watch()))
    for phase in set(aw.Phase) - {aw.Phase.HOLDING}:
        before = a.State(phase=phase)
        assert a.step(before, aw.Outrun()) == (before, ())


@pytest.mark.parametrize("phase", sorted(set(bw.Phase) - {bw.Phase.LOADING, bw.Phase.WAITING}))
def test_nothing_is_committed_but_by_a_destination_that_loads(phase: bw.Phase) -> None:
    _, actions = b.step(b.State(phase=phase, guest=phase in bw.RUNNING), bw.FinalReceived())
    assert bw.Commit() not in actions


def test_rule_a_rule_that_was_withdrawn_on_the_way_stays_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's rules may come after the coordinator's newer ones: the destination ends with the newest."""

    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            send, changed = PeerStream.send, asyncio.Event()

            async def late(stream: PeerStream, message: pb.FromSource) -> None:
                if message.HasField("section"):
                    await changed.wait()
                await send(stream, message)

            monkeypatch.setattr(PeerStream, "send", late)

            def ports(host: str) -> list[str]:
                found = []
                for status in w.statuses(host):
                    tables = w.driver(host).dump(status.ref, "acl")
                    found += [p[0] for table in tables for rule in table.records or () for p in rule["ports"]]
                return sorted(set(found))

            migration = await w.migrate("b")
            await eventually(lambda: len(w.statuses("b")) == 2)
            await eventually(lambda: any(str(end.state.phase) == "copying" for end in w.agents["a"].ends))
            rule = pb.Rule(direction="to", action="allow", protocol="tcp", ports=["80"], priority=10)
            w.cluster.apply(pb.ApplyRequest(config=pb.Config(policies=[pb.Policy(name="web", rules=[rule])])))
            await eventually(lambda: ports("b") == [80])
            changed.set()
            assert (await w.finish(migration)).outcome == "complete"
            await eventually(lambda: ports("b") == [80])

    asyncio.run(scenario())


def told(state: b.State) -> list[str]:
    """What a destination says that is taken up again."""
    _, actions = b.step(state, bw.Restarted(guest=True, committed=True))
    return [action.what for action in actions if isinstance(action, bw.Tell)]


@pytest.mark.parametrize("phase", [bw.Phase.OPEN, bw.Phase.SETTLED])
def test_a_flaw_outlives_the_agent_that_told_it(phase: bw.Phase) -> None:
    assert "degraded" in told(b.State(phase=phase, guest=True, committed=True, degraded=True))
    assert "degraded" not in told(b.State(phase=phase, guest=True, committed=True))


@pytest.mark.parametrize("role", [Role.SOURCE, Role.DESTINATION])
def test_a_flaw_counts_though_the_opening_was_known_before(role: Role) -> None:
    """The coordinator has seen that the port is active, from what an agent said of its ports when it came back."""
    state, _ = c.step(c.State(phase=c.Phase.OPEN), c.Said(role, "degraded", "the last changes are missing"))
    _, actions = c.step(state, c.Said(Role.SOURCE, "settled"))
    assert c.Finish(c.Outcome.DEGRADED, "the last changes are missing") in actions
