"""Programs on devices: tcx links where the kernel has them (6.6), filters on clsact where not. One interface.

    attach    puts a program on a device, or replaces the one that this switch put there: each packet meets one of them
    detach    takes it off; also when the device is gone
    attached  what is on now

Attachments outlive the agent: links by their pins, filters by themselves. A device that is made anew, or that moves to
another namespace and back with another ifindex, is attached again by whoever hears of it (devices.Watch). Calls act in
the network namespace of the calling thread.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from datapath.drivers.ebpf import syscall
from datapath.drivers.ebpf.devices import kernel_errors
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.uapi import AttachType
from datapath.errors import KernelError

_LOOPBACK = 1  # its ifindex in every namespace


class Direction(enum.StrEnum):
    INGRESS = "ingress"
    EGRESS = "egress"


@dataclass(frozen=True)
class Attachment:
    ifindex: int
    direction: Direction
    program: int  # id, as in bpftool prog show


def program_of(role: int, direction: Direction) -> str:
    """The program that a device with that role (enum device_role) runs, "" for none."""
    if role == C.DEVICE_PORT:
        return "from_port" if direction is Direction.INGRESS else "to_port"
    if direction is Direction.EGRESS:
        return {C.DEVICE_CUTTER: "to_cutter", C.DEVICE_SHAPER: "from_shaper"}.get(role, "")
    own = {C.DEVICE_UPLINK: "from_uplink", C.DEVICE_TUNNEL: "from_tunnel", C.DEVICE_SHAPER: "from_shaper"}
    return own.get(role, "from_hold" if role else "")


class Attachments(abc.ABC):
    """What this switch has put on devices."""

    @abc.abstractmethod
    def attach(self, ifindex: int, direction: Direction, program: int) -> None:
        """Put the program (a descriptor) on. Raises KernelError ENODEV."""

    @abc.abstractmethod
    def detach(self, ifindex: int, direction: Direction) -> None:
        """Take off what `attach` put on; nothing there is no error."""

    @abc.abstractmethod
    def attached(self) -> list[Attachment]:
        """Sorted by device and direction; those whose device is gone are not in it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of descriptors; attachments stay."""


def has_tcx() -> bool:
    """Asks the loopback device for its tcx programs."""
    try:
        syscall.prog_query(_LOOPBACK, AttachType.TCX_INGRESS)
    except KernelError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def attachments(links: Path, instance: str) -> Attachments:
    """The best that this kernel has. `links`: directory for pins."""
    return TcxAttachments(links) if has_tcx() else ClsactAttachments(instance)


class TcxAttachments(Attachments):
    """Links pinned as IFINDEX-DIRECTION, run behind the programs of others on the device."""

    _TYPES = {Direction.INGRESS: AttachType.TCX_INGRESS, Direction.EGRESS: AttachType.TCX_EGRESS}  # noqa: RUF012

    def __init__(self, links: Path) -> None:
        self._links = links
        self._tidy()

    def _tidy(self) -> None:
        """Pins of links whose device went while nobody looked are of no use."""
        for pin in self._links.iterdir():
            with _pinned(pin) as link:
                gone = link is not None and not syscall.link_info(link).ifindex
            if gone:
                pin.unlink(missing_ok=True)

    def attach(self, ifindex: int, direction: Direction, program: int) -> None:
        pin = self._pin(ifindex, direction)
        with _pinned(pin) as link:
            if link is not None and syscall.link_info(link).ifindex == ifindex:
                syscall.link_update(link, program)
                return
        pin.unlink(missing_ok=True)  # its device is gone, and this one has its number
        link = syscall.link_create(program, ifindex, self._TYPES[direction])
        try:
            syscall.obj_pin(link, pin)
        finally:
            os.close(link)

    def detach(self, ifindex: int, direction: Direction) -> None:
        pin = self._pin(ifindex, direction)
        with _pinned(pin) as link:
            if link is not None and syscall.link_info(link).ifindex:
                syscall.link_detach(link)  # at once; what unlink frees goes some time later
        pin.unlink(missing_ok=True)

    def attached(self) -> list[Attachment]:
        found = []
        for pin in self._links.iterdir():
            with _pinned(pin) as link:
                info = None if link is None else syscall.link_info(link)
            number, _, direction = pin.name.partition("-")
            if info is not None and info.ifindex == int(number):
                found.append(Attachment(info.ifindex, Direction(direction), info.prog_id))
        return sorted(found, key=_order)

    def close(self) -> None:
        pass

    def _pin(self, ifindex: int, direction: Direction) -> Path:
        return self._links / f"{ifindex}-{direction}"


class ClsactAttachments(Attachments):
    """Direct-action filters of one priority and handle, known by their name: that of the switch and the program's id.

    (pyroute2 does not read TCA_BPF_ID.) Each call has a socket of its own: any thread may call.
    """

    _PARENTS = {Direction.INGRESS: 0xFFFFFFF2, Direction.EGRESS: 0xFFFFFFF3}  # noqa: RUF012
    _PRIORITY = 4919
    _HANDLE = 1  # without it `replace` adds a filter each time

    def __init__(self, instance: str) -> None:
        self._name = f"migrator-{instance}:"

    def attach(self, ifindex: int, direction: Direction, program: int) -> None:
        with IPRoute() as route, kernel_errors(f"attach {direction} of device {ifindex}"):
            with kernel_errors("add clsact", errno.EEXIST):
                route.tc("add", "clsact", ifindex)
            route.tc(
                "replace-filter",
                "bpf",
                ifindex,
                handle=self._HANDLE,
                fd=program,
                name=f"{self._name}{syscall.prog_info(program).id}",
                parent=self._PARENTS[direction],
                prio=self._PRIORITY,
                classid=1,
                direct_action=True,
            )

    def detach(self, ifindex: int, direction: Direction) -> None:
        gone = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
        with IPRoute() as route, kernel_errors(f"detach {direction} of device {ifindex}", *gone):
            if any(self._filters(route, ifindex, direction)):
                parent = self._PARENTS[direction]
                route.tc("del-filter", "bpf", ifindex, handle=self._HANDLE, parent=parent, prio=self._PRIORITY)
                if not any(any(route.get_filters(ifindex, parent=parent)) for parent in self._PARENTS.values()):
                    route.tc("del", "clsact", ifindex)

    def attached(self) -> list[Attachment]:
        with IPRoute() as route:
            found = [
                Attachment(link["index"], direction, program)
                for link in route.get_links()
                for direction in Direction
                for program in self._filters(route, link["index"], direction)
            ]
        return sorted(found, key=_order)

    def close(self) -> None:
        pass

    def _filters(self, route: IPRoute, ifindex: int, direction: Direction) -> Iterator[int]:
        """Program ids of this switch's filters."""
        with contextlib.suppress(NetlinkError):  # no clsact there, or no such device
            for item in route.get_filters(ifindex, parent=self._PARENTS[direction]):
                options = item.get_attr("TCA_OPTIONS")
                name = (options.get_attr("TCA_BPF_NAME") or "") if options is not None else ""
                if name.startswith(self._name):
                    yield int(name.removeprefix(self._name))


def _order(attachment: Attachment) -> tuple[int, str]:
    return attachment.ifindex, attachment.direction


@contextlib.contextmanager
def _pinned(pin: Path) -> Iterator[int | None]:
    """Descriptor of a pinned link; None if there is none."""
    try:
        link = syscall.obj_get(pin)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        yield None
        return
    try:
        yield link
    finally:
        os.close(link)
