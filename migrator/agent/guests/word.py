"""What is said between an agent and a hypervisor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from migrator.errors import MigrationError


@dataclass(frozen=True)
class GuestEvent:
    """`what`: "running", "paused", "gone", "failed" (a move ended where it began), "measured" (a move from here is
    complete: `memory` is what it took, as in Remaining).

    `moving`: part of a move between hosts. `time` is CLOCK_MONOTONIC in seconds when it happened, 0 unknown.
    """

    vm: str
    what: str
    moving: bool = False
    reason: str = ""
    time: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MoveOptions:
    """How a hypervisor is to move a VM. None, 0 and "" leave it as this host is configured.

    `copy_storage`: "all", or "inc" for what is above a shared base. `persistent`, `undefine`: None for a VM that is
    defined there as it was here. `uri`: of the hypervisor at the destination; `data_uri`: where memory is sent to.
    """

    bandwidth_mib_s: int = 0
    postcopy: bool | None = None
    copy_storage: str = ""
    persistent: bool | None = None
    undefine: bool | None = None
    uri: str = ""
    data_uri: str = ""
    tunnelled: bool | None = None


BY_DEFAULT = MoveOptions()


@dataclass(frozen=True)
class Remaining:
    """Memory of the guest that the other host does not have yet. `memory`: as in Migration.memory."""

    bytes: int
    converged: bool
    memory: Mapping[str, float] = field(default_factory=dict)


class GuestFailed(MigrationError):
    """The hypervisor refused, or did not answer in time."""
