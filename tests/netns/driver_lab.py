# SPDX-License-Identifier: GPL-2.0-only
"""Hosts with the real driver and guests on veth pairs, each in a network namespace and a thread of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute

from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.provider import Event, Network, NetworkKind, PortRef
from migrator.lab.errors import LabError

from .private import private_namespace, wait_until

T = TypeVar("T")
_numbers = itertools.count(1)
BLUE = Network("blue", NetworkKind.LOCAL)
VM = "6f1c0f6e-8a5d-4e0e-9d3e-{:012x}"

ANY = [
    {"id": 1, "direction": "from", "priority": 1, "protocol": "any", "action": "allow"},
    {"id": 2, "direction": "to", "priority": 1, "protocol": "any", "action": "allow"},
]


def rules(*given: dict[str, Any]) -> list[dict[str, Any]]:
    """Rules with what they lack filled in."""
    blank = {"remote": [], "ports": [], "icmp": [], "log": False, "priority": 10, "action": "allow"}
    return [{"id": number, **blank, **one} for number, one in enumerate(given, 1)]


class Place:
    """A network namespace with the one thread that is in it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._leave = threading.Event()
        self._stack = contextlib.ExitStack()
        self.namespace = self.run(lambda: self._stack.enter_context(private_namespace()))

    def run(self, call: Callable[[], T]) -> T:
        return self._pool.submit(call).result(120)

    def close(self) -> None:
        self.run(self._stack.close)
        self._pool.shutdown()

    def socket(self, kind: int, family: int = socket.AF_INET) -> socket.socket:
        """A socket of this namespace, to be used from any thread."""
        made = self.run(lambda: socket.socket(family, kind))
        made.settimeout(10)
        return made


def connect(
    one: Place, name: str, other: Place, far_name: str, mac: str = "", mtu: int = 1500, ipv6: bool = False
) -> None:
    """A veth pair between two places. IPv6 is off: nothing moves but what a test sends."""

    def make() -> None:
        with IPRoute() as route:
            peer: dict[str, Any] = {"ifname": far_name, "net_ns_fd": other.namespace}
            route.link("add", ifname=name, kind="veth", peer=peer | ({"address": mac} if mac else {}))

    one.run(make)
    for place, end in ((one, name), (other, far_name)):
        place.run(lambda end=end: _up(end, mtu, ipv6))  # type: ignore[misc]


def _up(name: str, mtu: int, ipv6: bool) -> None:
    Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("0" if ipv6 else "1")
    Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")  # an address is good at once
    with IPRoute() as route:
        route.link("set", ifname=name, mtu=mtu, state="up")


def give_address(place: Place, device: str, address: str, prefix: int = 24) -> None:
    def give() -> None:
        with IPRoute() as route:
            route.addr("add", index=socket.if_nametoindex(device), address=address, prefixlen=prefix)

    place.run(give)


class Guest(Place):
    """A guest with `eth0`; `device` is its other end on the host."""

    def __init__(self, host: Host, address: str, *, epoch: int = 1, network: str = "blue") -> None:
        super().__init__()
        number = next(_numbers)
        self.address = address
        self.device = f"g{number}"
        self.ref = PortRef(VM.format(number), f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}", epoch)
        self.record = {"mac": self.ref.mac, "network": network, "addresses": [address]}
        connect(host, self.device, self, "eth0", self.ref.mac)
        give_address(self, "eth0", address)


class Host(Place):
    """A host with the driver."""

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.guests: list[Guest] = []
        number = next(_numbers)
        self.options = {
            "instance": f"{os.getpid() % 10_000}x{number}",
            "bpffs": str(directory / f"bpf{number}"),
            "state_dir": str(directory / f"state{number}"),
            "slots": 32,
            "networks": 64,
            "hosts": 64,
            "l2": 4096,
            "sweep_interval_s": 1.0,
            **options,
        }
        self.driver = EbpfDriver()
        self.configure: Callable[[EbpfDriver], None] = lambda _: None
        self.first: list[str] = []

    def start(self) -> None:
        self.run(lambda: self.driver.start(self.options, self.events.append))

    def begin(self, configure: Callable[[EbpfDriver], None]) -> None:
        """Start the driver, and configure it as `emptied` does again."""
        self.configure = configure
        self.start()
        self.run(lambda: self.driver.set_network(BLUE))
        self.run(lambda: configure(self.driver))
        self.first = self.run(self._traces)

    def emptied(self) -> bool:
        """Take away what a test made. False: something of it is left, this host must not serve another."""
        for status in self.run(self.driver.ports):
            self.run(lambda ref=status.ref: self.driver.purge(ref))  # type: ignore[misc]
        for guest in self.guests:
            guest.close()
        self.guests.clear()
        for network in self.run(self.driver.networks):
            self.run(lambda name=network.name: self.driver.remove_network(name))  # type: ignore[misc]
        self.run(lambda: self.driver.set_network(BLUE))
        self.run(lambda: self.configure(self.driver))
        with contextlib.suppress(LabError):
            wait_until(lambda: self.run(self._traces) == self.first, "the host is as it was", 3.0)
            self.events.clear()
            return True
        return False

    def _traces(self) -> list[str]:
        """What a test may leave: in the switch, its networks, links, addresses."""
        with IPRoute() as route:
            links = [link.get_attr("IFLA_IFNAME") for link in route.get_links()]
            addresses = [f"{one['index']} {one.get_attr('IFA_ADDRESS')}" for one in route.get_addr()]
        held = [f"{sort} {name}" for sort, names in self.driver.remains().items() for name in names]
        return sorted([*held, *map(repr, self.driver.networks()), *links, *addresses])

    def restart(self) -> None:
        self.run(self.driver.stop)
        self.driver = EbpfDriver()
        self.start()

    def guest(self, address: str, policy: list[dict[str, Any]] | None = None, **fields: Any) -> Guest:
        """A guest with an open port and a policy (that allows all, unless given)."""
        made = Guest(self, address, network=fields.get("network", "blue"))
        self.guests.append(made)
        made.record.update(fields)
        self.open(made, policy)
        return made

    def open(self, guest: Guest, policy: list[dict[str, Any]] | None = None) -> None:
        from datapath.state.kind import Table

        def make() -> None:
            self.driver.stage(guest.ref, guest.record, guest.device)
            self.driver.load(guest.ref, Table("acl", records=rules(*(ANY if policy is None else policy))))
            self.driver.commit(guest.ref)
            self.driver.open(guest.ref)

        self.run(make)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(super().close)
            for guest in self.guests:
                stack.callback(guest.close)
            if self.driver._running is not None:
                self.run(self.driver.destroy)
            # -l: whoever looks into it just now does not keep it
            subprocess.run(["umount", "-l", self.options["bpffs"]], check=False, timeout=10, capture_output=True)


@contextlib.contextmanager
def hosts(count: int, ip: int = 4, **options: Any) -> Iterator[list[Host]]:
    """Hosts on one wire: `under0` with 192.0.2.N, or with `ip` 6 2001:db8::N, is the underlay, and `up0` the uplink."""
    network, prefix = {4: ("192.0.2.", 24), 6: ("2001:db8::", 64)}[ip]
    directory = Path(tempfile.mkdtemp(prefix="driver-lab-"))
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, directory)
        made = []
        for number in range(1, count + 1):
            host = Host(directory, underlay=f"{network}{number}", uplinks=["up0"], **options)
            stack.callback(host.close)
            made.append(host)
        if count == 2:
            connect(made[0], "under0", made[1], "under0", mtu=1600, ipv6=ip == 6)
            connect(made[0], "up0", made[1], "up0")
            for number, host in enumerate(made, 1):
                give_address(host, "under0", f"{network}{number}", prefix)
        names = {f"h{number}": f"{network}{number}" for number in range(1, count + 1)}
        for host in made:
            host.begin(lambda driver: _configure(driver, names, count))
        yield made


class Shelf:
    """Hosts that stand ready between tests: the kernel takes seconds to verify a switch."""

    def __init__(self) -> None:
        self._ready: dict[tuple[int, int], list[Host]] = {}
        self._stacks: dict[tuple[int, int], contextlib.ExitStack] = {}

    @contextlib.contextmanager
    def lend(self, count: int, ip: int = 4) -> Iterator[list[Host]]:
        """As `hosts`, without options. They are lent again if nothing of the test is left on them."""
        sort = (count, ip)
        if sort not in self._ready:
            stack = self._stacks[sort] = contextlib.ExitStack()
            self._ready[sort] = stack.enter_context(hosts(count, ip))
        try:
            yield self._ready[sort]
        finally:
            self._take_back(sort)

    def _take_back(self, sort: tuple[int, int]) -> None:
        try:
            good = all(host.emptied() for host in self._ready[sort])
        except BaseException:
            self._drop(sort)
            raise
        if not good:
            self._drop(sort)

    def _drop(self, sort: tuple[int, int]) -> None:
        del self._ready[sort]
        self._stacks.pop(sort).close()

    def close(self) -> None:
        for sort in list(self._ready):
            self._drop(sort)


shelf = Shelf()


def _remove(directory: Path) -> None:
    """What is mounted there still is let go, however often: an agent that dies may have mounted it once more."""
    wait_until(lambda: _removed(directory), f"{directory} is removed")


def _removed(directory: Path) -> bool:
    for place in filter(Path.is_mount, directory.iterdir()):
        subprocess.run(["umount", "-l", str(place)], check=False, timeout=10, capture_output=True)
    with contextlib.suppress(OSError):
        shutil.rmtree(directory)
    return not directory.exists()


def _configure(driver: EbpfDriver, names: dict[str, str], count: int) -> None:
    driver.set_hosts(names)
    if count > 1:
        driver.set_network(Network("vlan", NetworkKind.UPLINK, uplink="up0", vlan=7))
        driver.set_network(Network("over", NetworkKind.OVERLAY, vni=5000, mtu=1500))


__all__ = ["ANY", "Guest", "Host", "Place", "connect", "give_address", "hosts", "rules", "shelf", "wait_until"]
