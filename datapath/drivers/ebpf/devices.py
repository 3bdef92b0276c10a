"""Devices of the host: which are there, the tunnel device, and settings that keep the kernel's own frames off a device.

Calls act in the network namespace of the calling thread; a Watch in that of the thread that made it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from datapath.errors import FeatureMissing, KernelError

_log = logging.getLogger(__name__)

TUNNEL_PORT = 4789
TUNNEL_MTU = 65465  # the largest: what a network may carry is decided per network, not here

# linux/rtnetlink.h, linux/netlink.h, linux/if_link.h, linux/if.h
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_RTMGRP_LINK = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_QDISC, _IFLA_MASTER, _IFLA_TXQLEN = 1, 3, 4, 6, 10, 13
_NLA_TYPE_MASK = 0x3FFF
_IFF_UP = 1
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_LINK = struct.Struct("=BxHiII")  # ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE = 1 << 18


@dataclass(frozen=True)
class Link:
    """A network device."""

    ifindex: int
    name: str
    mac: str  # "" if it has none
    mtu: int
    up: bool
    master: int = 0  # ifindex of the bridge (or the like) that it is in
    queue: int = field(default=0, compare=False)  # frames that may wait in it (txqueuelen)
    qdisc: str = field(default="", compare=False)


def links() -> dict[str, Link]:
    """All devices of this namespace by name."""
    with _socket(0) as sock:
        return {link.name: link for link in _dump(sock)}


def link(name: str) -> Link | None:
    """One device; None if it is not there. Costs the same beside however many others."""
    with _socket(0) as sock:
        found = _ask(sock, name)
    return found if found is not None and found.name == name else None  # the kernel looks at alternative names, too


class Watch:
    """Tells which devices appear and disappear.

    `added` and `removed` are called from a thread of the watch: at first once for each device that is there, then for
    each change. A device that is renamed, or whose name returns with another ifindex, is removed and added; one that
    changes its MAC, MTU, state or bridge is added again. If the kernel loses messages the watch compares all anew.
    What a callback raises is logged, and the watch goes on.
    """

    def __init__(self, added: Callable[[Link], None], removed: Callable[[Link], None]) -> None:
        self._added, self._removed = added, removed
        self._known: dict[int, Link] = {}
        self._socket = _socket(_RTMGRP_LINK)
        self._query = _socket(0)
        self._socket.setblocking(False)
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def start(self) -> None:
        """Returns when the devices that are there have been told."""
        self._compare()
        self._thread.start()

    def stop(self) -> None:
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
        self._query.close()
        os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while all(fd != self._wake for fd, _ in poll.poll()):
            try:
                data = self._socket.recv(_RECEIVE)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._compare()
                continue
            for kind, body in _messages(data):
                if kind in (_RTM_NEWLINK, _RTM_DELLINK) and not _LINK.unpack_from(body)[0]:  # AF_BRIDGE repeats
                    self._note(_parse(body), kind == _RTM_NEWLINK)

    def _compare(self) -> None:
        there = {found.ifindex: found for found in _dump(self._query)}
        for gone in [known for ifindex, known in self._known.items() if ifindex not in there]:
            self._note(gone, False)
        for found in there.values():
            self._note(found, True)

    def _note(self, found: Link, there: bool) -> None:
        before = self._known.get(found.ifindex)
        if before == found and there:
            return
        if before is not None and (not there or before.name != found.name):
            del self._known[found.ifindex]
            self._tell(self._removed, before)
        if there:
            self._known[found.ifindex] = found
            self._tell(self._added, found)

    @staticmethod
    def _tell(callback: Callable[[Link], None], found: Link) -> None:
        try:
            callback(found)
        except Exception:
            _log.exception("a change of device %s was not handled", found.name)


def quiet(name: str) -> None:
    """Keep the kernel from sending anything of its own through a device: no IPv6, no multicast."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        _sysctl(name).joinpath("disable_ipv6").write_text("1")


def _sysctl(name: str) -> Path:
    return Path("/proc/sys/net/ipv6/conf") / name


def make_tunnel(name: str, port: int = TUNNEL_PORT, mtu: int = TUNNEL_MTU) -> Link:
    """The one vxlan device, external (keys from programs) with GBP marks; one like it that is there is taken.

    Raises FeatureMissing (no vxlan in this kernel), KernelError (EADDRINUSE: another vxlan device has the port; EEXIST:
    the name is another's).
    """
    if link(name) is None:
        _add_tunnel(name, port)
    quiet(name)
    with IPRoute() as route, kernel_errors(f"set up device {name}"):
        made = route.link("get", ifname=name)[0]  # get_links would ask for all devices
        data = made.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
        kind = made.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
        if kind != "vxlan" or not data.get_attr("IFLA_VXLAN_COLLECT_METADATA"):
            raise KernelError(f"device {name} is no external vxlan", errno.EEXIST, hint="name another tunnel device")
        if data.get_attr("IFLA_VXLAN_PORT") != port:
            remove(name)
            _add_tunnel(name, port)
        route.link("set", ifname=name, mtu=mtu, state="up")
    found = link(name)
    if found is None:
        raise KernelError(f"device {name} is gone again", errno.ENODEV)
    return found


def _add_tunnel(name: str, port: int) -> None:
    with IPRoute() as route, kernel_errors(f"make vxlan device {name}"):
        try:
            route.link(
                "add",
                ifname=name,
                kind="vxlan",
                vxlan_collect_metadata=1,
                vxlan_gbp=True,
                vxlan_learning=0,
                vxlan_port=port,
                vxlan_udp_zero_csum6_tx=1,
                vxlan_udp_zero_csum6_rx=1,
            )
        except NetlinkError as error:
            if error.code == errno.EOPNOTSUPP:
                raise FeatureMissing("no vxlan devices", hint="load the vxlan module (CONFIG_VXLAN)") from None
            raise


def remove(name: str) -> None:
    """Delete a device; not there is no error."""
    there = link(name)
    if there is None:
        return
    with IPRoute() as route, kernel_errors(f"delete device {name}", errno.ENODEV):
        route.link("del", index=there.ifindex)


def set_queue(there: Link, length: int) -> None:
    """Let `length` frames wait in a device; gone is no error. A device with a qdisc drops what comes meanwhile."""
    with IPRoute() as route, kernel_errors(f"set the queue of device {there.name}", errno.ENODEV):
        route.link("set", index=there.ifindex, txqlen=length)


@contextlib.contextmanager
def kernel_errors(what: str, *expected: int) -> Iterator[None]:
    """pyroute2's NetlinkError as KernelError; an errno in `expected` is no error."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in expected:
            raise KernelError(what, error.code) from None


def _socket(groups: int) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    made.settimeout(10)
    made.bind((0, groups))
    return made


def _dump(sock: socket.socket) -> Iterator[Link]:
    request = _HEADER.pack(_HEADER.size + _LINK.size, _RTM_GETLINK, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    sock.send(request + _LINK.pack(0, 0, 0, 0, 0))
    while True:
        for kind, body in _messages(sock.recv(_RECEIVE)):
            if kind == _NLMSG_DONE:
                return
            if kind == _RTM_NEWLINK:
                yield _parse(body)


def _ask(sock: socket.socket, name: str) -> Link | None:
    """The device that the kernel has by a name. Raises KernelError."""
    wanted = name.encode() + b"\0"
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(wanted), _IFLA_IFNAME) + wanted.ljust(
        -(-len(wanted) // 4) * 4, b"\0"
    )
    body = _LINK.pack(0, 0, 0, 0, 0) + attribute
    sock.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETLINK, _NLM_F_REQUEST, 1, 0) + body)
    for kind, answer in _messages(sock.recv(_RECEIVE)):
        if kind == _RTM_NEWLINK:
            return _parse(answer)
        if kind == _NLMSG_ERROR:
            code = -int.from_bytes(answer[:4], sys.byteorder, signed=True)
            if code not in (errno.ENODEV, errno.EINVAL, errno.ERANGE):  # the latter: no name that a device can have
                raise KernelError(f"look for device {name}", code)
    return None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _parse(body: bytes) -> Link:
    _, _, ifindex, flags, _ = _LINK.unpack_from(body)
    attributes, at = {}, _LINK.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            break
        attributes[kind & _NLA_TYPE_MASK] = body[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    name = attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode()
    mac = attributes.get(_IFLA_ADDRESS, b"")
    mtu = int.from_bytes(attributes.get(_IFLA_MTU, b""), sys.byteorder)
    master = int.from_bytes(attributes.get(_IFLA_MASTER, b""), sys.byteorder)
    queue = int.from_bytes(attributes.get(_IFLA_TXQLEN, b""), sys.byteorder)
    qdisc = attributes.get(_IFLA_QDISC, b"").rstrip(b"\0").decode()
    address = mac.hex(":") if len(mac) == 6 else ""
    return Link(ifindex, name, address, mtu, bool(flags & _IFF_UP), master, queue, qdisc)
