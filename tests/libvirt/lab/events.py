# SPDX-License-Identifier: GPL-2.0-only
"""libvirt's event loop in a thread, and a record of what hypervisors said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import libvirt
import libvirt_qemu

from migrator.lab.processes import PATIENT_S, wait_until

_begun = threading.Event()


def begin() -> None:
    """Run libvirt's default event loop for the rest of this process, and keep libvirt from printing errors that are
    raised anyhow. Before the first connection."""
    if not _begun.is_set():
        _begun.set()
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_loop, name="libvirt events", daemon=True).start()


def _loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


@dataclass(frozen=True)
class Event:
    """`at`: CLOCK_REALTIME in seconds, QEMU's own for `kind` "qemu", else when it was received."""

    at: float
    host: str
    kind: str  # "qemu" (monitor events such as STOP), "life" or "job"
    name: str
    detail: Any = ""


LIFE = ("defined", "undefined", "started", "suspended", "resumed", "stopped", "shutdown", "pmsuspended", "crashed")


@dataclass
class Events:
    """Records events of all domains on connections that are `watch`ed."""

    seen: list[Event] = field(default_factory=list)

    def watch(self, host: str, connection: libvirt.virConnect) -> Callable[[], None]:
        """Begin to record; the function returned ends it."""

        def life(_: Any, __: Any, event: int, detail: int, ___: Any) -> None:
            self.seen.append(Event(time.time(), host, "life", LIFE[event], detail))

        def monitor(_: Any, __: Any, event: str, seconds: int, micros: int, details: str, ___: Any) -> None:
            self.seen.append(Event(seconds + micros / 1e6, host, "qemu", event, details))

        def job(_: Any, __: Any, stats: dict[str, Any], ___: Any) -> None:
            self.seen.append(Event(time.time(), host, "job", "completed", stats))

        numbers = [
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, life, None),
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, job, None),
        ]
        of_qemu = libvirt_qemu.qemuMonitorEventRegister(connection, None, None, monitor, None)

        def end() -> None:
            for number in numbers:
                connection.domainEventDeregisterAny(number)
            libvirt_qemu.qemuMonitorEventDeregister(connection, of_qemu)

        return end

    def find(self, host: str, kind: str, name: str) -> list[Event]:
        return [e for e in self.seen if (e.host, e.kind, e.name) == (host, kind, name)]

    def wait_for(self, host: str, kind: str, name: str, timeout_s: float = PATIENT_S) -> Event:
        """The last such event, when one was seen."""
        found: list[Event] = wait_until(f"{name} at {host}", lambda: self.find(host, kind, name), timeout_s)
        return found[-1]
