"""Hosts that a driver under contract runs: one class a driver, all with the same face."""

from __future__ import annotations

import abc
import contextlib
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from datapath.drivers.dummy import DummyDriver
from datapath.provider import Driver, Event, Network, NetworkKind, PortRef
from datapath.registry import driver
from datapath.state.kind import Record
from tests.contract.samples import MAC, port_record
from tests.netns.private import enter, private_namespace, wait_until

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
BLUE = Network("blue", NetworkKind.LOCAL)
PEERS = {"here": "192.0.2.1", "there": "192.0.2.2"}
_numbers = itertools.count(1)

_PATH = ("commit", "open", "hold", "quiesce", "redirect", "stub")
STATES = ("staged", "committed", "active", "held", "quiesced", "redirecting", "stub")
"""In the order in which a source's port comes by them."""


def ref(epoch: int = 1, *, mac: str = MAC, vm: str = VM) -> PortRef:
    return PortRef(vm, mac, epoch)


def bring(made: Driver, port: PortRef, state: str) -> None:
    """Bring a staged port to one of STATES."""
    for name in _PATH[: STATES.index(state)]:
        if name == "redirect":
            made.redirect(port, 4711, "there")
        elif name == "stub":
            made.purge(port, keep_redirect=True)
        else:
            getattr(made, name)(port)


class Host(abc.ABC):
    """One host with a started driver and the network `blue`."""

    kind: str
    options: dict[str, Any]

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.start()

    def start(self) -> None:
        """A new driver object runs the switch."""
        self.driver = driver(self.kind)()
        self.driver.start(self.options, self.events.append)
        self.driver.set_network(BLUE)
        self.driver.set_hosts(PEERS)

    def take_over(self) -> None:
        """A new driver object runs the switch as it is."""
        self.driver = driver(self.kind)()
        self.driver.start(self.options, self.events.append)

    def restart(self) -> None:
        self.driver.stop()
        self.take_over()

    def crash(self, calls: Callable[[Driver], None]) -> None:
        """A driver that does what `calls` does dies then without a word; a new one takes over."""
        self.driver.stop()
        self._die_after(calls)
        self.take_over()

    @abc.abstractmethod
    def _die_after(self, calls: Callable[[Driver], None]) -> None: ...

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
        """A port that was brought to one of STATES."""
        made = self.stage(epoch)
        bring(self.driver, made, state)
        return made

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        wait_until(true, what)

    def empty(self) -> None:
        """Purge every port; leaves the network `blue` and nothing else."""
        for status in self.driver.ports():
            self.driver.purge(status.ref)
        for network in self.driver.networks():
            if network != BLUE:
                self.driver.remove_network(network.name)
        self.driver.set_network(BLUE)
        self.driver.set_hosts(PEERS)


# ---- dummy ----


class DummyHost(Host):
    kind = "dummy"

    def __init__(self) -> None:
        self.options = {"host": "here", "fabric": f"contract-{next(_numbers)}"}
        super().__init__()

    @property
    def dummy(self) -> DummyDriver:
        assert isinstance(self.driver, DummyDriver)
        return self.driver

    def plug(self, device: str) -> None:
        self.dummy.switch.plug(device, True)

    def unplug(self, device: str) -> None:
        self.dummy.switch.plug(device, False)

    def _die_after(self, calls: Callable[[Driver], None]) -> None:
        made = DummyDriver()
        made.start(self.options, self.events.append)
        calls(made)


@contextlib.contextmanager
def dummy_host() -> Iterator[Host]:
    host = DummyHost()
    yield host
    host.driver.destroy()


# ---- ebpf ----

_DIED = 77


class EbpfHost(Host):
    """In the network namespace that the test's thread is in, with a bpffs and a state directory of its own."""

    kind = "ebpf"

    def __init__(self, directory: Path, namespace: int) -> None:
        self.namespace = namespace
        self.options = {
            "instance": f"c{os.getpid() % 10_000:x}",
            "bpffs": str(directory / "bpf"),
            "state_dir": str(directory / "state"),
            "underlay": PEERS["here"],
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

    def _die_after(self, calls: Callable[[Driver], None]) -> None:
        command = [sys.executable, "-m", "tests.contract.hosts", calls.__module__, calls.__name__]
        done = subprocess.run(
            [*command, json.dumps(self.options)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == _DIED, done.stderr

    def empty(self) -> None:
        super().empty()
        with IPRoute() as route:
            for link in route.get_links():
                if str(link.get_attr("IFLA_IFNAME")).startswith("ct") and link["index"] in _indexes(route):
                    route.link("del", index=link["index"])


def _indexes(route: IPRoute) -> list[int]:
    """Devices that are still there: deleting one end of a pair takes the other."""
    return [link["index"] for link in route.get_links()]


def _ignore(event: Event) -> None:
    pass


def _do_and_die(module: str, name: str, options: str) -> None:
    made = driver("ebpf")()
    made.start(json.loads(options), _ignore)
    getattr(importlib.import_module(module), name)(made)
    os._exit(_DIED)


@contextlib.contextmanager
def ebpf_switch() -> Iterator[Host]:
    """Skips, naming the feature, where the kernel or a right is missing. The caller enters it by `inside`."""
    missing = [f"{name}: {cure}" for name, there, cure in driver("ebpf").check({}) if not there]
    if missing:
        pytest.skip("features are missing: " + "; ".join(missing))
    directory = Path(tempfile.mkdtemp(prefix="contract-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        stack.callback(_unmounted, directory / "bpf")
        with private_namespace() as namespace:
            _add_underlay()
            host = EbpfHost(directory, os.dup(namespace))
        stack.callback(os.close, host.namespace)
        stack.callback(_destroyed, host)
        yield host


@contextlib.contextmanager
def ebpf_host() -> Iterator[Host]:
    """Such a switch, and the calling thread inside its network namespace."""
    with ebpf_switch() as host, inside(host):
        yield host


def _add_underlay() -> None:
    """The device that has this host's address between hosts."""
    with IPRoute() as route:
        route.link("add", ifname="under0", kind="veth", peer={"ifname": "under1"})
        index = route.link_lookup(ifname="under0")[0]
        route.addr("add", index=index, address=PEERS["here"], prefixlen=24)
        route.link("set", index=index, state="up")


def _destroyed(host: EbpfHost) -> None:
    with inside(host):
        host.empty()
        host.driver.destroy()


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """The calling thread is in the host's network namespace, where it has one."""
    if not isinstance(host, EbpfHost):
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        enter(host.namespace)
        yield
    finally:
        enter(home)
        os.close(home)


def _unmounted(path: Path) -> None:
    if path.is_mount():
        subprocess.run(["umount", str(path)], check=True, timeout=10)


HOSTS = {"dummy": dummy_host, "ebpf": ebpf_switch}

if __name__ == "__main__":
    _do_and_die(*sys.argv[1:])
