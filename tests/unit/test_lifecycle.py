"""Each machine alone: every event in every phase, and the rows of the protocol's table one by one."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest

from migrator.lifecycle import coordinator as c
from migrator.lifecycle import destination as b
from migrator.lifecycle import destination_words as bw
from migrator.lifecycle import source as a
from migrator.lifecycle import source_words as aw
from migrator.lifecycle.machine import Action, Event, Guest, Outcome, Role, Verdict

A, B = Role.SOURCE, Role.DESTINATION
VALUES: dict[str, list[Any]] = {
    "reason": ["why"],
    "role": list(Role),
    "guest_at": [A, B, None],
    "what": [*c.WORDS, "running"],
    "moving": [True, False],
    "moved": [True, False],
}


def events(module: Any, phases: Any) -> list[Event]:
    """Every event of a machine with every value that its fields can have."""
    found: list[Event] = []
    for kind in sorted(module.EVENTS, key=lambda k: k.__name__):
        names = [field.name for field in fields(kind)]
        choices = [_values(kind, name, phases) for name in names]
        found += [kind(**dict(zip(names, values, strict=True))) for values in itertools.product(*choices)]
    return found


def _values(kind: type, name: str, phases: Any) -> list[Any]:
    if name == "phase":
        return list(phases)
    if name == "guest":
        return list(Guest) if kind is aw.Restarted else [True, False]
    if name == "guest_at" and kind is c.Resolved:
        return [A, B]
    return VALUES.get(name, [True, False])


def states(module: Any, phases: Any) -> list[Any]:
    """Every phase with every combination of flags."""
    choices = {"phase": list(phases), "guest": list(Guest) if module is a else [True, False]}
    choices |= {"reason": [""], "ended": [frozenset(), frozenset({A}), frozenset({B}), frozenset(Role)]}
    names = [field.name for field in fields(module.State)]
    product = itertools.product(*(choices.get(name, [True, False]) for name in names))
    return [module.State(**dict(zip(names, values, strict=True))) for values in product]


MACHINES = [(a, aw.Phase), (b, bw.Phase), (c, c.Phase)]


@pytest.mark.parametrize(("module", "phases"), MACHINES, ids=["source", "destination", "coordinator"])
def test_every_event_is_defined_in_every_state(module: Any, phases: Any) -> None:
    every = events(module, phases)
    for state in states(module, phases):
        for event in every:
            after, actions = module.step(state, event)
            assert isinstance(after, module.State)
            assert all(isinstance(action, Action) for action in actions)


@pytest.mark.parametrize(("module", "phases"), MACHINES, ids=["source", "destination", "coordinator"])
def test_every_phase_can_be_reached(module: Any, phases: Any) -> None:
    first, _ = module.begin()
    seen, waiting = {first}, [first]
    every = events(module, phases)
    while waiting:
        state = waiting.pop()
        for event in every:
            after, _ = module.step(state, event)
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    assert {state.phase for state in seen} == set(phases)


def test_a_deadline_of_another_phase_is_stale() -> None:
    for module, phases in MACHINES:
        words: Any = {a: aw, b: bw, c: c}[module]
        for phase, other in itertools.permutations(phases, 2):
            state = module.State(phase=phase)
            assert module.step(state, words.Timeout(other)) == (state, ())


# ---- rows of the table "who is right after any loss" ----


@pytest.mark.parametrize("phase", sorted({*aw.STOPPING, *aw.UNSURE} - {aw.Phase.SUSPENDING}))
def test_rule_a_guest_that_runs_at_the_source_makes_it_active_without_asking(phase: aw.Phase) -> None:
    state, actions = a.step(a.State(phase=phase, guest=Guest.PAUSED, final=True), aw.GuestResumed())
    assert state.phase is aw.Phase.ABORTED
    assert actions[0] == aw.Resume()
    assert any(isinstance(action, aw.SendAbort) for action in actions)


@pytest.mark.parametrize("phase", sorted(aw.LEFT))
def test_a_source_that_redirects_is_never_active_again(phase: aw.Phase) -> None:
    for event in (
        aw.GuestResumed(),
        aw.AbortAsked(""),
        Verdict(guest_at=A),
        aw.PeerFailed(""),
        aw.Restarted(Guest.RUNNING),
    ):
        _, actions = a.step(a.State(phase=phase, guest=Guest.GONE), event)
        assert aw.Resume() not in actions


def test_the_destination_opens_what_is_committed_when_its_guest_runs() -> None:
    state, actions = b.step(b.State(phase=bw.Phase.COMMITTED, committed=True), bw.GuestRunning())
    assert (state.phase, actions) == (bw.Phase.OPENING, (bw.Open(degraded=False),))


def test_rule_the_destination_waits_a_moment_for_the_last_changes() -> None:
    state, actions = b.step(b.State(phase=bw.Phase.LOADING), bw.GuestRunning())
    assert (state.phase, actions) == (bw.Phase.WAITING, ())
    late, actions = b.step(state, bw.Timeout(bw.Phase.WAITING))
    assert late.degraded
    assert actions[0] == bw.Open(degraded=True)
    committed, _ = b.step(state, bw.FinalReceived())
    opening, actions = b.step(committed, bw.CommitDone())
    assert opening.phase is bw.Phase.OPENING
    assert actions[0] == bw.Open(degraded=False)


def test_strict_never_opens_without_the_last_changes() -> None:
    state = b.State(phase=bw.Phase.WAITING, strict=True, guest=True)
    for event in (bw.Timeout(bw.Phase.WAITING), bw.PeerLost(), bw.Failed("")):
        after, actions = b.step(state, event)
        assert after.phase is bw.Phase.FENCED
        assert not any(isinstance(action, bw.Open) for action in actions)


@pytest.mark.parametrize("phase", sorted(bw.RUNNING - {bw.Phase.SETTLED}))
def test_the_destination_never_aborts_under_a_running_guest(phase: bw.Phase) -> None:
    for event in (bw.SourceAborted(), bw.AbortAsked(""), Verdict(guest_at=A), Verdict(guest_at=None, gone=True)):
        _, actions = b.step(b.State(phase=phase, guest=True), event)
        assert bw.Purge() not in actions


def test_rule_asking_fences_a_destination_that_has_not_committed() -> None:
    state, actions = b.step(b.State(phase=bw.Phase.LOADING), bw.Asked())
    assert (state.phase, actions) == (bw.Phase.FENCED, (bw.Answer(),))
    assert b.step(state, bw.FinalReceived()) == (state, ())


def test_an_answer_waits_for_the_commit_that_is_under_way() -> None:
    state, actions = b.step(b.State(phase=bw.Phase.COMMITTING, committing=True), bw.Asked())
    assert actions == ()
    _, actions = b.step(state, bw.CommitDone())
    assert bw.Answer() in actions


def test_rule_final_is_never_sent_before_it_is_authorised() -> None:
    for state in states(a, aw.Phase):
        for event in events(a, aw.Phase):
            after, actions = a.step(state, event)
            if aw.SendFinal() in actions:
                assert after.authorised and after.final


def test_the_source_purges_only_what_is_confirmed_or_gone() -> None:
    confirmed = (aw.PeerSettled, aw.EndRedirect, aw.Timeout, aw.PeerFailed, aw.Failed, aw.Restarted)
    for state in states(a, aw.Phase):
        for event in events(a, aw.Phase):
            _, actions = a.step(state, event)
            if any(isinstance(action, aw.Purge) for action in actions):
                gone = isinstance(event, Verdict) and event.gone and state.guest is not Guest.RUNNING
                assert gone or (state.phase in aw.LEFT and isinstance(event, confirmed))


def test_neither_host_has_the_vm() -> None:
    gone = Verdict(guest_at=None, gone=True)
    state, actions = a.step(a.State(phase=aw.Phase.COMMITTED, guest=Guest.GONE), gone)
    assert (state.phase, actions[0]) == (aw.Phase.RELEASED, aw.Purge(keep_redirect=False))
    after, actions = b.step(b.State(phase=bw.Phase.COMMITTED, committed=True), gone)
    assert (after.phase, actions[0]) == (bw.Phase.ABORTED, bw.Purge())


# ---- the coordinator ----


@pytest.mark.parametrize("phase", sorted(c.UNDECIDED))
def test_a_vm_that_neither_host_has_is_purged_at_both_and_begins_anew(phase: c.Phase) -> None:
    gone = Verdict(guest_at=None, gone=True)
    state, actions = c.step(c.State(phase=phase), c.GuestsGone())
    assert actions == (c.Tell(A, gone), c.Tell(B, gone))
    assert [c.step(state, c.Back(role))[1] for role in (A, B)] == [(c.Tell(A, gone),), (c.Tell(B, gone),)]
    state, actions = c.step(state, c.Said(B, "aborted"))
    assert not any(isinstance(action, c.Finish | c.Renew) for action in actions)
    state, actions = c.step(state, c.Said(A, "aborted"))
    assert state.over
    assert actions == (c.Finish(Outcome.ABORTED, "neither host has the VM any more"), c.Renew())


def test_a_vm_that_runs_at_the_source_after_all_is_not_begun_anew() -> None:
    state, _ = c.step(c.State(phase=c.Phase.IN_DOUBT), c.GuestsGone())
    state, _ = c.step(state, c.Said(A, "rolled-back"))
    state, actions = c.step(state, c.Said(B, "aborted"))
    assert state.over and c.Renew() not in actions


@pytest.mark.parametrize("phase", sorted({*c.MOVED, *c.UNAUTHORISED}))
def test_a_vm_that_has_moved_or_never_left_is_not_looked_for(phase: c.Phase) -> None:
    assert c.step(c.State(phase=phase), c.GuestsGone()) == (c.State(phase=phase), ())


def test_an_abort_that_was_given_up_ends_when_the_vm_is_nowhere() -> None:
    given_up = c.State(phase=c.Phase.ABORTED, finished=True, ended=frozenset({B}))
    state, actions = c.step(given_up, c.GuestsGone())
    assert c.Tell(A, Verdict(guest_at=None, gone=True)) in actions
    state, actions = c.step(state, c.Said(A, "aborted"))
    assert state.over and actions == (c.Renew(),)


def test_what_is_not_authorised_is_undone_after_a_restart() -> None:
    for phase in c.UNAUTHORISED:
        state, actions = c.step(c.State(phase=phase), c.Restarted())
        assert state.phase in c.UNDONE
        assert not any(isinstance(action, c.Send) and action.order is c.Order.AUTHORISE for action in actions)
    for phase in c.UNDECIDED:
        assert c.step(c.State(phase=phase), c.Restarted()) == (c.State(phase=phase), ())


def test_the_outcome_is_told_once() -> None:
    for state in states(c, c.Phase):
        for event in events(c, c.Phase):
            after, actions = c.step(state, event)
            told = [action for action in actions if isinstance(action, c.Finish)]
            assert len(told) <= (0 if state.finished else 1)
            assert after.finished or not told


def test_an_abort_reaches_the_destination_after_the_source_has_confirmed() -> None:
    state, actions = c.step(c.State(phase=c.Phase.PRE_COPY), c.AbortAsked("why"))
    assert actions == (c.Send(A, c.Order.ABORT, "why"),)
    state, actions = c.step(state, c.Said(A, "rolled-back"))
    assert actions == (c.Tell(B, Verdict(guest_at=A)),)
    state, actions = c.step(state, c.Said(B, "aborted"))
    assert state.over
    assert actions == (c.Finish(Outcome.ABORTED, "why"),)


def test_the_redirect_ends_when_it_is_idle_and_all_know_the_place() -> None:
    done = c.State(phase=c.Phase.DONE, finished=True)
    end = (c.Send(A, c.Order.END_REDIRECT),)
    for first, second in itertools.permutations([c.PlacesKnown(), c.RedirectIdle()]):
        state, actions = c.step(done, first)
        assert actions == ()
        state, actions = c.step(state, second)
        assert (state.phase, actions) == (c.Phase.CLOSED, end)
    early, actions = c.step(c.step(replace(done, phase=c.Phase.OPEN), c.PlacesKnown())[0], c.RedirectIdle())
    assert (early.phase, actions) == (c.Phase.OPEN, ())
