"""Strict mode: the answers to a hypervisor that waits for them after it has stopped a VM, and before it starts one.

It holds the VM meanwhile: nothing here, and nothing that the answer waits for, asks the hypervisor anything. What the
hypervisor is about to do is no more than that: only at the source, where a guest that comes back is the end of the
matter, are the ports made active for it in advance.
"""

from __future__ import annotations

import time

from migrator.agent.destination import DestinationEnd
from migrator.agent.end import End
from migrator.agent.ends import Ends
from migrator.agent.guests import GuestEvent
from migrator.agent.source import SourceEnd
from migrator.lifecycle import source_words as leaving
from migrator.lifecycle.destination_words import Phase as Arriving
from migrator.lifecycle.machine import Guest

UNDECIDED = leaving.EARLY | leaving.STOPPING | {leaving.Phase.FINAL}
"""Phases of a source whose guest is stopped: the destination has not committed yet, as far as is known here."""
RETURNING = leaving.STOPPING | leaving.UNSURE | {leaving.Phase.ABORTED}
"""Phases in which a guest that starts at the source again has ports that must become active first."""


async def left(ends: Ends, vm: str, seconds: float) -> bool:
    """See AgentSide.left."""
    end = _newest(ends, vm)
    if not isinstance(end, SourceEnd) or not end.order.strict:
        return True
    return await end.until(lambda: not (end.state.phase in UNDECIDED and _stopped(end)), seconds)


async def may_start(ends: Ends, vm: str, seconds: float) -> str:
    """See AgentSide.may_start."""
    end = _newest(ends, vm)
    if isinstance(end, SourceEnd) and end.order.strict:
        await _returned(ends, end, seconds)
    if isinstance(end, DestinationEnd) and end.order.strict:
        return await _all_here(end, seconds)
    return ""


def _newest(ends: Ends, vm: str) -> End | None:
    return next(iter(ends.of(vm)), None)


def _stopped(end: SourceEnd) -> bool:
    return end.state.guest is not Guest.RUNNING


async def _returned(ends: Ends, end: SourceEnd, seconds: float) -> None:
    ends.guest(GuestEvent(end.vm, "running", moving=True, reason="about to run", time=time.monotonic()))
    await end.until(lambda: end.state.phase not in RETURNING or _active(end), seconds)


def _active(end: SourceEnd) -> bool:
    return end.state.phase is leaving.Phase.ABORTED and end.ports.free


async def _all_here(end: DestinationEnd, seconds: float) -> str:
    def decided() -> bool:
        return end.state.committed or end.state.guest or end.state.phase in {Arriving.FENCED, Arriving.ABORTED}

    await end.until(decided, seconds)
    if end.state.committed or end.state.guest:
        return ""
    if end.state.phase is Arriving.FENCED:
        return f"its network state cannot be completed any more: {end.report.reason or 'the source was lost'}"
    if end.state.phase is Arriving.ABORTED:
        return f"its migration {end.report.id} was aborted: {end.report.reason or 'the source goes on'}"
    return f"the last of its network state has not come within {seconds:g} s ({end.state.phase})"
