"""What libvirt and QEMU say of one VM, as words of ours. Pure: tables and a few rules, no libvirt connection.

The same event means one thing at the source and another at the destination (RESUMED/MIGRATED: a rollback, an arrival),
so it is read with what is in hand here: a `Track`. QEMU's own STOP and RESUME come about a millisecond before libvirt's
word for them, which then says nothing new. Only a STOP in a move between hosts counts by itself: a plain suspend, a
snapshot and a save stop the guest, too, and for those libvirt's detail decides.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import libvirt

from migrator.lifecycle.machine import Guest


class Move(enum.StrEnum):
    """A migration of the VM that its hypervisor has in hand here."""

    NONE = "none"
    OUT = "out"
    IN = "in"


@dataclass(frozen=True)
class Track:
    """What is in hand of one VM on this host.

    `stop_told`, `start_told`: QEMU's word was taken and libvirt's of the same is still to come. A VM that comes in is
    `GONE` until it runs here. `passes`: over the guest's memory, in the move that is in hand.
    """

    guest: Guest = Guest.GONE
    move: Move = Move.NONE
    postcopy: bool = False
    stop_told: bool = False
    start_told: bool = False
    passes: int = 0


@dataclass(frozen=True)
class Word:
    """What of it the agent is told: see GuestEvent."""

    what: str
    moving: bool = False
    reason: str = ""


Heard = tuple[Track, Word | None]

_GONE = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "destroyed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: "migrated",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: "saved",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "failed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT: "snapshot",
}
_PAUSED = {
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED: "migrated",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR: "i/o error",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_WATCHDOG: "watchdog",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_RESTORED: "restored",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_FROM_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_API_ERROR: "error",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY: "post-copy",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED: "post-copy failed",
}
_RUNNING = {
    libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED: "migrated",
    libvirt.VIR_DOMAIN_EVENT_RESUMED_FROM_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY: "post-copy",
    libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY_FAILED: "post-copy failed",
}
_MOVES = frozenset({"migrated", "post-copy", "post-copy failed"})
_ENDED = frozenset({"failed", "cancelled"})
_BEGUN = frozenset({"setup", "active"})


# ---- libvirt's lifecycle events ----


def lifecycle(track: Track, event: int, detail: int) -> Heard:
    """VIR_DOMAIN_EVENT_ID_LIFECYCLE."""
    if event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
        return _suspended(track, _PAUSED.get(detail, "suspended"))
    if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
        return _resumed(track, _RUNNING.get(detail, "resumed"))
    if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
        reason = _GONE.get(detail, "stopped")
        return Track(), Word("gone", reason == "migrated", reason)
    if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
        return _started(track, detail)
    if event == libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED:
        return replace(track, guest=Guest.PAUSED), Word("paused", reason="sleeps")
    if (event, detail) == (libvirt.VIR_DOMAIN_EVENT_CRASHED, libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED):
        return replace(track, guest=Guest.PAUSED), Word("paused", reason="crashed")
    return track, None  # defined, undefined, a shutdown that goes on: where the guest runs does not change


def _suspended(track: Track, reason: str) -> Heard:
    if reason == "migrated" and track.stop_told:
        return replace(track, stop_told=False), None
    if track.move is Move.IN:
        # All of it is here, and it was paused before or is to stay so.
        return replace(track, guest=Guest.PAUSED, move=Move.NONE), Word("paused", True, "arrived")
    if reason == "suspended" and track.stop_told:
        # The move had ended before the guest stopped: nobody will run it elsewhere.
        return replace(track, guest=Guest.PAUSED, move=Move.NONE, stop_told=False), Word("failed", True, "it had ended")
    return replace(track, guest=Guest.PAUSED, stop_told=False), Word("paused", reason in _MOVES, reason)


def _resumed(track: Track, reason: str) -> Heard:
    after = replace(track, start_told=False)
    if reason == "migrated":  # at the destination it has arrived, at the source the move is over
        after = replace(after, move=Move.NONE, postcopy=False)
    if track.start_told:
        return after, None
    moving = reason in _MOVES or track.move is not Move.NONE
    return replace(after, guest=Guest.RUNNING), Word("running", moving, reason)


def _started(track: Track, detail: int) -> Heard:
    if detail == libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED:
        if track.guest is Guest.GONE:
            return Track(move=Move.IN), None
        return track, None
    if detail == libvirt.VIR_DOMAIN_EVENT_STARTED_WAKEUP:
        return replace(track, guest=Guest.RUNNING), Word("running", reason="wakes")
    # Whether its vCPUs run, libvirt says by RESUMED, before or after this.
    return (Track(guest=Guest.PAUSED), None) if track.guest is Guest.GONE else (track, None)


# ---- QEMU's own events ----


def monitor(track: Track, name: str, data: Mapping[str, Any]) -> Heard:
    """An event of QEMU's monitor."""
    if name == "STOP" and track.move is Move.OUT:
        return replace(track, guest=Guest.PAUSED, stop_told=True), Word("paused", True, "migrated")
    if name == "RESUME":
        moving = track.move is not Move.NONE
        return replace(track, guest=Guest.RUNNING, start_told=True), Word("running", moving, "QEMU runs")
    if name == "MIGRATION_PASS":
        return replace(track, passes=max(track.passes, int(data.get("pass", 0)))), None
    if name == "MIGRATION":
        return _migration(track, str(data.get("status", "")))
    return track, None


def _migration(track: Track, status: str) -> Heard:
    if status == "setup":
        return replace(track, passes=0), None
    if status == "postcopy-active":
        return replace(track, postcopy=True), None
    if status in _ENDED and track.move is Move.OUT and not track.postcopy:
        return move_ended(track, f"QEMU's migration {status}")
    return track, None


def move_ended(track: Track, reason: str) -> Heard:
    """A move from here has ended where it began. A guest that was stopped for it says so by running again."""
    word = Word("failed", True, reason) if track.guest is Guest.RUNNING else None
    return replace(track, move=Move.NONE, passes=0), word


def unexplained(track: Track, name: str, data: Mapping[str, Any]) -> bool:
    """Does QEMU begin to send the guest's memory somewhere, and it is not known yet whether to another host?"""
    begun = name == "MIGRATION" and data.get("status") in _BEGUN
    return begun and track.move is Move.NONE and track.guest is not Guest.GONE


# ---- what libvirt has when it is asked ----


def found(track: Track, state: int, reason: int, *, leaving: bool) -> Heard:
    """The truth of a domain after the connection was away; `leaving`: a move of it to another host is in hand."""
    if state == libvirt.VIR_DOMAIN_PAUSED:
        return _found_paused(track, reason, leaving=leaving)
    stopped = {libvirt.VIR_DOMAIN_SHUTDOWN, libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_PMSUSPENDED}
    guest = Guest.PAUSED if state in stopped else Guest.RUNNING
    moved = {libvirt.VIR_DOMAIN_RUNNING_MIGRATED, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY}
    moving = guest is Guest.RUNNING and (reason in moved or track.move is not Move.NONE)
    after = Track(guest=guest, move=Move.OUT if leaving else Move.NONE, passes=track.passes)
    return after, None if track.guest is guest else Word(str(guest), moving, "found so")


def _found_paused(track: Track, reason: int, *, leaving: bool) -> Heard:
    of_a_move = {
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
    }
    if reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION and not leaving and track.guest is Guest.GONE:
        return Track(move=Move.IN), None
    moving = reason in of_a_move
    postcopy = moving and reason != libvirt.VIR_DOMAIN_PAUSED_MIGRATION
    move = Move.OUT if leaving or postcopy else Move.NONE
    after = Track(guest=Guest.PAUSED, move=move, postcopy=postcopy, passes=track.passes)
    return after, None if track.guest is Guest.PAUSED else Word("paused", moving, "found so")


def missing(track: Track) -> Heard:
    """Libvirt has the domain no more, and nobody heard how it went: a guest stopped for a move has moved."""
    if track.guest is Guest.GONE:
        return Track(), None if track.move is Move.NONE else Word("gone", reason="not found")
    moved = track.move is Move.OUT and track.guest is Guest.PAUSED
    return Track(), Word("gone", moved, "migrated" if moved else "not found")


def monotonic(seconds: int, micros: int, *, now: float | None = None, wall: float | None = None) -> float:
    """QEMU's time stamp (wall clock) on CLOCK_MONOTONIC, in seconds; now, when it cannot be true."""
    now = time.monotonic() if now is None else now
    wall = time.time() if wall is None else wall
    age = wall - (seconds + micros / 1e6)
    return now - age if 0 <= age <= LATEST_S else now


LATEST_S = 5.0
"""An event that says it is older was stamped by a clock that has been set since."""
