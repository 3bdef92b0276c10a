# SPDX-License-Identifier: GPL-2.0-only
"""Traffic inside a lab: processes in one namespace each, told what to do by JSON lines (`lab.processes.Worker`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from migrator.lab.loop import Loop, Operation, Orders


def serve(operations: Callable[[Loop, list[Orders]], dict[str, Operation]], *, niceness: int = 0) -> int:
    """Run a worker: say that it is ready, then obey until the end of the input.

    `operations(loop, orders)` makes its operations; orders[0] is there once they are called.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    loop, box = Loop(), list[Orders]()
    box.append(Orders(loop, operations(loop, box)))
    box[0].answer({"ready": True})
    loop.run()
    return 0
