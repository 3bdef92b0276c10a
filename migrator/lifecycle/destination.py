"""The destination's machine: the host that the VM comes to.

A port opens only when the guest runs here. Committed or not is its second question: if not, it waits a moment for
the rest and then opens with what it has, because a guest without network helps nobody (strict mode: it stays shut). It
purges only on the word of who knows where the guest is. Once it is `fenced` it commits nothing any more, so that a
source which has lost sight of it can be certain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from migrator.lifecycle.destination_words import (
    RUNNING,
    UNCOMMITTED,
    AbortAsked,
    Accept,
    Answer,
    Asked,
    Begun,
    CloseAccounts,
    Commit,
    CommitDone,
    Failed,
    FinalReceived,
    GuestGone,
    GuestRunning,
    Open,
    OpenBroadcast,
    Opened,
    PeerLost,
    Phase,
    Purge,
    Redirecting,
    Refuse,
    Restarted,
    SendCommitted,
    SendFailed,
    SendOpened,
    SendReady,
    SendSettled,
    SettleEnd,
    SourceAborted,
    Stage,
    Staged,
    Tell,
    Timeout,
)
from migrator.lifecycle.machine import Action, Event, Role, Verdict


@dataclass(frozen=True)
class State:
    """One migration at its destination."""

    phase: Phase = Phase.STAGING
    strict: bool = False
    guest: bool = False  # runs here
    committed: bool = False
    committing: bool = False
    asked: bool = False  # an answer is owed when the commit is decided
    degraded: bool = False
    returned: bool = False  # the source came back to settle before the ports were open


Step = tuple[State, tuple[Action, ...]]


def begin(*, strict: bool = False) -> Step:
    return State(strict=strict), (Stage(),)


def step(state: State, event: Event) -> Step:
    """What `event` makes of `state`. Never raises for an event of this module or a Verdict."""
    handler = _HANDLERS.get(type(event))
    return handler(state, event) if handler else (state, ())


# ---- going on ----


def _staged(state: State, _: Staged) -> Step:
    if state.phase is not Phase.STAGING:
        return state, ()
    state = replace(state, phase=Phase.STAGED)
    if not state.guest:
        return state, (Accept(),)
    state, actions = _degrade(state, "the guest came before its ports were there")
    return state, (Accept(), *actions)


def _begun(state: State, _: Begun) -> Step:
    if state.phase is Phase.STAGED:
        return replace(state, phase=Phase.LOADING), (SendReady(),)
    if state.phase in {Phase.OPEN, Phase.SETTLED}:
        return state, (SendReady(),)  # the source comes back to settle
    if state.phase is Phase.OPENING:
        return replace(state, returned=True), ()
    return state, (SendFailed(f"the destination is {state.phase}"),)


def _final(state: State, _: FinalReceived) -> Step:
    if state.phase is Phase.LOADING:
        return replace(state, phase=Phase.COMMITTING, committing=True), (Commit(),)
    if state.phase is Phase.WAITING and not state.committing:
        return replace(state, committing=True), (Commit(),)
    return state, ()


def _commit_done(state: State, _: CommitDone) -> Step:
    if not state.committing:
        return state, ()
    answer = (Answer(),) if state.asked else ()
    state = replace(state, committing=False, committed=True, asked=False)
    actions: tuple[Action, ...] = (SendCommitted(), *answer, Tell("committed"))
    if state.phase is Phase.COMMITTING:
        state = replace(state, phase=Phase.COMMITTED)
    if state.guest and state.phase in {Phase.COMMITTED, Phase.WAITING}:
        return replace(state, phase=Phase.OPENING), (Open(degraded=False), *actions)
    return state, actions


def _opened(state: State, _: Opened) -> Step:
    if state.phase is not Phase.OPENING:
        return state, ()
    ready = (SendReady(),) if state.returned else ()
    tell = Tell("degraded" if state.degraded else "opened")
    return replace(state, phase=Phase.OPEN, returned=False), (SendOpened(), Answer(), *ready, tell)


def _redirecting(state: State, _: Redirecting) -> Step:
    return state, (OpenBroadcast(),) if state.phase in {Phase.OPEN, Phase.SETTLED} else ()


def _settle_end(state: State, _: SettleEnd) -> Step:
    if state.phase is Phase.SETTLED:
        return state, (SendSettled(),)
    if state.phase is not Phase.OPEN:
        return state, ()
    return replace(state, phase=Phase.SETTLED), (CloseAccounts(), SendSettled(), Tell("settled"))


# ---- the guest ----


def _guest_running(state: State, _: Event) -> Step:
    if state.phase in RUNNING or state.phase is Phase.ABORTED:
        return replace(state, guest=True), ()
    state = replace(state, guest=True)
    if state.phase is Phase.COMMITTED:
        return replace(state, phase=Phase.OPENING), (Open(degraded=False),)
    if state.phase is Phase.LOADING:
        return replace(state, phase=Phase.WAITING), ()
    if state.phase is Phase.COMMITTING:
        return state, ()
    return _degrade(state, "the guest runs here and the last changes are missing")


def _degrade(state: State, reason: str) -> Step:
    """The guest runs here and no more will come."""
    if state.phase is Phase.STAGING:
        return state, ()
    if state.strict:
        return replace(state, phase=Phase.FENCED), (Tell("failed", f"{reason}; strict: the ports stay shut"),)
    opening = replace(state, phase=Phase.OPENING, degraded=True)
    return opening, (Open(degraded=True), Tell("running", reason))


def _guest_gone(state: State, _: GuestGone) -> Step:
    state = replace(state, guest=False)
    if state.phase is Phase.WAITING:
        phase = Phase.COMMITTING if state.committing else Phase.FENCED
        return replace(state, phase=phase), ()
    return state, ()


# ---- undoing ----


def _failed(state: State, event: Failed) -> Step:
    if state.phase is Phase.STAGING:
        return replace(state, phase=Phase.ABORTED), (Purge(), Refuse(event.reason))
    if state.phase is Phase.OPENING:
        return state, (Tell("failed", event.reason),)  # tried again at its deadline
    if state.phase not in {Phase.LOADING, Phase.COMMITTING, Phase.WAITING}:
        return state, ()
    answer = (Answer(),) if state.asked else ()
    state = replace(state, phase=Phase.FENCED, committing=False, asked=False)
    actions: tuple[Action, ...] = (SendFailed(event.reason), *answer, Tell("failed", event.reason))
    if not state.guest:
        return state, actions
    state, more = _degrade(state, event.reason)
    return state, (*actions, *more)


def _purge(state: State, reason: str) -> Step:
    owed = (Answer(),) if state.asked else ()
    # Its last word is this one, though a commit may be under way that ends before the purge begins.
    return replace(state, phase=Phase.ABORTED, committing=False, asked=False), (*owed, Purge(), Tell("aborted", reason))


def _source_aborted(state: State, event: SourceAborted) -> Step:
    if state.phase is Phase.ABORTED:
        return state, (Tell("aborted", event.reason),)
    if state.guest or state.phase in RUNNING:
        return state, (Tell("running", "the guest runs here"),)
    return _purge(state, event.reason)


def _abort_asked(state: State, event: AbortAsked) -> Step:
    if state.phase is Phase.ABORTED:
        return state, (Tell("aborted", event.reason),)
    if state.phase in UNCOMMITTED and not state.guest:
        return _purge(state, event.reason)
    return state, (Tell("committed" if state.committed else "running"),)


def _peer_lost(state: State, _: PeerLost) -> Step:
    if state.phase is Phase.LOADING:
        return replace(state, phase=Phase.FENCED), ()
    if state.phase is Phase.WAITING and not state.committing:
        return _degrade(state, "the source was lost before the last changes came")
    return state, ()


def _asked(state: State, _: Asked) -> Step:
    if state.committing:
        return replace(state, asked=True), ()
    if state.phase in {Phase.STAGED, Phase.LOADING}:
        return replace(state, phase=Phase.FENCED), (Answer(),)
    if state.phase is Phase.WAITING:
        state, actions = _degrade(state, "the source was lost before the last changes came")
        return state, (Answer(), *actions)
    return state, (Answer(),)


def _verdict(state: State, event: Verdict) -> Step:
    if event.guest_at is Role.SOURCE:
        return _source_aborted(state, SourceAborted("the guest is at the source"))
    if event.guest_at is Role.DESTINATION:
        return _guest_running(state, event)
    if event.gone and not state.guest and state.phase not in RUNNING | {Phase.ABORTED}:
        return _purge(state, "the VM is gone")
    return state, ()


def _timeout(state: State, event: Timeout) -> Step:
    if event.phase is not state.phase:
        return state, ()
    if state.phase is Phase.STAGED:
        return _purge(state, "the source never came")
    if state.phase is Phase.WAITING and not state.committing:
        return _degrade(state, "the guest runs here and the last changes did not come")
    if state.phase is Phase.OPENING:
        return state, (Open(degraded=state.degraded),)
    if state.phase is Phase.OPEN:
        reason = "accounting of the source did not come"
        settled = replace(state, phase=Phase.SETTLED)
        return settled, (OpenBroadcast(), CloseAccounts(), Tell("degraded", reason), Tell("settled", reason))
    if state.phase in {Phase.COMMITTED, Phase.FENCED}:
        return state, (Tell("failed", f"{state.phase}, and the guest has not come"),)
    return state, ()


def _restarted(state: State, event: Restarted) -> Step:
    state = replace(state, guest=event.guest, committed=event.committed, committing=False, asked=False)
    if state.phase in _AGAIN:
        flaw = (Tell("degraded"),) if state.degraded else ()
        return state, (*flaw, *_AGAIN[state.phase])
    if not event.committed:
        state = replace(state, phase=Phase.FENCED)
        return _degrade(state, "the agent was restarted during the transfer") if event.guest else (state, ())
    if event.guest or state.phase is Phase.OPENING:
        return replace(state, phase=Phase.OPENING), (Open(degraded=state.degraded),)
    return replace(state, phase=Phase.COMMITTED), (Tell("committed"),)


_AGAIN: dict[Phase, tuple[Action, ...]] = {
    # What the earlier run may not have done any more. All of it may be done twice.
    Phase.OPEN: (Tell("opened"),),
    Phase.SETTLED: (OpenBroadcast(), CloseAccounts(), Tell("settled")),
    Phase.ABORTED: (Purge(), Tell("aborted")),
}

_HANDLERS: dict[type[Event], Callable[[State, Any], Step]] = {
    Staged: _staged,
    Begun: _begun,
    FinalReceived: _final,
    CommitDone: _commit_done,
    Failed: _failed,
    GuestRunning: _guest_running,
    GuestGone: _guest_gone,
    Opened: _opened,
    Redirecting: _redirecting,
    SettleEnd: _settle_end,
    SourceAborted: _source_aborted,
    PeerLost: _peer_lost,
    Asked: _asked,
    AbortAsked: _abort_asked,
    Timeout: _timeout,
    Restarted: _restarted,
    Verdict: _verdict,
}
EVENTS = frozenset(_HANDLERS)
