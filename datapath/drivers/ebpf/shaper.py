"""Where frames from guests wait: HTB on a device of its own, and a program that each frame meets as it leaves.

From a port's program into a macvlan, whose HTB has a class for each port that shapes; what that lets out meets
from_shaper at the egress of the device below, on the same call: one after the other, on however many CPUs the guests
are, and when the queue is empty nothing is on its way. from_shaper looks up where the frame goes by then. A veth pair
without macvlan would do with a device less, but its far end takes in what each CPU sent on that CPU, in no order
between them; behind IFB no program sees the frame any more. The device below is a veth whose other end only keeps it
up: no frame gets there. All are there while a port needs them.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading

from pyroute2 import IPRoute, NetlinkError

from datapath.drivers.ebpf import devices, htb
from datapath.drivers.ebpf.attach import Attachments, Direction
from datapath.drivers.ebpf.devices import kernel_errors
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.errors import FeatureMissing, KernelError

_QUEUE = 65_536  # frames a class
_MTU = 65_535


class Shaper:
    """Classes by slot. Calls for different slots may come from different threads."""

    def __init__(self, kernel: Kernel, attachments: Attachments, prefix: str) -> None:
        self._kernel, self._attachments = kernel, attachments
        self._queue, self._below, self._carrier = (f"{prefix}q{number}" for number in range(3))
        self._used: set[int] = set()
        self.ifindex = 0  # that frames wait in, 0 while no port shapes
        self._lock = threading.Lock()

    def check(self) -> None:
        """Can this host shape? Raises FeatureMissing, KernelError."""
        with self._lock:
            self._make()
            self._tidy()

    def use(self, slot: int) -> int:
        """A port begins to shape: the device that its frames wait in."""
        with self._lock:
            self._make()
            self._used.add(slot)
            return self.ifindex

    def leave(self, slot: int) -> None:
        """A port shapes no more; what still waits for it is dropped."""
        with self._lock:
            if slot in self._used:
                htb.remove_class(self.ifindex, slot)
                self._used.discard(slot)
                self._tidy()

    def remove(self) -> None:
        """Take the devices off the host."""
        with self._lock:
            self._used.clear()
            self._tidy()

    def _make(self) -> None:
        if self.ifindex:
            return
        with contextlib.ExitStack() as undo:
            if devices.link(self._queue) is None:
                undo.callback(self._tidy)
                self._add()
            self._take()
            undo.pop_all()

    def _take(self) -> None:
        """The devices are there, whoever made them."""
        queue, below = devices.link(self._queue), devices.link(self._below)
        if queue is None or below is None:
            raise KernelError(f"shaper {self._queue}", errno.ENODEV, hint=f"delete {self._queue}: it is made anew")
        htb.set_root(queue.ifindex)
        self._kernel.devices.set(below.ifindex, (0, C.DEVICE_SHAPER))
        self._attachments.attach(below.ifindex, self._side(queue), self._kernel.switch.program("from_shaper"))
        self.ifindex = queue.ifindex

    def _side(self, queue: devices.Link) -> Direction:
        """Where frames meet the program: an earlier version's queue is the other end of the veth pair itself. That
        stays, with what waits in it, until no port shapes."""
        with IPRoute() as route, kernel_errors(f"look at {queue.name}"):
            kind = route.link("get", index=queue.ifindex)[0].get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
        return Direction.INGRESS if kind == "veth" else Direction.EGRESS

    def _add(self) -> None:
        devices.remove(self._below)  # left when somebody deleted the queue
        with IPRoute() as route, kernel_errors(f"make shaper {self._queue}"):
            route.link("add", ifname=self._below, kind="veth", peer={"ifname": self._carrier})
            for name in (self._below, self._carrier):
                self._up(route, name)
            below = socket.if_nametoindex(self._below)
            try:
                route.link("add", ifname=self._queue, kind="macvlan", link=below, macvlan_mode="private")
            except NetlinkError as error:
                if error.code == errno.EOPNOTSUPP:
                    raise FeatureMissing("no macvlan", hint="load the macvlan module (CONFIG_MACVLAN)") from None
                raise
            self._up(route, self._queue)

    @staticmethod
    def _up(route: IPRoute, name: str) -> None:
        devices.quiet(name)
        route.link("set", ifname=name, mtu=_MTU, txqlen=_QUEUE, state="up")

    def _tidy(self) -> None:
        if self._used:
            return
        below = devices.link(self._below)
        if below is not None:
            for side in Direction:
                with contextlib.suppress(KernelError):
                    self._attachments.detach(below.ifindex, side)
            self._kernel.devices.delete(below.ifindex)
        devices.remove(self._below)  # the others go with it
        self.ifindex = 0
