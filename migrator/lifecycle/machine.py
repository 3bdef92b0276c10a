"""What the three machines share."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.StrEnum):
    """The two ends of a migration."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def other(self) -> Role:
        return Role.DESTINATION if self is Role.SOURCE else Role.SOURCE


class Guest(enum.StrEnum):
    """What the hypervisor of this host says of the VM. Nobody else's word counts as much."""

    RUNNING = "running"
    PAUSED = "paused"
    GONE = "gone"


class Outcome(enum.StrEnum):
    COMPLETE = "complete"
    DEGRADED = "degraded"
    ABORTED = "aborted"
    REFUSED = "refused"


@dataclass(frozen=True)
class Event:
    """Something happened."""


@dataclass(frozen=True)
class Action:
    """Something is to be done."""


@dataclass(frozen=True)
class Verdict(Event):
    """What the coordinator, or the operator through it, knows of both ends. `guest_at` None: unknown."""

    guest_at: Role | None
    committed: bool = False
    opened: bool = False
    gone: bool = False  # neither host has the VM
