"""Listens to libvirt and QEMU: keeps a Track of every VM here, and tells the agent and the ports' keeper what happens.

`listen` runs in a thread when libvirtd has been reached; everything else runs in the loop's thread, where libvirt's
callbacks come, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import libvirt
import libvirt_qemu
import structlog

from migrator.agent.guests.word import GuestEvent
from migrator.agent.libvirt import domains, events, memory
from migrator.agent.libvirt.connection import Libvirt
from migrator.agent.libvirt.domains import DomainEvent, Happenings
from migrator.agent.libvirt.events import Move, Track, Word
from migrator.lifecycle.machine import Guest


@dataclass(frozen=True)
class Found:
    """A domain as libvirt has it. `leaving`: a move of it to another host is in hand."""

    vm: str
    name: str
    state: int
    reason: int
    leaving: bool


class Hearing:
    """`tell` is given words of VMs; `unexplained(vm)` is asked to find out where QEMU sends a VM's memory."""

    def __init__(self, tell: Callable[[GuestEvent], None], unexplained: Callable[[str], None]) -> None:
        self.happenings = Happenings()
        self.tracks: dict[str, Track] = {}
        self._tell = tell
        self._unexplained = unexplained
        self._heard: set[str] = set()  # since the listing began: what is listed of these is older
        self._log = structlog.get_logger()

    def track(self, vm: str) -> Track:
        return self.tracks.get(vm, Track())

    # ---- in a thread ----

    def listen(self, conn: Libvirt, closing: ExitStack) -> list[Found]:
        """Register for everything, then list what is there. `closing` ends the registrations."""
        self._heard = set()
        sorts = {
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: self._lifecycle,
            libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: self._job_completed,
            libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION: self._iteration,
            libvirt.VIR_DOMAIN_EVENT_ID_REBOOT: self._reset,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: self._device("device-added"),
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: self._device("device-removed"),
            libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE: self._metadata,
        }
        for sort, callback in sorts.items():
            closing.callback(conn.domainEventDeregisterAny, conn.domainEventRegisterAny(None, sort, callback, None))
        try:
            number = libvirt_qemu.qemuMonitorEventRegister(conn, None, None, self._monitor, None)
            closing.callback(libvirt_qemu.qemuMonitorEventDeregister, conn, number)
        except libvirt.libvirtError as error:
            self._log.warning("QEMU's own events are not heard: pauses are seen later", error=str(error))
        return list_domains(conn)

    # ---- libvirt's callbacks ----

    def _lifecycle(self, _: Libvirt, domain: Any, event: int, detail: int, __: object) -> None:
        vm = domain.UUIDString()
        self._take(vm, *events.lifecycle(self.track(vm), event, detail))
        self.happenings.tell(domains.lifecycle(vm, domain.name(), event, detail))

    def _monitor(
        self, _: Libvirt, domain: Any, name: str, seconds: int, micros: int, details: str | None, __: object
    ) -> None:
        vm = domain.UUIDString()
        data = _object(details)
        if events.unexplained(self.track(vm), name, data):
            self._unexplained(vm)
        self._take(vm, *events.monitor(self.track(vm), name, data), at=events.monotonic(seconds, micros))

    def _iteration(self, _: Libvirt, domain: Any, iteration: int, __: object) -> None:
        vm = domain.UUIDString()
        self._take(vm, *events.monitor(self.track(vm), "MIGRATION_PASS", {"pass": iteration}))

    def _job_completed(self, _: Libvirt, domain: Any, stats: Mapping[str, Any], __: object) -> None:
        if stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT:
            vm = domain.UUIDString()
            self._tell(GuestEvent(vm, "measured", moving=True, memory=memory.measures(stats, complete=True)))

    def _reset(self, _: Libvirt, domain: Any, __: object) -> None:
        self.happenings.tell(DomainEvent(domain.UUIDString(), domain.name(), "reset"))

    def _metadata(self, _: Libvirt, domain: Any, __: int, uri: str | None, ___: object) -> None:
        self.happenings.tell(DomainEvent(domain.UUIDString(), domain.name(), "metadata", uri or ""))

    def _device(self, what: str) -> Callable[..., None]:
        def heard(_: Libvirt, domain: Any, alias: str, __: object) -> None:
            self.happenings.tell(DomainEvent(domain.UUIDString(), domain.name(), what, alias))

        return heard

    # ---- what follows ----

    def _take(self, vm: str, track: Track, word: Word | None, *, at: float = 0.0) -> None:
        self._heard.add(vm)
        self._keep(vm, track, word, at or time.monotonic())

    def _keep(self, vm: str, track: Track, word: Word | None, at: float = 0.0) -> None:
        if track == Track():
            self.tracks.pop(vm, None)
        else:
            self.tracks[vm] = track
        if word is not None:
            self._tell(GuestEvent(vm, word.what, word.moving, word.reason, at))

    def compare(self, listed: list[Found]) -> None:
        """Take over what libvirt has: what changed while nobody listened is told now."""
        for one in listed:
            if one.vm not in self._heard:
                self._keep(one.vm, *events.found(self.track(one.vm), one.state, one.reason, leaving=one.leaving))
        for vm in set(self.tracks) - {one.vm for one in listed} - self._heard:
            self._keep(vm, *events.missing(self.track(vm)))
        self.happenings.tell(DomainEvent("", "", "up"))

    def leaves(self, vm: str) -> None:
        """A move of the VM to another host is in hand."""
        track = self.track(vm)
        if track.move is Move.NONE and track.guest is not Guest.GONE:
            self.tracks[vm] = replace(track, move=Move.OUT)

    def stopped(self, vm: str) -> None:
        """QEMU has stopped a VM, said by libvirtd itself before the event comes."""
        self._take(vm, *events.monitor(self.track(vm), "STOP", {}))

    def left_off(self, vm: str, reason: str) -> None:
        """The move of the VM from here is over, and it is still here."""
        track = self.track(vm)
        if track.move is Move.OUT and not track.postcopy:
            self._keep(vm, *events.move_ended(track, reason), time.monotonic())


def list_domains(conn: Libvirt) -> list[Found]:
    """Every domain that is running or paused here, in a thread."""
    found = []
    for domain in conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        try:
            state, reason = domain.state()
            # Only a paused one needs the question, and it may have to wait for another job.
            asked = (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION)
            leaving = _leaving(domain) if asked or state != libvirt.VIR_DOMAIN_PAUSED else False
            found.append(Found(domain.UUIDString(), domain.name(), state, reason, leaving))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
    return found


def _leaving(domain: Any) -> bool:
    try:
        return memory.leaving(domain.jobStats())
    except libvirt.libvirtError:
        return False  # of a VM that comes in there are none


def _object(details: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(details or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
