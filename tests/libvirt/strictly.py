# SPDX-License-Identifier: GPL-2.0-only
"""A cluster whose libvirtds have loaded the lock driver, and whose daemons can be made to stand still."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.netns.standing import StandingCluster

from .hooked import NETWORKS, OPEN, OUT, install
from .lab import LibvirtCluster, LibvirtHost

ENVIRONMENT = "LIBVIRT_LOCK_MANAGER_PLUGIN_DIR"
"""Where libvirtd looks for lock drivers instead of beside its other modules, which all hosts of a lab share."""


class StrictCluster(StandingCluster, LibvirtCluster):
    """`lock_drivers`: the directory into which the driver is installed, of all hosts."""

    lock_drivers: Path

    def install(self, host: LibvirtHost) -> str:
        """`migrator libvirt install --strict` and libvirtd started again, as its operator does; what it says."""
        said = self._libvirt(host, "install", "--strict")
        host.restart_libvirtd()
        return said

    def uninstall(self, host: LibvirtHost) -> None:
        """The driver is taken out of use at one host; the file is of all of them and stays."""
        conf = host.directory / "etc" / "qemu.conf"
        conf.write_text(conf.read_text().replace('lock_manager = "migrator"', ""))
        host.restart_libvirtd()

    def _libvirt(self, host: LibvirtHost, *words: str) -> str:
        command = [sys.executable, "-m", "migrator.cli.main", "libvirt", *words]
        return host.run_inside(*command, "--lock-drivers", str(self.lock_drivers))

    def marks(self) -> list[str]:
        """What the drivers of all hosts ask the agents for: HOST/VM.WAY."""
        found = ((name, host.run / "migrator" / "strict") for name, host in self.hosts.items())
        return sorted(f"{name}/{path.name}" for name, place in found for path in place.glob("*"))

    def said(self, host: str, **fields: str) -> list[dict[str, Any]]:
        """Lines of an agent's log with these fields."""
        found = []
        for line in self.agents[host].log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                words = json.loads(line)
                if fields.items() <= words.items():
                    found.append(words)
        return found


def at(line: dict[str, Any]) -> float:
    """When a line of a log was written, CLOCK_REALTIME in seconds."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()


@contextlib.contextmanager
def guarded() -> Iterator[StrictCluster]:
    """Two libvirt hosts h1 and h2 with hook, lock driver and agent, h3 for peers."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"lock-{os.getpid()}-"))
        stack.callback(_environment, os.environ.get(ENVIRONMENT))
        _environment(place)
        options = {"redirect_idle_s": 1.0, "settle_s": 10.0}
        made = StrictCluster(networks=NETWORKS, guests={"driver": "libvirt"}, migration_options=options)
        made.lock_drivers = Path(place)
        cluster = stack.enter_context(made)
        install(cluster)
        for host in cluster.hosts.values():
            cluster.install(host)
        cluster.apply(policies=[OUT, OPEN])
        yield cluster


def _environment(place: str | None) -> None:
    if place is None:
        os.environ.pop(ENVIRONMENT, None)
    else:
        os.environ[ENVIRONMENT] = place
