"""Phases, events and actions of the coordinator's machine, which is in `migrator.lifecycle.coordinator`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from migrator.lifecycle.machine import Action, Event, Outcome, Role, Verdict


class Phase(enum.StrEnum):
    DESCRIBING = "describing"  # the source says what the VM needs
    STAGING = "staging"  # the destination prepares, or refuses
    STARTING = "starting"  # the source probes the path and connects
    PRE_COPY = "pre-copy"
    AUTHORISED = "authorised"
    SWITCHOVER = "switchover"
    COMMITTED = "committed"
    OPEN = "open"
    DONE = "done"  # settled; the source's redirect lives on
    CLOSED = "closed"  # and its end has been ordered: nothing is left
    ABORTING = "aborting"
    ABORTED = "aborted"
    IN_DOUBT = "in-doubt"

    @property
    def reported(self) -> str:
        """The name in the operator's report (field `phase` of message Migration)."""
        return _REPORTED.get(self, self.value)


_REPORTED = {
    Phase.DESCRIBING: "preparing",
    Phase.STAGING: "preparing",
    Phase.STARTING: "preparing",
    Phase.ABORTING: "aborted",
    Phase.CLOSED: "done",
}
UNAUTHORISED = frozenset({Phase.DESCRIBING, Phase.STAGING, Phase.STARTING, Phase.PRE_COPY})
UNDECIDED = frozenset({Phase.AUTHORISED, Phase.SWITCHOVER, Phase.COMMITTED, Phase.IN_DOUBT})
MOVED = frozenset({Phase.OPEN, Phase.DONE, Phase.CLOSED})
UNDONE = frozenset({Phase.ABORTING, Phase.ABORTED})
BOTH = frozenset(Role)


@dataclass(frozen=True)
class Described(Event):
    """The source answered Describe with a Need."""


@dataclass(frozen=True)
class Prepared(Event):
    """The destination answered PrepareDestination: staged."""


@dataclass(frozen=True)
class Started(Event):
    """The source answered StartSource."""


@dataclass(frozen=True)
class Refused(Event):
    """An agent answered one of these three with a problem, or is not connected."""

    role: Role
    reason: str


@dataclass(frozen=True)
class Said(Event):
    """An agent's Progress. `what` is its field `event`: one of WORDS; others change nothing."""

    role: Role
    what: str
    reason: str = ""


@dataclass(frozen=True)
class Back(Event):
    """An agent of this migration is attached again (after its Hello was answered with Sync)."""

    role: Role


@dataclass(frozen=True)
class Restarted(Event):
    """The coordinator found this state in its journal at start."""


@dataclass(frozen=True)
class AbortAsked(Event):
    reason: str


@dataclass(frozen=True)
class Resolved(Event):
    """The operator says where the guest is."""

    guest_at: Role


@dataclass(frozen=True)
class GuestsGone(Event):
    """Both hypervisors say that they do not have the VM: it died, or was destroyed."""


@dataclass(frozen=True)
class Timeout(Event):
    """The deadline of `phase` has passed. Stale when the phase is another one."""

    phase: Phase


@dataclass(frozen=True)
class PlacesKnown(Event):
    """Every connected host has acknowledged the VM's new place."""


@dataclass(frozen=True)
class RedirectIdle(Event):
    """The source's redirect has passed nothing for the agreed time."""


class Order(enum.StrEnum):
    DESCRIBE = "describe"
    PREPARE = "prepare"
    START = "start"
    AUTHORISE = "authorise"
    ABORT = "abort"
    END_REDIRECT = "end-redirect"


@dataclass(frozen=True)
class Send(Action):
    """Give this order to the agent. Not connected: it is lost (for the first three: answer with Refused)."""

    role: Role
    order: Order
    reason: str = ""


@dataclass(frozen=True)
class Tell(Action):
    """Send the agent a Verdict."""

    role: Role
    verdict: Verdict


@dataclass(frozen=True)
class MovePlace(Action):
    """The VM is at the destination now: journal it, tell every host."""


@dataclass(frozen=True)
class Renew(Action):
    """Both ends have purged the ports of a VM that has ended: where it was they begin anew, for it may be started."""


@dataclass(frozen=True)
class Finish(Action):
    """Close the report. Said once."""

    outcome: Outcome
    reason: str
