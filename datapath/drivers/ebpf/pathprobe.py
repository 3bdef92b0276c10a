"""Does a frame of full size pass between two hosts? Asked before a migration counts on it.

The probe is a VXLAN packet as the tunnel device sends them (RFC 7348 with the group policy extension), made by hand so
that it can have any size, and treated underway as redirected frames are: cut to fragments over IPv4, and over IPv6
dropped where it is too large, for there the kernel cuts no packet of a tunnel (net/ipv6/ip6_output.c, ip6_fragment:
ignore_df). The far end's program hands it to its agent (EVENT_PROBE), which sends one of the same size back.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np

from datapath.drivers.ebpf.layout import CHANNEL, C
from datapath.drivers.ebpf.maps import Table as Map
from datapath.drivers.ebpf.records import address_bytes, address_text
from datapath.errors import NotReady

_VXLAN = struct.Struct("!BxHI")  # flags, group policy id, VNI << 8
_FLAGS = 0x88  # group policy and VNI are there
_ETHERNET = bytes.fromhex("02000000000102000000000288b5")  # two local MACs, IEEE 802 experimental type
_BODY = struct.Struct("!4sB3xQI")  # magic, 1 request / 2 reply, nonce, size of the frame
_MAGIC = b"mgrp"
_REQUEST, _REPLY = 1, 2
SIZE_MIN = len(_ETHERNET) + _BODY.size
SIZE_MAX = 65_000
_IP_MTU_DISCOVER, _IP_PMTUDISC_DONT = 10, 0  # linux/in.h
_IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_DO = 23, 2  # linux/in6.h


class PathProbe:
    """`channels`: the map. A program takes a probe only on a channel, and from the address that it is open for."""

    def __init__(self, own_address: str, port: int, channels: Map) -> None:
        self._own, self._port, self._channels = own_address, port, channels
        self._waiting: dict[int, threading.Event] = {}
        self._lock = threading.Lock()
        self._tidy()

    def _tidy(self) -> None:
        """Answers that an earlier run waited for when it died come to nobody."""
        keys, records = self._channels.read()
        self._channels.delete_many(keys[records["slot"] == 0])

    def ask(self, channel: int, address: str, size: int, timeout_s: float) -> bool:
        """True when a frame of `size` bytes went to `address` and one as large came back in time. Raises NotReady."""
        if not self._own:
            raise NotReady("this host has no underlay address", hint="set `underlay` in the driver's options")
        if not SIZE_MIN <= size <= SIZE_MAX:
            raise NotReady(f"a probe of {size} bytes is not in {SIZE_MIN}..{SIZE_MAX}")
        nonce, answered = secrets.randbits(64), threading.Event()
        with self._lock:
            self._waiting[nonce] = answered
        try:
            with self._open_for_answer(channel, address):
                self._send(_REQUEST, channel, nonce, address, size)
                return answered.wait(timeout_s)
        finally:
            with self._lock:
                del self._waiting[nonce]

    @contextlib.contextmanager
    def _open_for_answer(self, channel: int, address: str) -> Iterator[None]:
        """Let the answer in: a channel of slot 0, which is no port, so that nothing else passes by it."""
        there = self._channels.get(channel) is not None
        if not there:
            record = np.zeros((), CHANNEL)
            record["from"] = np.frombuffer(address_bytes(address), ">u4")
            self._channels.set(channel, record)
        try:
            yield
        finally:
            if not there:
                self._channels.delete(channel)

    def received(self, frame: bytes, length: int, channel: int) -> None:
        """A probe came out of the tunnel on `channel`: `frame` its first bytes, `length` of the whole."""
        if len(frame) < SIZE_MIN or frame[: len(_ETHERNET)] != _ETHERNET:
            return
        magic, what, nonce, size = _BODY.unpack_from(frame, len(_ETHERNET))
        if magic != _MAGIC or length != size:
            return
        if what == _REPLY:
            with self._lock:
                waiting = self._waiting.get(nonce)
            if waiting is not None:
                waiting.set()
        elif what == _REQUEST:
            opened = self._channels.get(channel)
            if opened is not None:
                self._send(_REPLY, channel, nonce, address_text(opened["from"].tobytes()), size)

    def _send(self, what: int, channel: int, nonce: int, address: str, size: int) -> None:
        """What cannot be sent (too large, no route) is as one that is lost: no answer comes."""
        body = _BODY.pack(_MAGIC, what, nonce, size)
        frame = (_ETHERNET + body).ljust(size, b"\0")
        packet = _VXLAN.pack(_FLAGS, C.MARK_PROBE, (channel & 0xFFFFFF) << 8) + frame
        v6 = ipaddress.ip_address(address).version == 6
        with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as sender:
            if v6:
                sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_DO)
            else:
                sender.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
            with contextlib.suppress(OSError):
                sender.bind((self._own, 0))
                sender.sendto(packet, (address, self._port))
