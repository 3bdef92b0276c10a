"""Hosts that a driver under contract runs: one class a driver, all with the same face."""

from __future__ import annotations

import abc
import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from datapath.drivers.dummy import DummyDriver
from datapath.provider import Driver, Event, Network, NetworkKind, PortRef
from datapath.registry import driver
from datapath.state.kind import Record
from tests.contract.samples import MAC, port_record
from tests.netns.private import private_namespace, wait_until

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
_numbers = itertools.count(1)


def ref(epoch: int = 1, *, mac: str = MAC, vm: str = VM) -> PortRef:
    return PortRef(vm, mac, epoch)


class Host(abc.ABC):
    """One host with a started driver and the network `blue`."""

    kind: str
    options: dict[str, Any]

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.driver = self._started()
        self.driver.set_network(Network("blue", NetworkKind.LOCAL))
        self.driver.set_hosts({"here": "192.0.2.1", "there": "192.0.2.2"})

    def _started(self) -> Driver:
        made = driver(self.kind)()
        made.start(self.options, self.events.append)
        return made

    def restart(self, *, crashed: bool = False) -> None:
        """A new driver object takes over; `crashed`: the old one was never told."""
        if not crashed:
            self.driver.stop()
        self.driver = self._started()

    @abc.abstractmethod
    def plug(self, device: str) -> None:
        """Make the device be there."""

    @abc.abstractmethod
    def unplug(self, device: str) -> None:
        """Take the device away."""

    def stage(self, epoch: int = 1, *, device: str = "", mac: str = MAC, **changes: Any) -> PortRef:
        """Stage a port whose device is there."""
        made = ref(epoch, mac=mac)
        name = device or f"ct{epoch}x{mac[-2:]}"
        self.plug(name)
        self.driver.stage(made, self.record(mac=mac, **changes), name)
        return made

    def record(self, **changes: Any) -> Record:
        return port_record(**changes)

    def in_state(self, state: str, epoch: int = 1) -> PortRef:
        """A port brought to `state`: staged, committed, active, held, quiesced, redirecting or stub."""
        made = self.stage(epoch)
        for name in _PATH[: _PATH_LENGTH[state]]:
            if name == "redirect":
                self.driver.redirect(made, 4711, "there")
            elif name == "stub":
                self.driver.purge(made, keep_redirect=True)
            else:
                getattr(self.driver, name)(made)
        return made

    def wait_until(self, true: Any, what: str) -> None:
        wait_until(true, what)


_PATH = ("commit", "open", "hold", "quiesce", "redirect", "stub")
STATES = ("staged", "committed", "active", "held", "quiesced", "redirecting", "stub")
_PATH_LENGTH = {state: number for number, state in enumerate(STATES)}


class DummyHost(Host):
    kind = "dummy"

    def __init__(self) -> None:
        self.options = {"host": "here", "fabric": f"contract-{next(_numbers)}"}
        super().__init__()

    def plug(self, device: str) -> None:
        self._dummy().switch.plug(device, True)

    def unplug(self, device: str) -> None:
        self._dummy().switch.plug(device, False)

    def _dummy(self) -> DummyDriver:
        assert isinstance(self.driver, DummyDriver)
        return self.driver


class EbpfHost(Host):
    """In the network namespace that the test's thread is in, with a bpffs and a state directory of its own."""

    kind = "ebpf"

    def __init__(self, directory: Path) -> None:
        number = f"{os.getpid() % 100_000}{next(_numbers)}"
        self.options = {
            "instance": f"c{number}",
            "bpffs": str(directory / "bpf"),
            "state_dir": str(directory / "state"),
            "underlay": "192.0.2.1",
            "uplinks": [],
            "slots": 32,
        }
        (directory / "bpf").mkdir()
        (directory / "state").mkdir()
        super().__init__()

    def plug(self, device: str) -> None:
        with IPRoute() as route:
            if not route.link_lookup(ifname=device):
                route.link("add", ifname=device, kind="veth", peer={"ifname": f"{device}p"})
                for name in (device, f"{device}p"):
                    Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
                    route.link("set", index=route.link_lookup(ifname=name)[0], state="up")

    def unplug(self, device: str) -> None:
        with IPRoute() as route:
            for index in route.link_lookup(ifname=device):
                route.link("del", index=index)


def _destroyed(host: Host) -> None:
    for status in host.driver.ports():
        host.driver.purge(status.ref)
    host.driver.destroy()


@contextlib.contextmanager
def dummy_host() -> Iterator[Host]:
    host = DummyHost()
    yield host
    _destroyed(host)


@contextlib.contextmanager
def ebpf_host() -> Iterator[Host]:
    """Skips, naming the feature, where the kernel or a right is missing."""
    missing = [(name, cure) for name, there, cure in driver("ebpf").check({}) if not there]
    if missing:
        pytest.skip("; ".join(f"feature {name} is missing: {cure}" for name, cure in missing))
    directory = Path(tempfile.mkdtemp(prefix="contract-"))
    try:
        with private_namespace(), contextlib.ExitStack() as stack:
            stack.callback(_unmounted, directory / "bpf")
            host = EbpfHost(directory)
            stack.callback(_destroyed, host)
            yield host
    finally:
        shutil.rmtree(directory)


def _unmounted(path: Path) -> None:
    if os.path.ismount(path):
        subprocess.run(["umount", str(path)], check=True, timeout=10)


HOSTS = {"dummy": dummy_host, "ebpf": ebpf_host}
