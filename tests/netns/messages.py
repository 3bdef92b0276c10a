# SPDX-License-Identifier: GPL-2.0-only
"""Many datagrams in one call of the kernel: sendmmsg(2), which Python does not have."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)


class _Part(ctypes.Structure):  # struct iovec
    _fields_ = (("base", ctypes.c_char_p), ("size", ctypes.c_size_t))


class _Message(ctypes.Structure):  # struct mmsghdr of 64-bit machines, what is padded as wide as it lies there
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_size", ctypes.c_uint64),
        ("parts", ctypes.POINTER(_Part)),
        ("part_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_uint64),
        ("sent", ctypes.c_uint),
    )


def send(out: socket.socket, datagrams: Sequence[bytes]) -> int:
    """By a connected socket that blocks, without the interpreter's lock. How many were sent (at most 1024 a call)."""
    parts = [_Part(datagram, len(datagram)) for datagram in datagrams]
    messages = (_Message * len(parts))(*(_Message(parts=ctypes.pointer(part), part_count=1) for part in parts))
    sent = int(_libc.sendmmsg(out.fileno(), messages, len(parts), 0))
    if sent < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sent
