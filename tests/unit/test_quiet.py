# SPDX-License-Identifier: GPL-2.0-only
"""What a switchover keeps away from the agent: when it begins and ends, and how its threads are scheduled meanwhile."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

from migrator.agent.quiet import Switchovers
from tests.unit.pair import eventually

THREADS = """
import os, threading
from migrator.agent.quiet import PRIORITY, RANK

def policies():
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}

def beside():
    end = threading.Event()
    threading.Thread(target=end.wait).start()
    return end

ends = [beside()]
PRIORITY.rise()
assert policies() == {os.SCHED_OTHER}, "what is no daemon stays as it is"
PRIORITY.may_rise = True
os.setpriority(os.PRIO_PROCESS, 0, 7)
PRIORITY.rise()
assert policies() == {os.SCHED_RR} and os.sched_getparam(0).sched_priority == RANK
ends.append(beside())
PRIORITY.fall()
assert policies() == {os.SCHED_OTHER} and os.getpriority(os.PRIO_PROCESS, 0) == 7
for end in ends:
    end.set()
"""


def test_all_threads_run_ahead_and_back() -> None:
    ran = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_the_first_begins_it_and_the_last_ends_it() -> None:
    async def scenario() -> None:
        told: list[str] = []
        switchovers = Switchovers(lambda: told.append("first"), lambda: told.append("last"), 60.0)
        switchovers.end("b")
        switchovers.begin("a")
        switchovers.begin("b")
        switchovers.begin("a")
        switchovers.end("a")
        assert told == ["first"]
        switchovers.end("b")
        switchovers.end("b")
        assert told == ["first", "last"]

    asyncio.run(scenario())


def test_one_that_does_not_end_lasts_so_long_from_its_last_begin() -> None:
    async def scenario() -> None:
        told: list[float] = []
        switchovers = Switchovers(lambda: None, lambda: told.append(time.monotonic()), 0.2)
        switchovers.begin("a")
        await eventually(lambda: bool(told))
        switchovers.begin("a")
        began = time.monotonic()
        switchovers.begin("a")
        await eventually(lambda: len(told) == 2)
        assert told[1] - began > 0.19

    asyncio.run(scenario())


def test_a_process_without_the_right_stays_as_it_is() -> None:
    code = "import os; os.setuid(65534); from migrator.agent.quiet import PRIORITY as p; p.may_rise = True; p.rise()"
    code = f"import resource; resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0)); import migrator.agent.quiet; {code}"
    code = f"{code}; assert os.sched_getscheduler(0) == {os.SCHED_OTHER}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
