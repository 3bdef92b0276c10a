"""Phases, events and actions of the destination's machine, which is in `migrator.lifecycle.destination`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from migrator.lifecycle.machine import Action, Event


class Phase(enum.StrEnum):
    STAGING = "staging"
    STAGED = "staged"
    LOADING = "loading"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FENCED = "fenced"  # not all is here and no more will come
    WAITING = "waiting"  # the guest runs here already; the last changes may still come
    OPENING = "opening"
    OPEN = "open"
    SETTLED = "settled"
    ABORTED = "aborted"


UNCOMMITTED = frozenset({Phase.STAGING, Phase.STAGED, Phase.LOADING, Phase.FENCED})
RUNNING = frozenset({Phase.WAITING, Phase.OPENING, Phase.OPEN, Phase.SETTLED})
OPENED = frozenset({Phase.OPEN, Phase.SETTLED})
OVER = frozenset({Phase.SETTLED, Phase.ABORTED})


# ---- events ----


@dataclass(frozen=True)
class Staged(Event):
    """The ports are made and accept the channel."""


@dataclass(frozen=True)
class Begun(Event):
    """The source opened the stream and showed the token."""


@dataclass(frozen=True)
class FinalReceived(Event):
    """All sections are here and loaded, counts and digests agree."""


@dataclass(frozen=True)
class CommitDone(Event):
    """The commit is durable."""


@dataclass(frozen=True)
class Failed(Event):
    """The action of the present phase, or a load, could not be carried out."""

    reason: str


@dataclass(frozen=True)
class GuestRunning(Event):
    """The guest runs here: the hypervisor's word, or its first frame."""


@dataclass(frozen=True)
class GuestGone(Event):
    """The hypervisor here has the VM no more."""


@dataclass(frozen=True)
class Opened(Event):
    """The ports are open."""


@dataclass(frozen=True)
class Redirecting(Event):
    """The source passes on no broadcast any more."""


@dataclass(frozen=True)
class SettleEnd(Event):
    """All accounting is here and assigned."""


@dataclass(frozen=True)
class SourceAborted(Event):
    """The source's word that the guest runs there (or has ended)."""

    reason: str = ""


@dataclass(frozen=True)
class PeerLost(Event):
    """The stream from the source broke."""


@dataclass(frozen=True)
class Asked(Event):
    """The source lost the stream and asks what became of it."""


@dataclass(frozen=True)
class AbortAsked(Event):
    """The coordinator's word, given after the source's."""

    reason: str


@dataclass(frozen=True)
class Timeout(Event):
    phase: Phase


@dataclass(frozen=True)
class Restarted(Event):
    """The agent found this state on disk at start. `committed` is the switch's word, `guest` the hypervisor's."""

    guest: bool
    committed: bool


# ---- actions ----


@dataclass(frozen=True)
class Stage(Action):
    """Probe, stage every port, accept the channel: Staged, or Failed with nothing left behind."""


@dataclass(frozen=True)
class Accept(Action):
    """Answer the coordinator's order: prepared."""


@dataclass(frozen=True)
class Refuse(Action):
    reason: str


@dataclass(frozen=True)
class SendReady(Action):
    pass


@dataclass(frozen=True)
class Commit(Action):
    """Commit every port: CommitDone or Failed."""


@dataclass(frozen=True)
class SendCommitted(Action):
    pass


@dataclass(frozen=True)
class SendFailed(Action):
    reason: str


@dataclass(frozen=True)
class Open(Action):
    """Open every port, announce it: Opened or Failed. `degraded`: with what it has."""

    degraded: bool


@dataclass(frozen=True)
class SendOpened(Action):
    pass


@dataclass(frozen=True)
class OpenBroadcast(Action):
    """Take native broadcast from now on."""


@dataclass(frozen=True)
class CloseAccounts(Action):
    """No more accounting comes: what was kept for it may go."""


@dataclass(frozen=True)
class SendSettled(Action):
    pass


@dataclass(frozen=True)
class Purge(Action):
    """Delete the staged instance."""


@dataclass(frozen=True)
class Answer(Action):
    """Answer Ask by this state's `committed` and whether the ports are open."""


@dataclass(frozen=True)
class Tell(Action):
    """Progress for the coordinator, repeated when it is reached again."""

    what: str
    reason: str = ""
