"""The kernel's HTB as the switch uses it: one root qdisc on a device, a class a port, each with a rate and a queue.

Queues are the classes' own: as many frames as the device may queue (txqueuelen). How many bytes wait is decided before
(lib/qos.h). Calls act in the network namespace of the calling thread. Handles are ours alone, so that what is found on
a device tells who put it there; an agent that starts again finds its own and changes it in place.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

from pyroute2 import IPRoute, NetlinkError

from datapath.drivers.ebpf.devices import kernel_errors
from datapath.errors import FeatureMissing, KernelError

HANDLE = 0x6D71 << 16  # of the qdisc; a class has its number in the lower half. lib/types.h: QOS_CLASS
OPEN_BYTES_S = 4_000_000_000  # rate of a class that holds nothing back: what 32 bits of bytes a second can say
_ROOT = 0xFFFFFFFF  # TC_H_ROOT
_QUANTUM = 60_000  # classes do not borrow; the kernel complains about what it would choose
_WITHOUT_RATE = ("noqueue", "pfifo_fast", "fq_codel", "fq", "pfifo", "bfifo", "sfq", "codel", "mq", "")

# linux/rtnetlink.h, linux/gen_stats.h
_RTM_GETTCLASS, _RTM_NEWTCLASS, _NLMSG_ERROR = 42, 40, 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_ECHO = 1, 4, 8
_TCA_KIND, _TCA_OPTIONS, _TCA_HTB_PARMS = 1, 2, 1
_TCA_STATS2, _TCA_STATS_QUEUE = 7, 3
_LINKLAYER_ETHERNET, _TICK_NS = 1, 64
_NLA_TYPE_MASK = 0x3FFF
_HEADER, _TC = struct.Struct("=IHHII"), struct.Struct("=BxxxiIII")
_ATTRIBUTE, _QUEUE = struct.Struct("=HH"), struct.Struct("=IIIII")
_RATE, _HTB = struct.Struct("=BBHhHI"), struct.Struct("=IIIII")  # struct tc_ratespec; struct tc_htb_opt has two


def root_of(ifindex: int) -> tuple[str, int]:
    """(kind, handle) of a device's root qdisc; ("", 0) when the device is gone."""
    with IPRoute() as route, kernel_errors("list qdiscs", errno.ENODEV):
        for one in route.get_qdiscs(index=ifindex):
            if one["parent"] == _ROOT and one["index"] == ifindex:
                return one.get_attr("TCA_KIND"), int(one["handle"])
    return "", 0


def foreign(ifindex: int) -> str:
    """Kind of a root qdisc that somebody else put on the device to limit it, "" if there is none."""
    kind, handle = root_of(ifindex)
    return "" if handle == HANDLE or kind in _WITHOUT_RATE else kind


def set_root(ifindex: int) -> None:
    """Our HTB at the root of a device; what is in no class goes by class 1. Raises FeatureMissing, KernelError."""
    if root_of(ifindex)[1] == HANDLE:
        return
    with IPRoute() as route, kernel_errors(f"put HTB on device {ifindex}"):
        try:
            route.tc("replace", "htb", ifindex, HANDLE, default=1)
        except NetlinkError as error:
            if error.code in (errno.ENOENT, errno.EOPNOTSUPP):
                raise FeatureMissing("no HTB", hint="load the sch_htb module (CONFIG_NET_SCH_HTB)") from None
            raise


def remove_root(ifindex: int) -> None:
    """Take our HTB off with all that waits in it; not there is no error."""
    if root_of(ifindex)[1] != HANDLE:
        return
    with IPRoute() as route, kernel_errors("take HTB off", errno.ENODEV, errno.ENOENT):
        route.tc("del", None, ifindex, HANDLE, parent=_ROOT)


def set_class(ifindex: int, number: int, bytes_s: int, burst: int, priority: int = 0) -> None:
    """Make or change a class: `burst` bytes at once, then `bytes_s`; of several the highest `priority` (0..7) first.

    A class that is changed keeps what waits in it and what it has left.
    """
    with IPRoute() as route, kernel_errors(f"set class {number} of device {ifindex}"):
        route.tc(
            "replace-class",
            "htb",
            ifindex,
            HANDLE | number,
            parent=HANDLE,
            rate=bytes_s,
            burst=burst,
            cburst=burst,
            quantum=_QUANTUM,
            prio=7 - priority,
        )


def change_class(ifindex: int, number: int, bytes_s: int, burst: int, priority: int = 0) -> None:
    """As set_class for a class that is there, in a tenth of a millisecond; gone is no error."""
    rate = _RATE.pack(0, _LINKLAYER_ETHERNET, 0, 0, 0, bytes_s)
    ticks = burst * 1_000_000_000 // bytes_s // _TICK_NS
    options = _attribute(_TCA_HTB_PARMS, rate + rate + _HTB.pack(ticks, ticks, _QUANTUM, 0, 7 - priority))
    body = _attribute(_TCA_KIND, b"htb\0") + _attribute(_TCA_OPTIONS, options)
    answer = _ask(_RTM_NEWTCLASS, _NLM_F_ACK, ifindex, number, body)
    failed = -struct.unpack_from("=i", answer, _HEADER.size)[0]
    if failed not in (0, errno.ENOENT, errno.ENODEV):
        raise KernelError(f"change class {number} of device {ifindex}", failed)


def remove_class(ifindex: int, number: int) -> None:
    """With what waits in it; not there is no error."""
    with IPRoute() as route, kernel_errors("remove a class", errno.ENODEV, errno.ENOENT):
        route.tc("del-class", None, ifindex, HANDLE | number, parent=HANDLE)


def waiting(ifindex: int, number: int) -> int:
    """Frames that wait in a class; 0 when it is not there. Asks for this class alone, in tens of microseconds."""
    answer = _ask(_RTM_GETTCLASS, _NLM_F_ECHO, ifindex, number)
    kind = _HEADER.unpack_from(answer)[1]
    if kind == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if number in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
            return 0
        raise KernelError("read a class of HTB", number)
    attributes = dict(_attributes(answer[_HEADER.size + _TC.size :]))
    queue = dict(_attributes(attributes.get(_TCA_STATS2, b""))).get(_TCA_STATS_QUEUE)
    return int(_QUEUE.unpack_from(queue)[0]) if queue else 0


def _ask(kind: int, flags: int, ifindex: int, number: int, body: bytes = b"") -> bytes:
    """The answer to a message about a class."""
    message = _TC.pack(0, ifindex, HANDLE | number, HANDLE, 0) + body
    head = _HEADER.pack(_HEADER.size + len(message), kind, _NLM_F_REQUEST | flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(5)
        sock.send(head + message)
        return sock.recv(1 << 16)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NLA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
