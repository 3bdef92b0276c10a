# SPDX-License-Identifier: GPL-2.0-only
"""A network namespace without a name for the test's own thread; it goes with the last thing that is in it."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import IPRoute

from migrator.lab import processes
from migrator.lab.processes import PATIENT_S

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
ETH_P_ALL = 3


@contextmanager
def private_namespace() -> Iterator[int]:
    """Enter a new namespace with its loopback up, and leave it at the end. Yields a descriptor of it."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            with IPRoute() as route:
                route.link("set", index=1, state="up")
            yield here
        finally:
            os.close(here)
            enter(home)
    finally:
        os.close(home)


def enter(namespace: int) -> None:
    """Move the calling thread."""
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def veth(name: str, peer: str) -> tuple[int, int]:
    """A pair that is up and says nothing by itself. Returns both ifindexes."""
    with IPRoute() as route:
        route.link("add", ifname=name, kind="veth", peer={"ifname": peer})
        for end in (name, peer):
            Path(f"/proc/sys/net/ipv6/conf/{end}/disable_ipv6").write_text("1")
            route.link("set", index=socket.if_nametoindex(end), state="up")
    return socket.if_nametoindex(name), socket.if_nametoindex(peer)


@contextmanager
def raw_socket(ifindex: int, protocol: int = 0) -> Iterator[socket.socket]:
    """AF_PACKET on one device; protocol 0 only sends."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as made:
        made.bind((socket.if_indextoname(ifindex), protocol))
        made.settimeout(PATIENT_S)
        yield made


def wait_until(true: Callable[[], bool], what: str, seconds: float = PATIENT_S) -> None:
    """Look again until it is so, or fail by name. Between two looks the test's other threads have the interpreter."""
    processes.wait_until(what, true, seconds, 0.001)
