"""Where frames from guests wait: a veth pair a host with HTB at one end and a program at the other.

From a port's program into the near end, whose HTB has a class for each port that shapes, out of the far end into
from_shaper, which looks up where the frame goes by then. The pair is there while a port needs it. IFB would spare a
device, but what leaves it meets no program any more.
"""

from __future__ import annotations

import contextlib
import errno
import threading

from pyroute2 import IPRoute

from datapath.drivers.ebpf import devices, htb
from datapath.drivers.ebpf.attach import Attachments, Direction
from datapath.drivers.ebpf.devices import kernel_errors
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.errors import KernelError

_QUEUE = 65_536  # frames a class
_MTU = 65_535


class Shaper:
    """Classes by slot. Calls for different slots may come from different threads."""

    def __init__(self, kernel: Kernel, attachments: Attachments, prefix: str) -> None:
        self._kernel, self._attachments = kernel, attachments
        self._near, self._far = f"{prefix}q0", f"{prefix}q1"
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
        """Take the pair off the host."""
        with self._lock:
            self._used.clear()
            self._tidy()

    def _make(self) -> None:
        if self.ifindex:
            return
        with contextlib.ExitStack() as undo:
            if devices.link(self._near) is None:
                undo.callback(self._tidy)
                self._add()
            self._take()
            undo.pop_all()

    def _take(self) -> None:
        """The pair is there, whoever made it."""
        near, far = devices.link(self._near), devices.link(self._far)
        if near is None or far is None:
            raise KernelError(f"shaper {self._near}", errno.ENODEV, hint="delete what is left of the pair")
        htb.set_root(near.ifindex)
        self._kernel.devices.set(far.ifindex, (0, C.DEVICE_SHAPER))
        self._attachments.attach(far.ifindex, Direction.INGRESS, self._kernel.switch.program("from_shaper"))
        self.ifindex = near.ifindex

    def _add(self) -> None:
        with IPRoute() as route, kernel_errors(f"make shaper {self._near}"):
            route.link("add", ifname=self._near, kind="veth", peer={"ifname": self._far})
            for name in (self._near, self._far):
                devices.quiet(name)
                route.link("set", ifname=name, mtu=_MTU, txqlen=_QUEUE, state="up")

    def _tidy(self) -> None:
        if self._used:
            return
        far = devices.link(self._far)
        if far is not None:
            with contextlib.suppress(KernelError):
                self._attachments.detach(far.ifindex, Direction.INGRESS)
            self._kernel.devices.delete(far.ifindex)
        devices.remove(self._near)
        self.ifindex = 0
