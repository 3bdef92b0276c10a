#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Stands in for systemctl on a libvirt host of the lab, which has no systemd: starts what units say, as they say it.

Heeded are ExecStart, Type, CapabilityBoundingSet, KillMode=process, StateDirectory, RuntimeDirectory, TimeoutStopSec,
and the mount of bpffs that a unit wants. Verbs: daemon-reload, enable --now, restart, disable --now.
"""

from __future__ import annotations

import configparser
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
WAIT_S = 60.0
BPFFS = Path("/sys/fs/bpf")


class Unit:
    """One service that is installed."""

    def __init__(self, name: str) -> None:
        self.name = name.removesuffix(".service")
        parser = configparser.RawConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string((UNITS / f"{self.name}.service").read_text())
        self.unit, self.service = parser["Unit"], parser["Service"]
        self.pid_file = Path("/run", f"{self.name}.pid")

    def start(self) -> None:
        if "sys-fs-bpf.mount" in self.unit.get("Wants", "") and not os.path.ismount(BPFFS):
            subprocess.run(["mount", "-t", "bpf", "bpf", str(BPFFS)], check=True)
        for key, base in (("StateDirectory", "/var/lib"), ("RuntimeDirectory", "/run")):
            for word in self.service.get(key, "").split():
                Path(base, word).mkdir(parents=True, exist_ok=True)
        address = f"/run/{self.name}.notify"
        Path(address).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(address)
            process = self._spawn(address)
            self.pid_file.write_text(str(process.pid))
            deadline = time.monotonic() + WAIT_S
            while not select.select([told], [], [], 0.1)[0]:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{self.name} does not serve: {Path('/run', self.name + '.log').read_text()[-2000:]}")

    def _spawn(self, address: str) -> subprocess.Popen[bytes]:
        assert self.service["Type"] == "notify"
        given = [word.removeprefix("CAP_").lower() for word in self.service["CapabilityBoundingSet"].split()]
        bounds = ",".join(["-all", *(f"+{word}" for word in given)])
        words = ["setpriv", "--inh-caps=-all", f"--bounding-set={bounds}", *shlex.split(self.service["ExecStart"])]
        with Path("/run", f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "NOTIFY_SOCKET": address},
            )

    def stop(self) -> None:
        """SIGTERM to the main process only; it has to be gone in time."""
        process = int(self.pid_file.read_text())
        watched = os.pidfd_open(process)
        signal.pidfd_send_signal(watched, signal.SIGTERM)
        if not select.select([watched], [], [], float(self.service.get("TimeoutStopSec", "10")))[0]:
            sys.exit(f"{self.name} does not stop")


def main(words: list[str]) -> None:
    verb, names = words[0], [word for word in words[1:] if not word.startswith("-")]
    for unit in map(Unit, names):
        if verb in {"restart", "disable"}:
            unit.stop()
        if verb in {"restart", "enable"}:
            unit.start()
    if verb not in {"daemon-reload", "enable", "disable", "restart"}:
        sys.exit(f"not known: {verb}")


if __name__ == "__main__":
    main(sys.argv[1:])
