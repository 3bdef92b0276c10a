# SPDX-License-Identifier: GPL-2.0-only
"""First process of a libvirt host: makes the private places of its mount namespace, then only reaps.

    unshare --mount --uts --pid --fork python init.py '{"name": "h1", "binds": {"/run": "/tmp/…/run", …}}'

Prints its process id as the outside knows it, and the word "ready" when all is in place. The end of its input is the
end of the host: the kernel kills what is left in the process namespace. It must run without the project's packages.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main(setup: dict[str, object]) -> int:
    print(Path("/proc/self").readlink(), flush=True)  # /proc is still the one of outside
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket.sethostname(str(setup["name"]))
    binds = setup["binds"]
    assert isinstance(binds, dict)
    for target, source in binds.items():
        mount("--bind", source, target)
    mount("-t", "sysfs", "sysfs", "/sys")  # shows the devices of the network namespace that mounts it
    mount("-t", "proc", "proc", "/proc")
    # from here on the kernel reaps orphans by itself: a daemonised QEMU is gone the moment it ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    sys.stdin.read()
    return 0


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
