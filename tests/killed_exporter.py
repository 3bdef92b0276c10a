# SPDX-License-Identifier: GPL-2.0-only
"""An agent's driver in a process of its own, which is killed in the middle of a datagram to collectors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from datapath.drivers.ebpf.collectors import Collectors, Endpoint
from datapath.drivers.ebpf.driver import EbpfDriver

BEFORE, AFTER = "before", "after"
DIES_S = 60


def killed(options: Mapping[str, Any], when: str, number: int) -> list[bytes]:
    """Run a driver until it dies by SIGKILL before or after it sends its datagram `number`, in this thread's namespace.

    The caller's driver is stopped. Returns the datagram that was noted and did not leave, if there is one.
    """
    command = [sys.executable, "-c", f"from {__name__} import run; run()", json.dumps(options), when, str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=DIES_S, check=False)
    assert done.returncode == -signal.SIGKILL, done
    return [done.stdout] if done.stdout else []


def run() -> None:
    """The other process."""
    options, when, number = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    send, left = Collectors.send, number

    def counted(self: Collectors, datagram: bytes, endpoints: Iterable[Endpoint]) -> int:
        nonlocal left
        left -= 1
        if not left and when == BEFORE:
            os.write(1, datagram)
            os.kill(os.getpid(), signal.SIGKILL)
        failed = send(self, datagram, endpoints)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return failed

    Collectors.send = counted  # type: ignore[method-assign]
    EbpfDriver().start(options, lambda _: None)
    signal.pause()
