"""Taps of interfaces `type='ethernet' managed='no'`: libvirt opens what is there and makes nothing itself.

The hook has them made before libvirt starts QEMU and removed after it ended. A tap that somebody else made under the
name is used and left alone: what is ours is written down, by name and ifindex, for the agent may be another by then.
They belong to root, by TUNSETOWNER: libvirtd opens them, and hands QEMU the descriptors. The kernel lets whoever may
open /dev/net/tun, on most hosts everybody, take a free queue of a tap without owner, and so be the guest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from datapath.errors import FeatureMissing, KernelError
from migrator.agent.libvirt.domain import Domain, Interface
from migrator.errors import JournalFailed

# linux/if_tun.h, linux/if.h, linux/sockios.h, linux/rtnetlink.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_IFF_UP = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU = 0x8913, 0x8914, 0x8922
_RTM_DELLINK, _NLMSG_ERROR, _REQUEST_ACK = 17, 2, 0x5
_FLAGS, _VALUE = struct.Struct("=16sh22x"), struct.Struct("=16si20x")  # struct ifreq


class Taps:
    """The taps that this agent made, in written down in a directory, one small file a VM. Calls may block a little."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def make(self, domain: Domain) -> list[str]:
        """Have a tap for each unmanaged interface that is ours; returns the names of those that were made.

        Raises FeatureMissing (no /dev/net/tun), KernelError, JournalFailed; what was made until then is gone again.
        """
        book = self._read(domain.uuid)
        made: list[str] = []
        try:
            for interface in _unmanaged(domain):
                if self._keep(interface, book):
                    continue
                make_tap(interface.device, multi_queue=interface.queues > 1)
                made.append(interface.device)
                book[interface.device] = [socket.if_nametoindex(interface.device), interface.queues]
                if interface.mtu:
                    set_mtu(interface.device, interface.mtu)
            if made:
                self._write(domain.uuid, book)
        except BaseException:
            for name in made:
                remove_link(socket.if_nametoindex(name))
            raise
        return made

    @staticmethod
    def _keep(interface: Interface, book: dict[str, list[int]]) -> bool:
        """Is the device there as it has to be? One of ours with another sort of queues is taken away."""
        ifindex = _ifindex(interface.device)
        if not ifindex:
            return False
        mine, queues = book.get(interface.device, [0, 0])
        if mine != ifindex or (queues > 1) == (interface.queues > 1):
            return True
        remove_link(ifindex)
        return False

    def remove(self, vm: str) -> list[str]:
        """Remove the VM's taps that were made here; returns their names. Those that are gone already are no error."""
        removed = []
        for name, (ifindex, _) in self._read(vm).items():
            if _ifindex(name) == ifindex:
                remove_link(ifindex)
                removed.append(name)
        self._path(vm).unlink(missing_ok=True)
        return removed

    def _path(self, vm: str) -> Path:
        return self._directory / f"{vm}.json"

    def _read(self, vm: str) -> dict[str, list[int]]:
        """Name -> [ifindex, queues]. What cannot be read counts as not ours."""
        try:
            found = json.loads(self._path(vm).read_text())
            return {str(name): [int(ifindex), int(queues)] for name, (ifindex, queues) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, vm: str, book: dict[str, list[int]]) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            new = self._path(vm).with_suffix(".new")
            new.write_text(json.dumps(book))
            new.replace(self._path(vm))
        except OSError as error:
            raise JournalFailed(
                f"{self._path(vm)}: {error.strerror}", hint="agent.state_dir has to be writable"
            ) from error


def _unmanaged(domain: Domain) -> Sequence[Interface]:
    return [one for one in domain.owned if one.kind == "ethernet" and not one.managed]


def make_tap(name: str, *, multi_queue: bool) -> None:
    """A persistent tap with vnet headers, up. The kernel asks whoever opens it for the same sort of queues.

    Raises FeatureMissing, KernelError (EBUSY, EINVAL: the name is another device's).
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise FeatureMissing(f"/dev/net/tun: {error.strerror}", hint="load the tun module, run as root") from None
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if multi_queue else 0)
        _ioctl(fd, _TUNSETIFF, _FLAGS.pack(name.encode(), flags), f"make tap {name}")
        _ioctl(fd, _TUNSETOWNER, 0, f"give tap {name} to root")
        _ioctl(fd, _TUNSETPERSIST, 1, f"keep tap {name}")
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):  # a kernel without IPv6
        Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = _ioctl(control.fileno(), _SIOCGIFFLAGS, _FLAGS.pack(name.encode(), 0), f"flags of {name}")
        up = _FLAGS.pack(name.encode(), _FLAGS.unpack(request)[1] | _IFF_UP)
        _ioctl(control.fileno(), _SIOCSIFFLAGS, up, f"set {name} up")


def set_mtu(name: str, mtu: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        _ioctl(control.fileno(), _SIOCSIFMTU, _VALUE.pack(name.encode(), mtu), f"set MTU {mtu} of {name}")


def remove_link(ifindex: int) -> None:
    """Delete a device, also while somebody holds a queue of it. One that is not there is no error."""
    message = struct.pack("=IHHIIBxHiII", 32, _RTM_DELLINK, _REQUEST_ACK, 1, 0, 0, 0, ifindex, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(10)
        netlink.send(message)
        answer = netlink.recv(4096)
    kind, failed = struct.unpack_from("=H", answer, 4)[0], -struct.unpack_from("=i", answer, 16)[0]
    if kind == _NLMSG_ERROR and failed not in (0, errno.ENODEV):
        raise KernelError(f"delete device {ifindex}", failed)


def _ifindex(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _ioctl(fd: int, request: int, argument: bytes | int, what: str) -> bytes:
    try:
        done = fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise KernelError(what, error.errno or errno.EIO) from None
    return done if isinstance(done, bytes) else b""
