"""What an agent has to know of the hypervisor: where each VM runs, and how to stop it. One driver a hypervisor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from migrator.agent.guests.none import NoGuests
from migrator.agent.guests.process import ProcessGuests
from migrator.agent.guests.word import BY_DEFAULT, GuestEvent, GuestFailed, MoveOptions, Remaining
from migrator.agent.side import AgentSide
from migrator.errors import ConfigInvalid
from migrator.lifecycle.machine import Guest, Role

__all__ = [
    "GuestDriver",
    "GuestEvent",
    "GuestFailed",
    "MoveOptions",
    "Remaining",
    "found",
    "guest_driver",
    "whereabouts",
]


class GuestDriver(Protocol):
    """The hypervisor of this host. Calls that ask it something raise GuestFailed when it refuses or does not answer."""

    async def start(self, on_event: Callable[[GuestEvent], None]) -> None:
        """Begin to listen. Events come in the loop's thread, those of one VM in order."""

    async def attach(self, side: AgentSide) -> None:
        """The agent is ready and may be asked for things. What the driver does by itself begins; `stop` ends it."""

    async def stop(self) -> None: ...

    @property
    def speaks(self) -> bool:
        """Is there a hypervisor, and does it answer now? Then a VM that `state` does not know is not on this host."""

    def state(self, vm: str) -> Guest | None:
        """What the hypervisor last said; None: it never spoke of this VM."""

    def states(self) -> Mapping[str, Guest]: ...

    async def migrate(self, vm: str, to: str, options: MoveOptions = BY_DEFAULT) -> None:
        """Begin to move the VM to host `to`. A driver that does not know an option leaves it."""

    async def leaving(self, vm: str) -> bool:
        """Is a move of the VM to another host in hand here? A hypervisor that does not speak of moves says yes."""

    async def accompany(self, vm: str) -> None:
        """A move of the VM that somebody else ordered of the hypervisor begins: it is watched, and may be tuned.

        Raises GuestFailed when the hypervisor moves it nowhere. The event `failed` follows if it ends where it began.
        """

    async def remaining(self, vm: str, downtime_ms: int) -> Remaining:
        """How much is left to copy, and whether the guest may be stopped for it: no longer than `downtime_ms`.

        0: as the VM or this host is configured.
        """

    async def suspend(self, vm: str) -> None:
        """Stop the VM. In a move the hypervisor finishes it then by itself. The event `paused` follows."""

    async def resume(self, vm: str) -> None:
        """Start a VM here that `suspend` stopped and nobody moves. The event `running` follows."""

    async def cancel(self, vm: str, *, certain: bool) -> bool:
        """Stop moving the VM; True when it runs here then. `certain`: nothing can run it at the other host."""

    def committed(self, vm: str) -> None:
        """All state is here: who has no hypervisor of its own runs here from now on."""

    async def guard(self, vm: str, role: Role, migration: str) -> str:
        """Strict: from now on the hypervisor starts and stops this VM here only with the agent's word.

        Returns why it cannot be made to, "" when it is. One without vCPUs of its own has nothing to guard.
        """

    def unguard(self, vm: str, role: Role, migration: str) -> None:
        """That migration has nothing against a start any more. May be repeated, and said of what was not guarded."""


def whereabouts(guests: GuestDriver, vm: str) -> Guest | None:
    """What the hypervisor here says of the VM now; None: there is none, or it does not answer."""
    return (guests.state(vm) or Guest.GONE) if guests.speaks else None


def found(guests: GuestDriver, vm: str, *, unsaid: Guest) -> Guest:
    """Where an agent that starts takes the VM to be. `unsaid`: where it is if there is nobody who could say it.

    A hypervisor that does not answer yet leaves it open: PAUSED, until an event says more.
    """
    return unsaid if isinstance(guests, NoGuests) else whereabouts(guests, vm) or Guest.PAUSED


@dataclass(frozen=True)
class _Entry:
    make: Callable[[Mapping[str, Any]], GuestDriver]


def _libvirt(options: Mapping[str, Any]) -> GuestDriver:
    try:
        from migrator.agent.libvirt.guests import LibvirtGuests  # only who uses libvirt needs its library
    except ImportError as error:
        raise ConfigInvalid(f"guests.driver libvirt: {error}", hint="install libvirt's client library") from error
    return LibvirtGuests(options)


_DRIVERS = {"none": _Entry(NoGuests), "process": _Entry(ProcessGuests), "libvirt": _Entry(_libvirt)}


def guest_driver(name: str, options: Mapping[str, Any]) -> GuestDriver:
    """The driver called `name`. Raises ConfigInvalid."""
    if name not in _DRIVERS:
        raise ConfigInvalid(f"guests.driver: no driver {name!r}", hint=f"one of {', '.join(sorted(_DRIVERS))}")
    return _DRIVERS[name].make(options)
