"""What is said between an agent and a hypervisor."""

from __future__ import annotations

from dataclasses import dataclass

from migrator.errors import MigrationError


@dataclass(frozen=True)
class GuestEvent:
    """`what`: "running", "paused", "gone", or "failed" (a move ended where it began).

    `moving`: part of a move between hosts. `time` is CLOCK_MONOTONIC in seconds when it happened, 0 unknown.
    """

    vm: str
    what: str
    moving: bool = False
    reason: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Remaining:
    """Memory of the guest that the other host does not have yet."""

    bytes: int
    converged: bool


class GuestFailed(MigrationError):
    """The hypervisor refused, or did not answer in time."""
