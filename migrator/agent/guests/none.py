"""VMs without a hypervisor that speaks: the operator's order is the guest's move.

The source's hold is the pause, the destination's commit is the resume. So nobody but the destination can tell whether
the guest runs there once the commit may have been made: `cancel` refuses then, and the migration is in doubt until the
destination answers or the operator says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from migrator.agent.guests.word import BY_DEFAULT, GuestEvent, MoveOptions, Remaining
from migrator.agent.side import AgentSide
from migrator.lifecycle.machine import Guest, Role


class NoGuests:
    """Implements GuestDriver by the operator's word."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        del options
        self._on_event: Callable[[GuestEvent], None] = lambda _: None

    async def start(self, on_event: Callable[[GuestEvent], None]) -> None:
        self._on_event = on_event

    async def attach(self, side: AgentSide) -> None:
        del side  # has nothing to ask

    async def stop(self) -> None:
        self._on_event = lambda _: None

    @property
    def speaks(self) -> bool:
        return False

    def state(self, vm: str) -> Guest | None:
        del vm
        return None

    def states(self) -> Mapping[str, Guest]:
        return {}

    async def migrate(self, vm: str, to: str, options: MoveOptions = BY_DEFAULT) -> None:
        del vm, to, options

    async def leaving(self, vm: str) -> bool:
        del vm
        return True

    async def accompany(self, vm: str) -> None:
        del vm

    async def remaining(self, vm: str, downtime_ms: int) -> Remaining:
        del vm, downtime_ms
        return Remaining(bytes=0, converged=True)

    async def suspend(self, vm: str) -> None:
        self._tell(vm, "paused")

    async def resume(self, vm: str) -> None:
        self._tell(vm, "running")

    async def cancel(self, vm: str, *, certain: bool) -> bool:
        del vm
        return certain

    def committed(self, vm: str) -> None:
        self._tell(vm, "running")

    async def guard(self, vm: str, role: Role, migration: str) -> str:
        del vm, role, migration  # the operator starts it, by our commit
        return ""

    def unguard(self, vm: str, role: Role, migration: str) -> None:
        del vm, role, migration

    def _tell(self, vm: str, what: str) -> None:
        self._on_event(GuestEvent(vm, what, moving=True, reason="operator", time=time.monotonic()))
