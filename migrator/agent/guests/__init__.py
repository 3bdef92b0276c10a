"""What an agent has to know of the hypervisor: where each VM runs, and how to stop it. One driver a hypervisor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from migrator.agent.guests.none import NoGuests
from migrator.agent.guests.process import ProcessGuests
from migrator.agent.guests.word import GuestEvent, GuestFailed, Remaining
from migrator.errors import ConfigInvalid
from migrator.lifecycle.machine import Guest

__all__ = ["GuestDriver", "GuestEvent", "GuestFailed", "Remaining", "guest_driver"]


class GuestDriver(Protocol):
    """The hypervisor of this host. Calls that ask it something raise GuestFailed when it refuses or does not answer."""

    async def start(self, on_event: Callable[[GuestEvent], None]) -> None:
        """Begin to listen. Events come in the loop's thread, those of one VM in order."""

    async def stop(self) -> None: ...

    def state(self, vm: str) -> Guest | None:
        """What the hypervisor last said; None: it never spoke of this VM."""

    def states(self) -> Mapping[str, Guest]: ...

    async def migrate(self, vm: str, to: str) -> None:
        """Begin to move the VM's memory to host `to`."""

    async def remaining(self, vm: str) -> Remaining: ...

    async def suspend(self, vm: str) -> None:
        """Stop the VM. In a move the hypervisor finishes it then by itself. The event `paused` follows."""

    async def resume(self, vm: str) -> None:
        """Start a VM here that `suspend` stopped and nobody moves. The event `running` follows."""

    async def cancel(self, vm: str, *, certain: bool) -> bool:
        """Stop moving the VM; True when it runs here then. `certain`: nothing can run it at the other host."""

    def committed(self, vm: str) -> None:
        """All state is here: who has no hypervisor of its own runs here from now on."""


@dataclass(frozen=True)
class _Entry:
    make: Callable[[Mapping[str, Any]], GuestDriver]


_DRIVERS = {"none": _Entry(NoGuests), "process": _Entry(ProcessGuests)}


def guest_driver(name: str, options: Mapping[str, Any]) -> GuestDriver:
    """The driver called `name`. Raises ConfigInvalid."""
    if name not in _DRIVERS:
        raise ConfigInvalid(f"guests.driver: no driver {name!r}", hint=f"one of {', '.join(sorted(_DRIVERS))}")
    return _DRIVERS[name].make(options)
