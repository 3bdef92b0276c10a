"""Taps: the ioctls of linux/if_tun.h, frames with their virtio_net_hdr, and frames put into a device past its programs.

A *frame with vnet header* is a 10-byte struct virtio_net_hdr (linux/virtio_net.h, this machine's byte order) and the
Ethernet frame: checksum and segmentation offloads in it pass unchanged. Whatever size of header a tap uses (QEMU: 12),
what is read and written here has 10.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

from datapath.errors import FeatureMissing, KernelError

VNET_HEADER = 10
FRAME_MAX = VNET_HEADER + 2 + 65536 + 18  # header, what a device's own header may have more, GSO frame, link layer
NAME_MAX = 15

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

_PATH = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_TUNGETVNETHDRSZ = 0x800454D7
_TUNGETDEVNETNS = 0x54E3
_REQUEST = struct.Struct("=16sH22x")  # struct ifreq with ifr_flags
_OFFLOADS = (0x6F, 0x0F)  # checksum, TSO4, TSO6, ECN; and UDP segmentation (Linux 6.2)

_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_QDISC_BYPASS = 20


def open_tap(name: str, *, persist: bool = False) -> int:
    """Make a tap with vnet headers, or open one that nobody holds. Returns a descriptor that does not block.

    One that persists is root's: without an owner anybody who may open /dev/net/tun could take it while nobody holds it.
    Raises FeatureMissing (no /dev/net/tun), KernelError (EBUSY: somebody holds it; EINVAL: another sort of device).
    """
    try:
        fd = os.open(_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FeatureMissing(f"{_PATH}: {error.strerror}", hint="load the tun module and run as root") from None
    try:
        _ioctl(fd, _TUNSETIFF, _REQUEST.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR), f"open tap {name}")
        if persist:
            _control(fd, _TUNSETOWNER, 0, f"give tap {name} to root")
            _control(fd, _TUNSETPERSIST, 1, f"keep tap {name}")
        take_offloads(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def release_tap(fd: int) -> None:
    """A persistent tap goes when its last descriptor is closed."""
    _control(fd, _TUNSETPERSIST, 0, "release tap")


def take_offloads(fd: int) -> None:
    """Let the kernel put frames in that are not segmented or summed yet: they come out with what is left to do."""
    for offloads in _OFFLOADS:
        try:
            _control(fd, _TUNSETOFFLOAD, offloads, "offloads of a tap")
            return
        except KernelError as error:
            if error.errno != errno.EINVAL or offloads == _OFFLOADS[-1]:
                raise


def interface(fd: int) -> tuple[str, int]:
    """Name and flags of the tap behind a descriptor. Raises KernelError EBADFD when there is none."""
    name, flags = _REQUEST.unpack(_ioctl(fd, _TUNGETIFF, bytes(_REQUEST.size), "name of a tap"))
    return name.rstrip(b"\0").decode(), flags


def header_size(fd: int) -> int:
    """Bytes of vnet header that frames of this descriptor carry; 0 without."""
    if not interface(fd)[1] & IFF_VNET_HDR:
        return 0
    return int(struct.unpack("=i", _ioctl(fd, _TUNGETVNETHDRSZ, bytes(4), "vnet header of a tap"))[0])


def namespace(fd: int) -> int:
    """Inode of the network namespace that the tap is in (not that of its holder). Linux 5.12."""
    try:
        found = fcntl.ioctl(fd, _TUNGETDEVNETNS, 0)
    except OSError as error:
        raise KernelError("namespace of a tap", error.errno or errno.EIO) from None
    try:
        return os.fstat(found).st_ino
    finally:
        os.close(found)


def readable(fd: int, timeout_ms: int = 0) -> bool:
    """Is there a frame to read, within that time?"""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_ms))


def read_frames(fd: int, header: int) -> Iterator[bytes]:
    """Frames that wait now, with a header of VNET_HEADER bytes; `header` is what the descriptor has. Never blocks."""
    room = bytearray(FRAME_MAX)
    while True:
        try:
            size = os.preadv(fd, [room], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return
        yield (
            bytes(room[:VNET_HEADER].ljust(VNET_HEADER, b"\0") + room[header:size])
            if header
            else (bytes(VNET_HEADER) + bytes(room[:size]))
        )


def inject(ifindex: int, frames: Sequence[bytes]) -> int:
    """Put frames with vnet header into a device's queue past queueing disciplines and egress programs.

    In order; ends at the first that the device has no room for. Returns how many were taken. Raises KernelError.
    """
    if not frames:
        return 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sender:
        sender.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sender.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        try:
            sender.bind((socket.if_indextoname(ifindex), 0))
        except OSError as error:
            raise KernelError(f"inject into device {ifindex}", error.errno or errno.ENODEV) from None
        return send_all(sender.send, frames, f"inject into device {ifindex}")


def send_all(send: object, frames: Iterable[bytes], what: str) -> int:
    """Call `send` for each until the receiver is full (ENOBUFS, EAGAIN). Returns how many it took."""
    assert callable(send)
    taken = 0
    for frame in frames:
        try:
            send(frame)
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.EAGAIN):
                break
            raise KernelError(f"{what}: frame {taken} of {len(frame)} bytes", error.errno or errno.EIO) from None
        taken += 1
    return taken


def _ioctl(fd: int, request: int, argument: bytes, what: str) -> bytes:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise KernelError(what, error.errno or errno.EIO) from None


def _control(fd: int, request: int, argument: int, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise KernelError(what, error.errno or errno.EIO) from None
