# SPDX-License-Identifier: GPL-2.0-only
"""Namespaces and wires of a lab: a fabric (one bridge), hosts with an uplink on it, peers and guests.

    Lab("name", hosts=("h1", "h2", "h3"))     h1 … h3: 10.66.0.1 … on their uplink `up0`; the control namespace: .100

Everything is registered for removal where it is made; leaving the lab removes it in reverse order.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrator.lab import netns
from migrator.lab.errors import LabError
from migrator.lab.processes import Worker

UPLINK = "up0"
UNDERLAY_MTU = 1600
DIRECTORY = "mglab-"
_labs = itertools.count()


class Lab:
    """Namespaces with wires between them; a context manager."""

    def __init__(self, hosts: Sequence[str] = ("h1", "h2", "h3")) -> None:
        self.prefix = f"mg{os.getpid()}{_letters(next(_labs))}-"
        self.stack = contextlib.ExitStack()
        self.host_names = tuple(hosts)
        self.directory = Path()
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        sweep()
        with contextlib.ExitStack() as undo:
            self.stack = undo
            self._build()
            self.stack = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def _build(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{DIRECTORY}{os.getpid()}-"))
        self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.namespace("fabric")
        netns.ip_batch(self.name("fabric"), ["link add br0 type bridge", f"link set br0 mtu {UNDERLAY_MTU} up"])
        for name in (*self.host_names, "control"):
            self.namespace(name)
            self._uplink(name)

    def name(self, short: str) -> str:
        """A namespace's full name."""
        return self.prefix + short

    def path(self, short: str) -> Path:
        """A namespace's file."""
        return netns.path(self.name(short))

    def namespace(self, short: str) -> str:
        """Make a namespace that goes with the lab; its full name."""
        full = self.name(short)
        netns.make(full)
        self.stack.callback(netns.remove, full)
        return full

    def underlay(self, host: str) -> str:
        """A host's address on the fabric."""
        return f"10.66.0.{100 if host == 'control' else self.host_names.index(host) + 1}"

    def _uplink(self, host: str) -> None:
        """A wire from a host to the fabric's bridge."""
        namespace = self.name(host)
        netns.set_sysctl(namespace, "net/ipv6/conf/default/disable_ipv6", 1)
        self.wire(host, UPLINK, "fabric", f"{host}")
        netns.ip_batch(self.name("fabric"), [f"link set {host} master br0 mtu {UNDERLAY_MTU} up"])
        netns.ip_batch(
            namespace,
            [
                f"link set {UPLINK} mtu {UNDERLAY_MTU} up",
                f"addr add {self.underlay(host)}/24 dev {UPLINK}",
            ],
        )

    def wire(self, one: str, device: str, other: str, far_device: str) -> None:
        """A veth pair between two namespaces."""
        netns.ip(
            "link",
            "add",
            device,
            "type",
            "veth",
            "peer",
            "name",
            far_device,
            "netns",
            self.name(other),
            namespace=self.name(one),
        )

    def worker(self, namespace: str, module: str, arguments: Any = None, *, name: str = "") -> Worker:
        """Start a worker (`migrator.lab.workers.MODULE`) in a namespace and wait until it is ready."""
        title = name or f"{namespace}-{module}"
        worker = Worker(
            title, self.name(namespace), f"migrator.lab.workers.{module}", arguments, self.directory / f"{title}.log"
        )
        self.adopt(worker)
        return worker

    def adopt(self, worker: Worker) -> None:
        """End a worker with the lab; wait for its first line."""
        self.workers.append(worker)
        self.stack.callback(worker.close)
        worker.answer("start")

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is made inside goes at the end of it, before the lab does."""
        outer = self.stack
        with contextlib.ExitStack() as self.stack:
            try:
                yield
            finally:
                inner, self.stack = self.stack, outer
                inner.close()

    def cut(self, host: str, *, off: bool = True) -> None:
        """Pull a host's uplink out of the fabric, or plug it in again."""
        netns.ip("link", "set", host, "down" if off else "up", namespace=self.name("fabric"))


def sweep() -> None:
    """Remove what labs left whose process was killed: namespaces with all that runs in them, mounts, directories."""
    netns.sweep()
    for directory in Path(tempfile.gettempdir()).glob(f"{DIRECTORY}*-*"):
        maker = directory.name.removeprefix(DIRECTORY).partition("-")[0]
        if maker.isdigit() and not Path("/proc", maker).exists():
            for mounted in directory.glob("*/bpf"):
                with contextlib.suppress(LabError):  # not mounted any more
                    netns.run(["umount", "-l", str(mounted)])
            shutil.rmtree(directory, ignore_errors=True)


def _letters(number: int) -> str:
    return (_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)
