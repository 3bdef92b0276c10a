"""What a switchover keeps away from the agent: Python's collector, and ordinary threads that have the CPU.

A full collection costs more than the switchover itself. On busy CPUs each of its steps, a dozen in two agents, would
wait for its turn, up to 10 ms each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path

LONGEST_S = 10.0
URGENT_S = 1.0
"""No longer, whatever becomes of the switchover: real-time threads take the CPU from guests. The kernel leaves others a
twentieth of it (sched(7), sched_rt_runtime_us)."""
RANK = 1
"""The lowest of the real-time priorities: behind whatever else an administrator has made so."""


class Switchovers:
    """Those under way, by name. `first` is called when there is one, `last` when there is none any more."""

    def __init__(self, first: Callable[[], None], last: Callable[[], None], longest_s: float) -> None:
        self._first, self._last, self.longest_s = first, last, longest_s
        self._holders: dict[str, asyncio.TimerHandle] = {}

    def begin(self, name: str) -> None:
        """Until `end`, or for `longest_s` from now. In the event loop's thread."""
        before = self._holders.get(name)
        if before is not None:
            before.cancel()
        elif not self._holders:
            self._first()
        self._holders[name] = asyncio.get_running_loop().call_later(self.longest_s, self.end, name)

    def end(self, name: str) -> None:
        ended = self._holders.pop(name, None)
        if ended is not None:
            ended.cancel()
            if not self._holders:
                self._last()


class Priority:
    """Scheduling of this process's threads. All of them: one that has Python's lock must not wait for a turn either."""

    def __init__(self) -> None:
        self.may_rise = False
        """Set by the daemon: what else has an agent in it, as a test, stays as it is."""

    def rise(self) -> None:
        """Real-time, where the system lets us: RLIMIT_RTPRIO or CAP_SYS_NICE, and a cgroup with time for it."""
        if self.may_rise:
            _schedule(os.SCHED_RR, RANK)

    def fall(self) -> None:
        """As before; the nice value has stayed."""
        if self.may_rise:
            _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, rank: int) -> None:
    """Of all threads, also of those that others begin meanwhile."""
    seen: set[int] = set()
    while fresh := {int(task.name) for task in Path("/proc/self/task").iterdir()} - seen:
        for thread in fresh:
            with contextlib.suppress(OSError):  # it has ended, or may not
                os.sched_setscheduler(thread, policy, os.sched_param(rank))
        seen |= fresh


PRIORITY = Priority()
QUIET = Switchovers(gc.disable, gc.enable, LONGEST_S)
URGENT = Switchovers(PRIORITY.rise, PRIORITY.fall, URGENT_S)
