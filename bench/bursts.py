# SPDX-License-Identifier: GPL-2.0-only
"""Many frames at once out of a namespace, by sendmmsg(2) on a packet socket, and what they cost.

Each frame goes through the switch and to the other end in the sender's own call (softirqs run at its end), so the CPU
time of the sending thread is the whole path's, whoever else wants the processor.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.figures import Unverified
from bench.switches import Switch
from tests.bpf import frames
from tests.netns.driver_lab import Place

BATCH = 64  # frames of one system call
DEADLINE_S = 10.0
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
FRAME = 60  # bytes without the checksum that hardware adds: "64 byte frames"
PORTS_AT = 34  # behind Ethernet and IPv4
POINTER, LENGTH = 2, 3  # of the eight words of a struct mmsghdr: msg_iov, msg_iovlen

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)


class Messages:
    """Frames of FRAME bytes, (n, FRAME), in the form in which sendmmsg takes them."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.length = len(content)
        self._content = np.ascontiguousarray(content)
        at = np.arange(self.length, dtype=np.uint64)
        self._parts = np.empty((self.length, 2), np.uint64)
        self._parts[:, 0] = self._content.ctypes.data + at * FRAME
        self._parts[:, 1] = FRAME
        self._headers = np.zeros((self.length, 8), np.uint64)
        self._headers[:, POINTER] = self._parts.ctypes.data + at * 16
        self._headers[:, LENGTH] = 1

    def send(self, handle: int, first: int, count: int) -> None:
        while count:
            sent = _libc.sendmmsg(handle, self._headers[first:].ctypes.data, count, 0)
            if sent < 0:
                raise OSError(ctypes.get_errno(), "sendmmsg")
            first, count = first + sent, count - sent


def datagrams(
    macs: tuple[str, str], ips: tuple[str, str], sources: NDArray[np.uint16], targets: NDArray[np.uint16]
) -> Messages:
    """UDP datagrams between these ports, from the first address to the second."""
    body = frames.ipv4(*ips, frames.UDP, frames.udp(0, 0, bytes(FRAME - 42)))
    one = np.frombuffer(frames.ethernet(macs[1], macs[0], frames.IPV4, body), np.uint8)
    content = np.tile(one, (len(sources), 1))
    content[:, PORTS_AT : PORTS_AT + 4] = np.stack([sources, targets], 1).astype(">u2").view(np.uint8)
    return Messages(content)


class Received:
    """What `eth0` of a place has received so far."""

    def __init__(self, place: Place) -> None:
        self._file = place.run(lambda: os.open("/proc/thread-self/net/dev", os.O_RDONLY))

    def count(self) -> int:
        return self._counters()[1]

    def bytes(self) -> int:
        return self._counters()[0]

    def _counters(self) -> list[int]:
        for line in os.pread(self._file, 4096, 0).decode().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == "eth0":
                return [int(number) for number in numbers.split()]
        raise LookupError("eth0")

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True)
class Burst:
    frames: int
    cpu_ns: int
    wall_ns: int

    @property
    def cpu_ns_a_frame(self) -> float:
        return self.cpu_ns / self.frames

    @property
    def frames_a_s(self) -> float:
        return self.frames * 1e9 / self.wall_ns


class Sender:
    """Sends from `eth0` of one place to the other through a switch."""

    def __init__(self, switch: Switch, sender: Place, receiver: Place) -> None:
        self._switch, self._place = switch, sender
        self._received = Received(receiver)
        self._socket = sender.run(_opened)

    def burst(self, messages: Messages, deadline_s: float = DEADLINE_S) -> Burst:
        """All of them. Unverified unless every one has arrived, and in time."""
        return self._place.run(lambda: self._burst(messages, deadline_s))

    def _burst(self, messages: Messages, deadline_s: float) -> Burst:
        begin, cpu_ns = self._received.count(), 0
        others, wall = self._switch.cpu_ns(), time.monotonic_ns()
        for first in range(0, messages.length, BATCH):
            count = min(BATCH, messages.length - first)
            before = time.thread_time_ns()
            messages.send(self._socket.fileno(), first, count)
            cpu_ns += time.thread_time_ns() - before
            if self._switch.window:
                self._wait_for(begin + first + count - self._switch.window, deadline_s)
        sent = messages.length
        if self._switch.window:
            self._wait_for(begin + sent, deadline_s)
        taken = Burst(sent, cpu_ns + self._switch.cpu_ns() - others, time.monotonic_ns() - wall)
        arrived = self._received.count() - begin
        if arrived != sent:
            raise Unverified(f"{self._switch.name}: {arrived} of {sent} frames had arrived when they were sent")
        return taken

    def _wait_for(self, count: int, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while (now := self._received.count()) < count:
            if time.monotonic() > deadline:
                raise Unverified(f"{self._switch.name}: {count - now} frames did not arrive")
            time.sleep(0)

    def close(self) -> None:
        self._socket.close()
        self._received.close()


def _opened() -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.bind(("eth0", 0))
    made.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    return made
