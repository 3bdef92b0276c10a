# SPDX-License-Identifier: GPL-2.0-only
"""A libvirt host on this machine: namespaces of its own, private /run, /etc/libvirt, …, and a libvirtd in them.

    host = LibvirtHost(lab, "h1")         the lab's network namespace h1; mounts, host name and process ids of its own
    host.connection().listAllDomains()    from outside, through a socket in the lab's directory
    host.libvirtd.kill(); host.start_libvirtd()

Processes inside see the socket as qemu:///system does. All of them end with the host's first process, which ends when
the lab's process does, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt

from migrator.lab import netns
from migrator.lab.errors import LabError
from migrator.lab.processes import PATIENT_S, Daemon, wait_until
from migrator.lab.topology import Lab

from . import events

PLACES = {  # in the host: below its directory in the lab
    "/run": "run",
    "/etc/libvirt": "etc",
    "/var/lib/libvirt": "lib",
    "/var/cache/libvirt": "cache",
    "/var/log/libvirt": "log",
}
USER = ("libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin", "libvirt-qemu:x:64055:")

LIBVIRTD_CONF = """
host_uuid = "{uuid}"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
listen_addr = "{address}"
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""

# QEMU runs as root: it has to read a kernel and write a console below this checkout and /tmp, wherever these are
QEMU_CONF = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
migration_address = "{address}"
"""


class HostDaemon(Daemon):
    """A process in all namespaces of a host; `pid` is its own, as the outside knows it."""

    def __init__(self, host: LibvirtHost, name: str, command: Sequence[str]) -> None:
        super().__init__(name, host.name, command, host.lab.directory / f"{name}.log")
        self.host = host
        self._pid = 0

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.host.inside(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._pid = wait_until(f"{self.name} is forked", self._child)

    def _child(self) -> int:
        """nsenter waits for the process that it forked into the process namespace."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise LabError(f"{self.name} ended: {self.tail()}")
        return next(_children(self.process.pid), 0)

    @property
    def pid(self) -> int:
        return self._pid

    def stop(self, timeout_s: float = 10.0) -> int | None:
        if self.process is None:
            return None
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        return self.process.returncode

    def kill(self) -> None:
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self.process.wait(10)

    def reload(self) -> None:
        """SIGHUP: libvirtd looks for hooks that were added."""
        self._signal(signal.SIGHUP)

    def _signal(self, number: int) -> None:
        """nsenter stops with a child that stops, and would not see it end."""
        if self.process is not None and self.running() and self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)
            self.process.send_signal(signal.SIGCONT)


def _children(parent: int) -> Iterator[int]:
    """Processes that a process forked and has not waited for."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            _, _, fields = entry.read_text().rpartition(") ")
            if int(fields.split()[1]) == parent:
                yield int(entry.parent.name)


class LibvirtHost:
    """The namespaces and the libvirtd of one host of a lab. `lab.stack` closes it."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.address = lab.underlay(name)
        self.directory = lab.directory / name
        self.uuid = str(uuid.uuid4())
        self._write_files()
        self.first = self._unshare()
        self._connection: libvirt.virConnect | None = None
        self.libvirtd = HostDaemon(self, f"libvirtd-{name}", ["libvirtd", "--listen"])

    # ---- the host ----

    @property
    def run(self) -> Path:
        """Its /run, from outside; it survives a restart of libvirtd, as a host's does."""
        return self.directory / "run"

    @property
    def hooks(self) -> Path:
        """Its /etc/libvirt/hooks/qemu.d, from outside. libvirtd looks for new ones at its start and at `reload`."""
        return self.directory / "etc" / "hooks" / "qemu.d"

    @property
    def logs(self) -> Path:
        """Its /var/log/libvirt, from outside."""
        return self.directory / "log"

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in this host."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--pid", "--net", "--wd", "--", *command]

    def run_inside(self, *command: str) -> str:
        """Run a command in this host to its end; its output. Raises LabError."""
        return netns.run(self.inside(command))

    def make_tap(self, device: str) -> None:
        """A tap that lasts, for an interface whose tap libvirt does not make."""
        netns.ip("tuntap", "add", device, "mode", "tap", "vnet_hdr", namespace=self.lab.name(self.name))
        netns.ip("link", "set", device, "up", namespace=self.lab.name(self.name))

    def power_off(self) -> None:
        """All that runs here ends at once, and its uplink is dead. There is no way back: make another lab."""
        self.lab.cut(self.name)
        self.disconnect()
        self.first.kill()  # unshare, whose child goes with it
        self.first.wait(10)
        wait_until(f"nothing runs at {self.name}", lambda: not Path("/proc", str(self.pid)).exists())

    def _write_files(self) -> None:
        for place in PLACES.values():
            (self.directory / place).mkdir(parents=True, exist_ok=True)
        self.hooks.mkdir(parents=True)
        words = {"uuid": self.uuid, "address": self.address}
        (self.directory / "etc" / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(**words))
        (self.directory / "etc" / "qemu.conf").write_text(QEMU_CONF.format(**words))
        for name, line in zip(("passwd", "group"), USER, strict=True):  # libvirtd wants the user to exist
            text = Path("/etc", name).read_text()
            (self.directory / name).write_text(text if "libvirt-qemu:" in text else f"{text}{line}\n")

    def _unshare(self) -> subprocess.Popen[str]:
        binds = {target: str(self.directory / place) for target, place in PLACES.items()}
        binds |= {f"/etc/{name}": str(self.directory / name) for name in ("passwd", "group")}
        for target in PLACES:  # the packages leave some of them to libvirt-daemon-system
            Path(target).mkdir(parents=True, exist_ok=True)
        setup = json.dumps({"name": self.name, "binds": binds})
        init = Path(__file__).with_name("init.py")
        unshare = ["unshare", "--mount", "--propagation=private", "--uts", "--pid", "--fork", "--kill-child"]
        first = subprocess.Popen(
            netns.inside(self.lab.name(self.name), [*unshare, sys.executable, str(init), setup]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lab.stack.callback(self._close, first)
        assert first.stdout is not None
        self.pid = int(first.stdout.readline() or 0)
        if first.stdout.readline().strip() != "ready":
            raise LabError(f"host {self.name}: its first process ended at once")
        return first

    def _close(self, first: subprocess.Popen[str]) -> None:
        """End all that runs here."""
        self.disconnect()
        assert first.stdin is not None and first.stdout is not None
        first.stdin.close()
        try:
            first.wait(10)
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait(10)
        first.stdout.close()
        self.libvirtd.kill()  # reaps what waited for it

    # ---- libvirtd ----

    @property
    def socket(self) -> Path:
        """libvirtd's socket, from outside."""
        return self.run / "libvirt" / "libvirt-sock"

    @property
    def uri(self) -> str:
        """For clients outside the host."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def remote_uri(self) -> str:
        """For libvirtd of another host."""
        return f"qemu+tcp://{self.address}/system"

    def start_libvirtd(self, *, wait: bool = True) -> None:
        """Start it (again); VMs that run are found again."""
        self.disconnect()
        self.libvirtd.start()
        if wait:
            self.wait_for_libvirtd()

    def wait_for_libvirtd(self, timeout_s: float = PATIENT_S) -> None:
        wait_until(f"libvirtd of {self.name} answers", self._answers, timeout_s, explain=self.libvirtd.tail)

    def restart_libvirtd(self) -> None:
        """Stop it in order and start it again."""
        self.libvirtd.stop()
        self.start_libvirtd()

    def _answers(self) -> bool:
        if not self.libvirtd.running():
            raise LabError(f"libvirtd of {self.name} ended: {self.libvirtd.tail()}")
        try:
            return bool(self.connection().getHostname())
        except libvirt.libvirtError:
            self.disconnect()
            return False

    def connection(self) -> libvirt.virConnect:
        """A connection from this process, opened once; again after libvirtd was restarted."""
        if self._connection is None:
            events.begin()
            self._connection = libvirt.open(self.uri)
        return self._connection

    def disconnect(self) -> None:
        """Close the connection from this process."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

    def define(self, xml: str) -> libvirt.virDomain:
        """A persistent domain, not started."""
        return self.connection().defineXML(xml)

    def create(self, xml: str) -> libvirt.virDomain:
        """A transient domain, started: nothing of it is left where it does not run."""
        return self.connection().createXML(xml)

    def domain(self, uuid_text: str) -> libvirt.virDomain | None:
        """The domain as this host knows it; None if it does not, or if libvirtd is down."""
        try:
            return self.connection().lookupByUUIDString(uuid_text)
        except libvirt.libvirtError:
            return None

    def runs(self, uuid_text: str) -> bool:
        """Whether the VM's vCPUs run here."""
        domain = self.domain(uuid_text)
        with contextlib.suppress(libvirt.libvirtError):
            return domain is not None and domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        return False
