# SPDX-License-Identifier: GPL-2.0-only
"""Network namespaces: made under /run/netns, so that `ip -n` shows them to a person, and entered without the mount
namespace of `ip netns exec` (which hides /sys/fs/bpf)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrator.lab.errors import LabError

RUN = Path("/run/netns")
CLONE_NEWNET = 0x40000000
NAME = re.compile(r"^mg(\d+)[a-z]*-")

_libc = ctypes.CDLL(None, use_errno=True)


def path(name: str) -> Path:
    """File that stands for the namespace."""
    return RUN / name


def ip(*arguments: str, namespace: str = "") -> str:
    """Run `ip`, in a namespace when one is named; raises LabError with what it printed."""
    command = ["ip", *(["-n", namespace] if namespace else []), *arguments]
    return run(command)


def ip_batch(namespace: str, lines: Sequence[str]) -> None:
    """Run several `ip` commands in a namespace by one process."""
    run(["ip", "-n", namespace, "-batch", "-"], text="\n".join(lines) + "\n")


def run(command: Sequence[str], text: str = "") -> str:
    """Run a command to its end; its output, or LabError that says what was run and what it printed."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def make(name: str) -> None:
    """Make a namespace with its loopback up."""
    ip("netns", "add", name)
    ip("link", "set", "lo", "up", namespace=name)


def remove(name: str) -> None:
    """Remove a namespace with all that still runs in it; one that is not there is no error."""
    if path(name).exists():
        for process in run(["ip", "netns", "pids", name]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        ip("netns", "del", name)


def inside(name: str, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` in a namespace; the process keeps its id."""
    return ["nsenter", f"--net={path(name)}", *command]


def enter(namespace: Path) -> None:
    """Move the calling thread into a network namespace."""
    handle = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(handle, CLONE_NEWNET) != 0:
            raise LabError(f"setns {namespace}: {os.strerror(ctypes.get_errno())}", hint="a lab needs root")
    finally:
        os.close(handle)


@contextlib.contextmanager
def entered(namespace: Path) -> Iterator[None]:
    """Be in a network namespace for a while (the calling thread only)."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        yield
    finally:
        _libc.setns(before, CLONE_NEWNET)
        os.close(before)


def set_sysctl(namespace: str, key: str, value: int | str) -> None:
    """Set one of a namespace's own settings, such as `net/ipv4/tcp_syn_retries`."""
    with entered(path(namespace)):
        Path("/proc/sys", key).write_text(str(value))


def sweep() -> list[str]:
    """Remove namespaces of labs whose process is gone; their names."""
    stale = []
    for entry in RUN.glob("mg*-*"):
        match = NAME.match(entry.name)
        if match and not Path("/proc", match[1]).exists():
            stale.append(entry.name)
            with contextlib.suppress(LabError):
                remove(entry.name)
    return stale
