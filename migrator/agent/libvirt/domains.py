"""What happens to the domains of this host, for whoever keeps their ports: libvirt's events in our words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import libvirt
import structlog


@dataclass(frozen=True)
class DomainEvent:
    """`what`: started, stopped, saved, restored, device-added, device-removed, reset, crashed, defined, undefined,
    metadata, or up (the connection is back: compare all; `vm` is "").

    `detail`: why (started and stopped: "migrated" for a move; a rollback is a start by it, too), or the device's alias.
    A VM on its way here has not started yet. Libvirt may say the same twice.
    """

    vm: str
    name: str
    what: str
    detail: str = ""


Listener = Callable[[DomainEvent], None]

_STARTED = {
    libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED: ("started", "booted"),
    libvirt.VIR_DOMAIN_EVENT_STARTED_RESTORED: ("restored", "saved"),
    libvirt.VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT: ("restored", "snapshot"),
}
_STOPPED = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: ("stopped", "shutdown"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: ("stopped", "destroyed"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: ("stopped", "crashed"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: ("stopped", "migrated"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: ("saved", "saved"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: ("stopped", "failed"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT: ("stopped", "snapshot"),
}
_RESUMED = {
    libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED: ("started", "migrated"),
    libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY: ("started", "migrated"),
}
_DEFINED = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED_ADDED: ("defined", "added"),
    libvirt.VIR_DOMAIN_EVENT_DEFINED_UPDATED: ("defined", "updated"),
    libvirt.VIR_DOMAIN_EVENT_DEFINED_RENAMED: ("defined", "renamed"),
    libvirt.VIR_DOMAIN_EVENT_DEFINED_FROM_SNAPSHOT: ("defined", "snapshot"),
}
_UNDEFINED = {
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED_REMOVED: ("undefined", "removed"),
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED_RENAMED: ("undefined", "renamed"),
}
_CRASHED = {libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED: ("crashed", "panicked")}
_LIFECYCLE = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: _STARTED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: _STOPPED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: _RESUMED,
    libvirt.VIR_DOMAIN_EVENT_DEFINED: _DEFINED,
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: _UNDEFINED,
    libvirt.VIR_DOMAIN_EVENT_CRASHED: _CRASHED,
}


def lifecycle(vm: str, name: str, event: int, detail: int) -> DomainEvent | None:
    """A lifecycle event that concerns ports; None for one that does not."""
    found = _LIFECYCLE.get(event, {}).get(detail)
    return None if found is None else DomainEvent(vm, name, *found)


class Happenings:
    """Tells listeners of domain events, in order, in the loop's thread."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._log = structlog.get_logger()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell `listener` of every event from now on; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def tell(self, event: DomainEvent | None) -> None:
        if event is None:
            return
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:  # one that is broken costs the others nothing
                self._log.exception("broken", domain=event.name, what=event.what)
