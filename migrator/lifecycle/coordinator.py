"""The coordinator's machine: one migration as the coordinator sees it.

It decides until it has authorised the switchover; from then on the two agents need nobody, and it only listens, tells
either end what the other one lost, and moves the VM's place. The executor journals each new state durably before it
carries out the actions, and gives `Restarted` to every machine that it finds in the journal at start.

An abort goes to the source first and to the destination when the source has confirmed: only the source knows whether
the guest has already left, and a staged port must not be taken from under a guest that is on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from migrator.lifecycle.coordinator_words import (
    BOTH,
    MOVED,
    UNAUTHORISED,
    UNDECIDED,
    UNDONE,
    AbortAsked,
    Back,
    Described,
    Finish,
    GuestsGone,
    MovePlace,
    Order,
    Phase,
    PlacesKnown,
    Prepared,
    RedirectIdle,
    Refused,
    Renew,
    Resolved,
    Restarted,
    Said,
    Send,
    Started,
    Tell,
    Timeout,
)
from migrator.lifecycle.machine import Action, Event, Outcome, Role, Verdict

__all__ = [
    "BOTH",
    "EVENTS",
    "MOVED",
    "UNAUTHORISED",
    "UNDECIDED",
    "UNDONE",
    "WORDS",
    "AbortAsked",
    "Back",
    "Described",
    "Finish",
    "GuestsGone",
    "MovePlace",
    "Order",
    "Outcome",
    "Phase",
    "PlacesKnown",
    "Prepared",
    "RedirectIdle",
    "Refused",
    "Renew",
    "Resolved",
    "Restarted",
    "Role",
    "Said",
    "Send",
    "Started",
    "State",
    "Step",
    "Tell",
    "Timeout",
    "Verdict",
    "begin",
    "step",
]


@dataclass(frozen=True)
class State:
    """One migration. `ended`: Role values whose agent confirmed that it has nothing left to undo."""

    phase: Phase = Phase.DESCRIBING
    dry_run: bool = False
    degraded: bool = False
    reason: str = ""
    ended: frozenset[Role] = frozenset()
    rolled_back: bool = False  # the source said that the guest runs there
    gone: bool = False  # both hypervisors said that they do not have it
    finished: bool = False  # the outcome was told
    redirect_idle: bool = False
    places_known: bool = False

    @property
    def over(self) -> bool:
        """Nothing is left to be told or awaited: the journal may forget it."""
        return self.phase is Phase.CLOSED or (self.phase is Phase.ABORTED and self.ended == BOTH)


Step = tuple[State, tuple[Action, ...]]
A, B = Role.SOURCE, Role.DESTINATION
_GONE = Verdict(guest_at=None, gone=True)


def begin(*, dry_run: bool = False) -> Step:
    """A new migration and what to do first."""
    return State(dry_run=dry_run), (Send(A, Order.DESCRIBE),)


def step(state: State, event: Event) -> Step:
    """What `event` makes of `state`. Never raises for an event of this module or a Verdict."""
    handler = _HANDLERS.get(type(event))
    return handler(state, event) if handler else (state, ())


# ---- going on ----


def _described(state: State, _: Described) -> Step:
    if state.phase is not Phase.DESCRIBING:
        return state, ()
    return replace(state, phase=Phase.STAGING), (Send(B, Order.PREPARE),)


def _prepared(state: State, _: Prepared) -> Step:
    if state.phase is not Phase.STAGING:
        return state, ()
    if state.dry_run:
        state = replace(state, reason="dry run")
        undone = replace(state, phase=Phase.ABORTING, ended=frozenset({A}), finished=True)
        return undone, (*_finish(state, Outcome.COMPLETE), Send(B, Order.ABORT, "dry run"))
    return replace(state, phase=Phase.STARTING), (Send(A, Order.START),)


def _started(state: State, _: Started) -> Step:
    return (replace(state, phase=Phase.PRE_COPY) if state.phase is Phase.STARTING else state), ()


def _said(state: State, event: Said) -> Step:
    handler = _WORDS.get(event.what)
    return handler(state, event) if handler else (state, ())


def _converged(state: State, event: Said) -> Step:
    if event.role is A and state.phase in {Phase.STARTING, Phase.PRE_COPY, Phase.AUTHORISED}:
        return replace(state, phase=Phase.AUTHORISED), (Send(A, Order.AUTHORISE),)
    return state, ()


def _switching(state: State, event: Said) -> Step:
    if event.what == "paused" and state.phase in {Phase.STARTING, Phase.PRE_COPY}:
        return _converged(state, event)  # the guest stopped by itself: the tables follow as they are
    return (replace(state, phase=Phase.SWITCHOVER) if state.phase is Phase.AUTHORISED else state), ()


def _committed(state: State, _: Said) -> Step:
    return (replace(state, phase=Phase.COMMITTED) if state.phase in UNDECIDED else state), ()


def _opened(state: State, event: Said) -> Step:
    """The guest runs at the destination, whatever was thought before."""
    if event.what == "degraded" and (event.role is A or state.phase in MOVED):
        return replace(state, degraded=True, reason=state.reason or event.reason), ()
    if state.phase in MOVED:
        return state, ()
    degraded = state.degraded or event.what == "degraded"
    moved = replace(state, phase=Phase.OPEN, degraded=degraded, reason=event.reason or state.reason, ended=frozenset())
    return moved, (MovePlace(), Tell(A, Verdict(guest_at=B, committed=True, opened=True)))


def _settled(state: State, event: Said) -> Step:
    if event.role is not A or state.phase in MOVED - {Phase.OPEN}:
        return state, ()
    state, missed = _opened(state, event)
    outcome = Outcome.DEGRADED if state.degraded else Outcome.COMPLETE
    return _close_redirect(replace(state, phase=Phase.DONE), *missed, *_finish(state, outcome))


# ---- undoing ----


def _rolled_back(state: State, event: Said) -> Step:
    """The source has the VM and its ports are active; or the destination has purged what it staged."""
    if state.phase in MOVED:
        return state, ()
    if event.what == "rolled-back" and event.role is A:
        state = replace(state, gone=False)
    if event.role is B:
        return _ended(state, B, event.reason, (Send(A, Order.ABORT, event.reason),))
    return _ended(replace(state, rolled_back=True), A, event.reason, (Tell(B, Verdict(guest_at=A)),))


def _ended(state: State, role: Role, reason: str, other: tuple[Action, ...]) -> Step:
    ended = state.ended | {role}
    state = replace(state, ended=ended, reason=state.reason or reason)
    if state.phase in UNDECIDED and role is B:
        return state, other  # the source knows where the guest is and says so next
    if ended != BOTH:
        return replace(state, phase=Phase.ABORTING), other
    renew = (Renew(),) if state.gone else ()
    if state.phase is Phase.ABORTED:
        return state, renew
    return replace(state, phase=Phase.ABORTED, finished=True), (*_finish(state, Outcome.ABORTED), *renew)


def _failed(state: State, event: Said) -> Step:
    if state.phase in UNAUTHORISED:
        return _abort(state, event.reason)
    return replace(state, reason=state.reason or event.reason), ()


def _refused(state: State, event: Refused) -> Step:
    if state.phase not in {Phase.DESCRIBING, Phase.STAGING, Phase.STARTING}:
        return state, ()
    finished = _finish(replace(state, reason=event.reason), Outcome.REFUSED)
    refused = replace(state, reason=event.reason, finished=True)
    if state.phase is Phase.DESCRIBING:
        return replace(refused, phase=Phase.ABORTED, ended=BOTH), finished
    # What of it was done may still have to be undone: the answer says only that it did not all succeed.
    if state.phase is Phase.STARTING:
        return replace(refused, phase=Phase.ABORTING), (*finished, Send(A, Order.ABORT, event.reason))
    undone = replace(refused, phase=Phase.ABORTING, ended=frozenset({A}))
    return undone, (*finished, Send(B, Order.ABORT, event.reason))


def _abort(state: State, reason: str) -> Step:
    state = replace(state, reason=reason)
    if state.phase is Phase.DESCRIBING:
        return replace(state, phase=Phase.ABORTED, ended=BOTH, finished=True), _finish(state, Outcome.ABORTED)
    if state.phase is Phase.STAGING:
        return replace(state, phase=Phase.ABORTING, ended=frozenset({A})), (Send(B, Order.ABORT, reason),)
    return replace(state, phase=Phase.ABORTING), (Send(A, Order.ABORT, reason),)


def _abort_asked(state: State, event: AbortAsked) -> Step:
    if state.phase in UNAUTHORISED:
        return _abort(state, event.reason)
    if state.phase in UNDECIDED:
        return state, (Send(A, Order.ABORT, event.reason),)  # the source decides: it knows where the guest is
    return state, ()


def _timeout(state: State, event: Timeout) -> Step:
    if event.phase is not state.phase:
        return state, ()
    reason = f"deadline of phase {state.phase.reported} passed"
    if state.phase in UNAUTHORISED:
        return _abort(state, reason)
    if state.phase in UNDECIDED:
        return replace(state, phase=Phase.IN_DOUBT, reason=state.reason or reason), ()
    if state.phase is Phase.OPEN:
        late = replace(state, degraded=True, reason="accounting was not settled in time")
        return _close_redirect(replace(late, phase=Phase.DONE), *_finish(late, Outcome.DEGRADED))
    if state.phase is Phase.ABORTING:
        given_up = replace(state, phase=Phase.ABORTED, finished=True)
        silent = ", ".join(sorted(BOTH - state.ended))
        reason = f"{state.reason or 'aborted'}; no confirmation from {silent} yet"
        return given_up, _finish(replace(state, reason=reason), Outcome.ABORTED)
    return state, ()


# ---- after a loss ----


def _back(state: State, event: Back) -> Step:
    role = event.role
    if state.phase in {Phase.DESCRIBING, Phase.STAGING, Phase.STARTING}:
        return _abort(state, f"the {role} agent was lost while preparing")
    if state.phase in UNDONE and role not in state.ended:
        return state, _repeat_abort(state, role)
    if role is B and state.phase in UNDECIDED:
        return state, (Tell(B, Verdict(guest_at=None)),)  # nobody has said that the guest is at the source
    if role is A and state.phase in UNDECIDED and B in state.ended:
        return state, (Send(A, Order.ABORT, state.reason),)  # it was away when the destination had purged
    if role is A and state.phase in {Phase.COMMITTED, Phase.IN_DOUBT}:
        return state, (Tell(A, Verdict(guest_at=None)),)  # one that has forgotten it says that it has nothing of it
    if role is A and state.phase in {Phase.AUTHORISED, Phase.SWITCHOVER}:
        return state, (Send(A, Order.AUTHORISE),)
    if role is A and state.phase in {Phase.OPEN, Phase.DONE}:
        return state, (Tell(A, Verdict(guest_at=B, committed=True, opened=True)),)
    if role is A and state.phase is Phase.CLOSED:
        return state, (Send(A, Order.END_REDIRECT),)
    return state, ()


def _guests_gone(state: State, _: GuestsGone) -> Step:
    """Only who waits for its guest has to hear it: a source that has ended has its ports as they are to be."""
    if state.phase not in UNDECIDED | UNDONE or A in state.ended:
        return state, ()
    phase = state.phase if state.phase in UNDONE else Phase.ABORTING
    state = replace(state, phase=phase, gone=True, reason="neither host has the VM any more")
    return state, (Tell(A, _GONE), Tell(B, _GONE))


def _repeat_abort(state: State, role: Role) -> tuple[Action, ...]:
    if state.gone:
        return (Tell(role, _GONE),)
    if role is A:
        return (Send(A, Order.ABORT, state.reason),)
    if state.rolled_back:
        return (Tell(B, Verdict(guest_at=A)),)
    if A in state.ended:
        return (Send(B, Order.ABORT, state.reason),)
    return ()  # the source has not said yet that the guest is there


def _restarted(state: State, _: Restarted) -> Step:
    if state.phase in UNAUTHORISED:
        return _abort(state, "the coordinator was restarted before it had authorised the switchover")
    return state, ()


def _resolved(state: State, event: Resolved) -> Step:
    if state.phase in MOVED:
        return state, ()
    if event.guest_at is A:
        verdict = Verdict(guest_at=A)
        aborting = replace(state, phase=Phase.ABORTING, reason="resolved by the operator", rolled_back=True)
        return aborting, (Tell(A, verdict), Tell(B, verdict))
    verdict = Verdict(guest_at=B, committed=state.phase is Phase.COMMITTED)
    return state, (Tell(B, verdict),)  # the destination opens, says so, and the source is told by that


# ---- the end of the redirect ----


def _places_known(state: State, _: PlacesKnown) -> Step:
    return _close_redirect(replace(state, places_known=True))


def _redirect_idle(state: State, _: RedirectIdle) -> Step:
    return _close_redirect(replace(state, redirect_idle=True))


def _close_redirect(state: State, *actions: Action) -> Step:
    if state.phase is Phase.DONE and state.places_known and state.redirect_idle:
        return replace(state, phase=Phase.CLOSED, finished=True), (*actions, Send(A, Order.END_REDIRECT))
    finished = any(isinstance(action, Finish) for action in actions)
    return (replace(state, finished=True) if finished else state), actions


def _finish(state: State, outcome: Outcome) -> tuple[Action, ...]:
    return () if state.finished else (Finish(outcome, state.reason),)


_WORDS: dict[str, Callable[[State, Said], Step]] = {
    "converged": _converged,
    "held": _switching,
    "paused": _switching,
    "committed": _committed,
    "opened": _opened,
    "degraded": _opened,
    "redirecting": _opened,
    "settled": _settled,
    "rolled-back": _rolled_back,
    "aborted": _rolled_back,
    "failed": _failed,
}
WORDS = frozenset(_WORDS)

_HANDLERS: dict[type[Event], Callable[[State, Any], Step]] = {
    Described: _described,
    Prepared: _prepared,
    Started: _started,
    Refused: _refused,
    Said: _said,
    Back: _back,
    Restarted: _restarted,
    AbortAsked: _abort_asked,
    Resolved: _resolved,
    GuestsGone: _guests_gone,
    Timeout: _timeout,
    PlacesKnown: _places_known,
    RedirectIdle: _redirect_idle,
}
EVENTS = frozenset(_HANDLERS)
