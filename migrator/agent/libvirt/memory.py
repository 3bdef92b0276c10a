"""When the agent stops a guest that moves: QEMU's counts of its memory against what is wanted. Pure.

Before its second pass QEMU's remaining bytes are those of the first and tell nothing of what the guest wrote since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import libvirt

from migrator.agent.guests.word import Remaining
from migrator.agent.libvirt.metadata import Lead

TELLING_PASS = 2
LIMIT_SHARE = 10  # QEMU may stop a guest by itself only for a tenth of what is wanted: so it nearly never does
LIMIT_LEAST_MS = 5


@dataclass(frozen=True)
class Aim:
    """How the moment is chosen for one VM. `max_passes` 0: by memory alone. `limit_ms`: QEMU's own, None: as it is."""

    lead: bool = True
    downtime_ms: int = 300
    max_passes: int = 0
    limit_ms: int | None = None


def aim_of(configured: Aim, own: Lead, *, order_ms: int, qemu_ms: int, emulated: bool) -> Aim:
    """The order's downtime goes before the VM's own, that before the configuration's, that before QEMU's limit.

    An emulated guest (TCG) keeps QEMU's limit: QEMU 7.2 corrupts one that it copies in more than three passes.
    """
    lead = configured.lead if own.lead is None else own.lead
    wanted = order_ms or own.downtime_ms or configured.downtime_ms or qemu_ms
    passes = configured.max_passes if own.max_passes is None else own.max_passes
    limit = configured.limit_ms
    if limit is None and lead and not emulated:
        limit = max(wanted // LIMIT_SHARE, LIMIT_LEAST_MS)
    return Aim(lead, wanted, passes, limit or None)


def leaving(stats: Mapping[str, Any]) -> bool:
    """Do these job statistics tell of a move to another host that goes on?"""
    going = stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) in {
        libvirt.VIR_DOMAIN_JOB_BOUNDED,
        libvirt.VIR_DOMAIN_JOB_UNBOUNDED,
    }
    return going and stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT


def ending(stats: Mapping[str, Any]) -> bool:
    """Do they tell of one that goes on, or has failed and still is undone?"""
    known = stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE
    return bool(known and stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)


def measures(stats: Mapping[str, Any], *, complete: bool = False) -> dict[str, float]:
    """Job statistics as the report has them: bytes, bytes a second, passes, milliseconds. What is missing is not in.

    Before the move is `complete`, QEMU's downtime is what it expects, and left out.
    """
    names = {
        libvirt.VIR_DOMAIN_JOB_MEMORY_TOTAL: "total",
        libvirt.VIR_DOMAIN_JOB_MEMORY_REMAINING: "remaining",
        libvirt.VIR_DOMAIN_JOB_MEMORY_PROCESSED: "transferred",
        libvirt.VIR_DOMAIN_JOB_MEMORY_BPS: "bps",
        libvirt.VIR_DOMAIN_JOB_MEMORY_ITERATION: "passes",
        libvirt.VIR_DOMAIN_JOB_TIME_ELAPSED: "elapsed_ms",
        libvirt.VIR_DOMAIN_JOB_SETUP_TIME: "setup_ms",
    }
    if complete:
        names[libvirt.VIR_DOMAIN_JOB_DOWNTIME] = "downtime_ms"
    found = {ours: float(stats[theirs]) for theirs, ours in names.items() if theirs in stats}
    page = float(stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE, 0))
    if page and libvirt.VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE in stats:
        found["dirty_bps"] = float(stats[libvirt.VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE]) * page
    return found


def remaining(aim: Aim, memory: Mapping[str, float], *, passes: int = 0) -> Remaining:
    """How much is left by these measures, and whether the guest may be stopped for it.

    `passes`: as QEMU has told since. What was left before a pass says nothing of it, so it counts for the limit only.
    """
    left, counted = memory.get("remaining", 0.0), memory.get("passes", 0.0)
    fits = counted >= TELLING_PASS and left <= memory.get("bps", 0.0) * aim.downtime_ms / 1e3
    enough = 0 < aim.max_passes <= max(counted, passes)
    shown = {**memory, "passes": max(counted, float(passes)), "wanted_ms": float(aim.downtime_ms)}
    return Remaining(int(left), aim.lead and (fits or enough), shown)
