"""The source's machine: the host that the VM leaves.

Until it sends `final` nothing can happen at the destination that it has not seen, so it may give up alone. From `final`
on only the guest decides: it runs here again (roll back at once, unasked) or there (redirect). What it never does
is to let a port pass frames whose guest may be elsewhere, or to delete what the destination has not confirmed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from migrator.lifecycle.machine import Action, Event, Guest, Role, Verdict
from migrator.lifecycle.source_words import (
    EARLY,
    LEFT,
    STOPPING,
    UNSURE,
    AbortAsked,
    Ask,
    Authorised,
    Cancel,
    CancelFailed,
    Connect,
    Converged,
    Copy,
    Drain,
    Drained,
    EndRedirect,
    Failed,
    GuestFits,
    GuestGone,
    GuestPaused,
    GuestResumed,
    Held,
    Hold,
    LetGo,
    Outrun,
    PeerCommitted,
    PeerFailed,
    PeerLost,
    PeerOpened,
    PeerSaid,
    PeerSettled,
    Phase,
    Probe,
    Probed,
    Purge,
    Ready,
    Redirect,
    Redirected,
    Restarted,
    Resume,
    SendAbort,
    SendFinal,
    Settle,
    Shut,
    Suspend,
    Tell,
    Timeout,
    Wake,
    Watch,
)


@dataclass(frozen=True)
class State:
    """One migration at its source."""

    phase: Phase = Phase.PROBING
    guest: Guest = Guest.RUNNING
    authorised: bool = False
    peer: bool = False  # the stream is up and the destination has not failed
    final: bool = False  # `final` may have been sent: the destination may have committed
    suspended: bool = False  # we have told the hypervisor to stop the guest
    drained: bool = False  # everything has been sent since the guest stopped
    opened: bool = False  # the destination has said on this stream that its ports are open: it takes accounting
    lacks: bool = False  # they opened without all of the state, and may have it now


Step = tuple[State, tuple[Action, ...]]


def begin() -> Step:
    return State(), (Probe(),)


def step(state: State, event: Event) -> Step:
    """What `event` makes of `state`. Never raises for an event of this module or a Verdict."""
    handler = _HANDLERS.get(type(event))
    return handler(state, event) if handler else (state, ())


# ---- going on ----


def _probed(state: State, _: Probed) -> Step:
    return (replace(state, phase=Phase.CONNECTING), (Connect(),)) if state.phase is Phase.PROBING else (state, ())


def _ready(state: State, _: Ready) -> Step:
    if state.phase is Phase.SETTLING:
        return replace(state, peer=True), ()  # it says next how its ports opened
    if state.phase is not Phase.CONNECTING:
        return state, ()
    state = replace(state, peer=True)
    if state.guest is Guest.RUNNING:
        return replace(state, phase=Phase.COPYING), (Copy(),)
    return replace(state, phase=Phase.DRAINING), (Drain(follow=True),)


def _converged(state: State, _: Converged) -> Step:
    if state.phase is not Phase.COPYING:
        return state, ()
    if state.authorised:
        return replace(state, phase=Phase.WATCHING), (Watch(),)
    return replace(state, phase=Phase.CONVERGED), (Tell("converged"),)


def _authorised(state: State, _: Authorised) -> Step:
    state = replace(state, authorised=True)
    if state.phase is Phase.CONVERGED:
        return replace(state, phase=Phase.WATCHING), (Watch(),)
    if state.phase is Phase.DRAINED:
        return replace(state, phase=Phase.FINAL, final=True), (SendFinal(),)
    return state, ()


def _guest_fits(state: State, _: GuestFits) -> Step:
    return (replace(state, phase=Phase.HOLDING), (Hold(),)) if state.phase is Phase.WATCHING else (state, ())


def _held(state: State, _: Held) -> Step:
    if state.phase is not Phase.HOLDING:
        return state, ()
    return replace(state, phase=Phase.SUSPENDING, suspended=True), (Suspend(), Tell("held"))


def _outrun(state: State, _: Outrun) -> Step:
    """No guest stands for a whole copy: back to where one is waited for."""
    return (replace(state, phase=Phase.WATCHING), (LetGo(), Watch())) if state.phase is Phase.HOLDING else (state, ())


def _drained(state: State, _: Drained) -> Step:
    if state.phase not in {Phase.DRAINING, Phase.ABORTING}:
        return state, ()
    state = replace(state, drained=True)
    if state.phase is Phase.ABORTING:
        return state, ()
    if state.authorised:
        return replace(state, phase=Phase.FINAL, final=True), (SendFinal(), Tell("paused"))
    return replace(state, phase=Phase.DRAINED), (Tell("paused"),)


def _peer_committed(state: State, _: PeerCommitted) -> Step:
    if state.phase in {Phase.FINAL, Phase.ABORTING}:
        return replace(state, phase=Phase.COMMITTED), (Tell("committed"),)
    return state, ()


def _peer_opened(state: State, event: Event) -> Step:
    if isinstance(event, PeerOpened) and state.peer and not state.opened:
        state = replace(state, opened=True, lacks=event.lacks)
        if state.phase is Phase.SETTLING:  # somebody else had known it before, or the stream is a new one
            return state, (Settle(late=state.lacks),)
    if state.phase in LEFT or (state.phase is Phase.ABORTED and state.guest is Guest.RUNNING):
        return state, ()
    return replace(state, phase=Phase.REDIRECTING), (Redirect(),)


def _redirected(state: State, _: Redirected) -> Step:
    if state.phase is not Phase.REDIRECTING:
        return state, ()
    settling = replace(state, phase=Phase.SETTLING)
    if not state.peer:
        return settling, (Tell("redirecting"), Connect())
    return settling, (Tell("redirecting"), *((Settle(late=state.lacks),) if state.opened else ()))


def _peer_settled(state: State, _: PeerSettled) -> Step:
    if state.phase is not Phase.SETTLING:
        return state, ()
    return replace(state, phase=Phase.STUB), (Purge(keep_redirect=True), Tell("settled"))


def _end_redirect(state: State, _: EndRedirect) -> Step:
    if state.phase not in LEFT or state.phase is Phase.RELEASED:
        return state, ()
    return replace(state, phase=Phase.RELEASED), (Purge(keep_redirect=False),)


# ---- the guest ----


def _guest_paused(state: State, event: GuestPaused) -> Step:
    if not event.moving and not (state.suspended and state.phase in {Phase.SUSPENDING, Phase.ABORTING, Phase.ABORTED}):
        return state, ()
    if not event.moving:
        # We stopped a guest whose move had ended by itself meanwhile: nobody but us will start it.
        return replace(state, phase=_after_wake(state.phase), guest=Guest.PAUSED), (Wake(),)
    led = state.phase is Phase.SUSPENDING
    state = replace(state, guest=Guest.PAUSED)
    if state.phase in {Phase.PROBING, Phase.CONNECTING}:
        return state, (Shut(),)
    if state.phase in EARLY or led:
        return replace(state, phase=Phase.DRAINING), (Drain(follow=not led),)
    return state, (Shut(),) if state.phase is Phase.ABORTING else ()


def _after_wake(phase: Phase) -> Phase:
    return Phase.ABORTING if phase is Phase.SUSPENDING else phase


def _guest_resumed(state: State, _: GuestResumed) -> Step:
    stopped = state.guest is not Guest.RUNNING
    state = replace(state, guest=Guest.RUNNING)
    if state.phase in LEFT or state.phase is Phase.ABORTED:
        return state, ()
    if state.phase in EARLY and not stopped:
        return state, ()
    if state.phase is Phase.SUSPENDING:
        return state, ()  # of an earlier pause: ours has not been seen yet
    return _roll_back(state, "the guest runs at the source again")


def _guest_gone(state: State, event: GuestGone) -> Step:
    if event.moved and state.phase in EARLY | {Phase.SUSPENDING}:
        state, actions = _guest_paused(state, GuestPaused(moving=True))
        return replace(state, guest=Guest.GONE), actions
    early = state.phase in EARLY
    state = replace(state, guest=Guest.GONE)
    if early:
        return _end(state, "aborted", "the VM ended during the migration")
    if event.moved or state.phase in LEFT | {Phase.ABORTED}:
        return state, ()
    return state, (Tell("failed", "the VM ended at the source"),)


# ---- undoing ----


def _roll_back(state: State, reason: str) -> Step:
    return _end(replace(state, guest=Guest.RUNNING), "rolled-back", reason)


def _end(state: State, what: str, reason: str) -> Step:
    return replace(state, phase=Phase.ABORTED), (Resume(), SendAbort(reason), Tell(what, reason))


def _give_up(state: State, reason: str) -> Step:
    """End it if nothing moves the guest yet, else see that it stays: only then may the destination purge."""
    if state.phase in {Phase.PROBING, Phase.CONNECTING} and state.guest is Guest.RUNNING:
        return _end(state, "aborted", reason)
    if state.phase in EARLY | STOPPING:
        shut = () if state.guest is Guest.RUNNING else (Shut(),)
        ask = () if state.peer else (Ask(),)
        aborting = replace(state, phase=Phase.ABORTING)
        return aborting, (*shut, *ask, Cancel(certain=True), Tell("failed", reason))
    return state, ()


def _abort_asked(state: State, event: AbortAsked) -> Step:
    if state.phase is Phase.ABORTED:
        return state, (Tell("aborted", event.reason),)
    if state.phase in {Phase.FINAL, Phase.COMMITTED}:
        return state, (Cancel(certain=False),)
    return _give_up(state, event.reason)


def _failed(state: State, event: Failed) -> Step:
    if state.phase is Phase.REDIRECTING:
        settling, actions = _redirected(state, Redirected())
        return settling, (Tell("degraded", event.reason), *actions)
    if state.phase is Phase.SETTLING:
        return _unsettled(state, event.reason)
    if state.phase is Phase.SUSPENDING or state.phase in EARLY | STOPPING:
        return _give_up(state, event.reason)
    # The last word is the one that is said again to a coordinator which was away: it has to be how it ended.
    ended = "rolled-back" if state.guest is Guest.RUNNING else "aborted"
    return state, (Tell("failed", event.reason), *((Tell(ended),) if state.phase is Phase.ABORTED else ()))


def _unsettled(state: State, reason: str) -> Step:
    """The destination is open and has the connections; only what was counted here is lost."""
    stub = replace(state, phase=Phase.STUB)
    lost = f"accounting of the source is lost: {reason}"
    return stub, (Purge(keep_redirect=True), Tell("degraded", lost), Tell("settled"))


def _peer_failed(state: State, event: PeerFailed) -> Step:
    state = replace(state, peer=False, opened=False)
    if state.phase is Phase.FINAL:
        aborting = replace(state, phase=Phase.ABORTING, final=False)
        return aborting, (Cancel(certain=True), Tell("failed", event.reason))
    if state.phase is Phase.SETTLING:
        return _unsettled(state, event.reason)
    return _give_up(state, event.reason)


def _peer_lost(state: State, event: PeerLost) -> Step:
    state = replace(state, peer=False, opened=False)
    if state.phase is Phase.CONNECTING or state.phase in EARLY | STOPPING:
        return _give_up(state, event.reason or "the stream to the destination broke")
    if state.phase in UNSURE:
        return state, (Ask(),)
    return state, (Connect(),) if state.phase is Phase.SETTLING else ()


def _peer_said(state: State, event: PeerSaid) -> Step:
    if event.opened:
        return _peer_opened(state, event)
    if event.committed:
        return _peer_committed(state, PeerCommitted())
    if state.phase is Phase.FINAL:
        aborting = replace(state, phase=Phase.ABORTING, final=False)
        return aborting, (Cancel(certain=True), Tell("failed", "the destination did not commit"))
    if state.phase is Phase.ABORTING and state.final:
        return replace(state, final=False), (Cancel(certain=True),)
    return state, ()


def _cancel_failed(state: State, _: CancelFailed) -> Step:
    """The guest is on its way after all: what can still follow it does."""
    if state.phase is not Phase.ABORTING or not state.peer:
        return state, ()
    if not state.drained:
        return replace(state, phase=Phase.DRAINING), (Drain(follow=True),)
    if state.authorised:
        return replace(state, phase=Phase.FINAL, final=True), (SendFinal(),)
    return replace(state, phase=Phase.DRAINED), ()


def _verdict(state: State, event: Verdict) -> Step:
    if event.gone and state.guest is not Guest.RUNNING:
        return replace(state, phase=Phase.RELEASED), (Purge(keep_redirect=False), Tell("aborted", "the VM is gone"))
    if event.guest_at is Role.DESTINATION and event.opened:
        return _peer_opened(state, event)
    if event.guest_at is Role.SOURCE and state.phase not in LEFT | {Phase.ABORTED}:
        return _roll_back(state, "the guest is at the source")
    return state, ()


def _timeout(state: State, event: Timeout) -> Step:
    if event.phase is not state.phase:
        return state, ()
    reason = f"deadline of phase {state.phase} passed"
    if state.phase in EARLY | STOPPING:
        return _give_up(state, reason)
    if state.phase in UNSURE:
        return state, (Ask(), Tell("failed", f"{reason}: it is not known where the guest runs"))
    if state.phase is Phase.SETTLING:
        return _unsettled(state, reason)
    return state, ()


def _restarted(state: State, event: Restarted) -> Step:
    had_stopped = state.guest is not Guest.RUNNING
    state = replace(state, guest=event.guest, peer=False, drained=False, opened=False)
    if state.phase in EARLY | STOPPING | UNSURE:
        runs = event.guest is Guest.RUNNING
        if runs and (had_stopped or state.phase in {Phase.PROBING, Phase.CONNECTING}):
            return _roll_back(state, "the agent was restarted and the guest runs at the source")
        if state.phase in UNSURE and not runs:
            # Without `final` nobody has it but us: what the earlier run gave up and did not hear the end of.
            given_up = state.phase is Phase.ABORTING and not state.final
            return state, (Shut(), Ask(), *((Cancel(certain=True),) if given_up else ()))
        # It runs, but its hypervisor may still be moving it: the destination keeps what it has until that is over.
        shut = () if runs else (Shut(),)
        return replace(state, phase=Phase.ABORTING), (*shut, Ask(), Cancel(certain=not state.final))
    return state, _AGAIN.get(state.phase, ())


_AGAIN: dict[Phase, tuple[Action, ...]] = {
    # What the earlier run may not have done any more. All of it may be done twice.
    Phase.REDIRECTING: (Redirect(),),
    Phase.SETTLING: (Connect(),),
    Phase.STUB: (Purge(keep_redirect=True), Tell("settled")),
    Phase.RELEASED: (Purge(keep_redirect=False),),
    Phase.ABORTED: (Resume(), Tell("aborted")),
}

_HANDLERS: dict[type[Event], Callable[[State, Any], Step]] = {
    Probed: _probed,
    Ready: _ready,
    Converged: _converged,
    Authorised: _authorised,
    GuestFits: _guest_fits,
    Held: _held,
    Outrun: _outrun,
    Drained: _drained,
    PeerCommitted: _peer_committed,
    PeerOpened: _peer_opened,
    PeerSettled: _peer_settled,
    PeerFailed: _peer_failed,
    PeerLost: _peer_lost,
    PeerSaid: _peer_said,
    Redirected: _redirected,
    GuestPaused: _guest_paused,
    GuestResumed: _guest_resumed,
    GuestGone: _guest_gone,
    CancelFailed: _cancel_failed,
    AbortAsked: _abort_asked,
    EndRedirect: _end_redirect,
    Failed: _failed,
    Timeout: _timeout,
    Restarted: _restarted,
    Verdict: _verdict,
}
EVENTS = frozenset(_HANDLERS)
