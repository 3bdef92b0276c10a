"""Phases, events and actions of the source's machine, which is in `migrator.lifecycle.source`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from migrator.lifecycle.machine import Action, Event, Guest


class Phase(enum.StrEnum):
    PROBING = "probing"  # full-size frames to the destination and back
    CONNECTING = "connecting"
    COPYING = "copying"  # dump, then rounds of what changed
    CONVERGED = "converged"  # rounds are small and kept so; waits to be authorised
    WATCHING = "watching"  # waits until the guest's remaining memory fits
    HOLDING = "holding"  # what comes for the guest waits; the guest takes what is in its queue
    SUSPENDING = "suspending"
    DRAINING = "draining"  # guest stopped, port quiesced: the last changes
    DRAINED = "drained"  # all sent, but nobody has authorised the switchover yet
    FINAL = "final"  # `final` may have been sent
    COMMITTED = "committed"
    REDIRECTING = "redirecting"
    SETTLING = "settling"
    STUB = "stub"  # purged but for the redirect
    RELEASED = "released"
    ABORTING = "aborting"  # wants the guest back; does not know yet whether it gets it
    ABORTED = "aborted"  # active as if nothing had been


EARLY = frozenset({Phase.PROBING, Phase.CONNECTING, Phase.COPYING, Phase.CONVERGED, Phase.WATCHING, Phase.HOLDING})
"""The guest has not been told to stop."""
STOPPING = frozenset({Phase.SUSPENDING, Phase.DRAINING, Phase.DRAINED})
"""The guest stops or has stopped; the destination cannot have committed."""
UNSURE = frozenset({Phase.FINAL, Phase.COMMITTED, Phase.ABORTING})
LEFT = frozenset({Phase.REDIRECTING, Phase.SETTLING, Phase.STUB, Phase.RELEASED})
OVER = frozenset({Phase.RELEASED, Phase.ABORTED})


# ---- events ----


@dataclass(frozen=True)
class Probed(Event):
    """Full-size frames came back from the destination."""


@dataclass(frozen=True)
class Ready(Event):
    """The destination accepted `begin`."""


@dataclass(frozen=True)
class Converged(Event):
    """A round of changes was small."""


@dataclass(frozen=True)
class Authorised(Event):
    """The coordinator has journalled that the switchover may happen."""


@dataclass(frozen=True)
class GuestFits(Event):
    """The guest's remaining memory fits the wanted downtime."""


@dataclass(frozen=True)
class Outrun(Event):
    """More has changed than could be noted, so the copy begins again; the guest has not been stopped yet."""


@dataclass(frozen=True)
class Held(Event):
    """Frames for the guest wait here, and the guest has taken what was in its queue (or could not be asked)."""


@dataclass(frozen=True)
class Drained(Event):
    """The port is quiesced, and all that changed has been given to the stream."""


@dataclass(frozen=True)
class PeerCommitted(Event):
    """The destination holds everything, durably."""


@dataclass(frozen=True)
class PeerOpened(Event):
    """The guest runs at the destination and its ports are open. `lacks`: without all of its state, and it takes what
    is missing afterwards."""

    lacks: bool = False


@dataclass(frozen=True)
class PeerSettled(Event):
    """The destination has the accounting."""


@dataclass(frozen=True)
class PeerFailed(Event):
    """The destination cannot take it; it will not commit any more."""

    reason: str


@dataclass(frozen=True)
class PeerLost(Event):
    """The stream to the destination broke."""

    reason: str = ""


@dataclass(frozen=True)
class PeerSaid(Event):
    """The answer to Ask. Neither committed nor opened: it never will commit what it has (asking fences it)."""

    committed: bool
    opened: bool


@dataclass(frozen=True)
class Redirected(Event):
    """Held frames are on their way, and what comes follows them."""


@dataclass(frozen=True)
class GuestPaused(Event):
    """`moving`: its hypervisor stopped it to move it (or we did); a plain suspend is none of our business."""

    moving: bool


@dataclass(frozen=True)
class GuestResumed(Event):
    """The guest runs here."""


@dataclass(frozen=True)
class GuestGone(Event):
    """The hypervisor here has the VM no more. `moved`: it runs elsewhere; else it ended."""

    moved: bool


@dataclass(frozen=True)
class CancelFailed(Event):
    """The hypervisor did not give the guest back (yet)."""


@dataclass(frozen=True)
class AbortAsked(Event):
    reason: str


@dataclass(frozen=True)
class EndRedirect(Event):
    """Every host knows the new place and the redirect is idle."""


@dataclass(frozen=True)
class Failed(Event):
    """The action of the present phase could not be carried out."""

    reason: str


@dataclass(frozen=True)
class Timeout(Event):
    phase: Phase


@dataclass(frozen=True)
class Restarted(Event):
    """The agent found this state on disk at start; `guest` is what the hypervisor says now."""

    guest: Guest


# ---- actions ----


@dataclass(frozen=True)
class Probe(Action):
    """Send full-size frames through the channel: Probed or Failed."""


@dataclass(frozen=True)
class Connect(Action):
    """Open the stream and begin: Ready, PeerFailed or PeerLost. After the switchover: retry until a deadline."""


@dataclass(frozen=True)
class Copy(Action):
    """Track, dump, send rounds until one is small (Converged), then go on draining until told otherwise."""


@dataclass(frozen=True)
class Watch(Action):
    """Wait until the guest's memory has converged and the copy of the tables is (still) complete: GuestFits."""


@dataclass(frozen=True)
class Hold(Action):
    """Hold all ports, drain a round, wait until the guest's queues are empty: Held, or Outrun when the round cannot be
    had. Shortened when the guest stops."""


@dataclass(frozen=True)
class LetGo(Action):
    """Give back what is held, in order, and hold no more: the guest goes on for a while."""


@dataclass(frozen=True)
class Suspend(Action):
    """Stop the guest (its hypervisor then finishes the move). GuestPaused follows, or Failed."""


@dataclass(frozen=True)
class Wake(Action):
    """Start the guest here again that we stopped. GuestResumed follows, or Failed."""


@dataclass(frozen=True)
class Shut(Action):
    """Hold and quiesce all ports. Idempotent."""


@dataclass(frozen=True)
class Drain(Action):
    """Hold and quiesce, send all that is not sent yet: Drained or Failed. `follow`: take what the guest left unread."""

    follow: bool


@dataclass(frozen=True)
class SendFinal(Action):
    """The last round is complete: the destination may commit."""


@dataclass(frozen=True)
class Ask(Action):
    """Ask the destination what became of it, until it answers: PeerSaid."""


@dataclass(frozen=True)
class Cancel(Action):
    """Have the hypervisor stop moving the guest: GuestResumed if it runs here then, else CancelFailed.

    `certain`: the destination cannot have committed, so a guest without a hypervisor of its own may run here again.
    """

    certain: bool


@dataclass(frozen=True)
class Resume(Action):
    """The ports are active, held frames go to the guest, changes are no longer tracked. Idempotent."""


@dataclass(frozen=True)
class SendAbort(Action):
    """Tell the destination that the guest runs here: it purges, even what it committed."""

    reason: str


@dataclass(frozen=True)
class Redirect(Action):
    """Shut, then pass on what the guest left, what is held, what comes: Redirected or Failed."""


@dataclass(frozen=True)
class Settle(Action):
    """Say that broadcast no longer comes this way, send the accounting and its end. PeerSettled follows.

    `late`: what the destination had to open without goes before; it adds what it does not have.
    """

    late: bool = False


@dataclass(frozen=True)
class Purge(Action):
    """Delete the instance; with `keep_redirect` all but the redirect."""

    keep_redirect: bool


@dataclass(frozen=True)
class Tell(Action):
    """Progress for the coordinator, repeated when it is reached again."""

    what: str
    reason: str = ""
