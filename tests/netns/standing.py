# SPDX-License-Identifier: GPL-2.0-only
"""A cluster whose daemons can be made to stand still at any point of a migration (migrator/faults.py)."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrator.faults import FILE
from migrator.lab.cluster import Cluster
from migrator.lab.processes import PATIENT_S, Daemon, wait_until

BY_ROLE = {"source": "h1", "destination": "h2", "coordinator": "coordinator"}  # of a move from h1 to h2


class StandingCluster(Cluster):
    """Only the daemons are told of the file, nothing else that the lab starts."""

    def _daemon(self, name: str, namespace: str, arguments: Sequence[str]) -> Daemon:
        daemon = super()._daemon(name, namespace, arguments)
        daemon.command = ["env", f"{FILE}={self.fault_file}", *daemon.command]
        return daemon

    @property
    def fault_file(self) -> Path:
        return self.directory / "fault"

    def daemon(self, name: str) -> Daemon:
        """A host's agent, or the coordinator."""
        return self.coordinator if name == "coordinator" else self.agents[name]

    @contextlib.contextmanager
    def standing(self, point: str) -> Iterator[None]:
        """Ask for a point, `ROLE.PHASE`; at the end whoever stands there goes on, if it lives, and nobody is asked."""
        daemon = self.daemon(BY_ROLE[point.partition(".")[0]])
        self.fault_file.write_text(point)
        try:
            yield
        finally:
            self.fault_file.unlink(missing_ok=True)
            if daemon.running():
                os.kill(daemon.pid, signal.SIGCONT)

    def wait_for(self, point: str, timeout_s: float = PATIENT_S) -> None:
        """Until the daemon stands at the point that was asked for."""
        daemon = self.daemon(BY_ROLE[point.partition(".")[0]])
        wait_until(f"{daemon.name} stands at {point}", lambda: _stopped(daemon.pid), timeout_s, 0.002)


def _stopped(process: int) -> bool:
    """State of the process, the field after the name in brackets: T."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
