# SPDX-License-Identifier: GPL-2.0-only
"""The few commands of bpf(2) that tests need, through ctypes. Numbers from linux/bpf.h, enum bpf_cmd."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_SYS_BPF = 321
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 0, 1, 2, 3, 4
_PROG_TEST_RUN, _OBJ_INFO, _BTF_GET_FD_BY_ID, _MAP_UPDATE_BATCH, _MAP_DELETE_BATCH, _LINK_CREATE = (
    10,
    15,
    19,
    26,
    27,
    28,
)
HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LPM_TRIE, ARRAY_OF_MAPS, HASH_OF_MAPS = 1, 2, 5, 6, 11, 12, 13
TCX_INGRESS, TCX_EGRESS = 46, 47

_libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """Returns the call's result and the attributes as the kernel left them. Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    result = _libc.syscall(_SYS_BPF, command, buffer, 128)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"bpf command {command}")
    return result, buffer.raw


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(bytes(data), max(len(data), 1))


FILL_KEYS = 4_096
FILL_S = 20.0


@dataclass(frozen=True)
class Map:
    """A map by descriptor. Keys and values are bytes; per-CPU values are all CPUs' one after the other."""

    name: str
    fd: int
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int

    @classmethod
    def from_fd(cls, name: str, fd: int) -> Map:
        kind, _, key_size, value_size, max_entries, flags = struct.unpack_from("=6I", _map_info(fd))
        return cls(name, fd, kind, key_size, value_size, max_entries, flags)

    def _element(self, command: int, key: bytes, value: object, flags: int = 0) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"{self.name}: key of {len(key)} bytes, not {self.key_size}")
        key_buffer = _buffer(key)
        address = ctypes.addressof(value) if value is not None else 0  # type: ignore[arg-type]
        bpf(command, struct.pack("=IIQQQ", self.fd, 0, ctypes.addressof(key_buffer), address, flags))

    def lookup(self, key: bytes) -> bytes | None:
        value = ctypes.create_string_buffer(self._stored_size())
        try:
            self._element(_MAP_LOOKUP, key, value)
        except FileNotFoundError:
            return None
        return value.raw

    def _stored_size(self) -> int:
        if self.kind not in (PERCPU_HASH, PERCPU_ARRAY):
            return self.value_size
        return (self.value_size + 7) // 8 * 8 * _possible_cpus()

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        self._element(_MAP_UPDATE, key, _buffer(value), flags)

    def delete(self, key: bytes) -> None:
        self._element(_MAP_DELETE, key, None)

    def keys(self) -> list[bytes]:
        """Every key; the map must not change meanwhile."""
        found: list[bytes] = []
        following = ctypes.create_string_buffer(self.key_size)
        while True:
            current = _buffer(found[-1]) if found else None
            address = ctypes.addressof(current) if current is not None else 0
            try:
                bpf(_MAP_NEXT_KEY, struct.pack("=IIQQ", self.fd, 0, address, ctypes.addressof(following)))
            except FileNotFoundError:
                return found
            found.append(following.raw)

    def items(self) -> list[tuple[bytes, bytes]]:
        return [(key, value) for key in self.keys() if (value := self.lookup(key)) is not None]

    def clear(self) -> None:
        """Delete every entry of a hash, zero every element of an array."""
        if self.kind not in (ARRAY, PERCPU_ARRAY):
            for key in self.keys():
                self.delete(key)
            return
        keys = _buffer(struct.pack(f"={self.max_entries}I", *range(self.max_entries)))
        zeroes = ctypes.create_string_buffer(self._stored_size() * self.max_entries)
        addresses = (ctypes.addressof(keys), ctypes.addressof(zeroes))
        bpf(_MAP_UPDATE_BATCH, struct.pack("=QQQQIIQQ", 0, 0, *addresses, self.max_entries, self.fd, 0, 0))

    def fill(self, keys: list[bytes]) -> None:
        """Zeroes at all these keys. Memory of one value for each CPU comes a little at a time: kernel's percpu pool."""
        deadline = time.monotonic() + FILL_S
        for start in range(0, len(keys), FILL_KEYS):
            while not self._filled(keys[start : start + FILL_KEYS]):
                assert time.monotonic() < deadline, f"no memory for {len(keys)} elements"

    def _filled(self, keys: list[bytes]) -> bool:
        try:
            self._batch(_MAP_UPDATE_BATCH, keys)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            return False
        return True

    def empty(self, keys: list[bytes]) -> None:
        """Take these keys out, in one call."""
        self._batch(_MAP_DELETE_BATCH, keys)

    def _batch(self, command: int, keys: list[bytes]) -> None:
        raw, zeroes = _buffer(b"".join(keys)), ctypes.create_string_buffer(self._stored_size() * len(keys))
        values = ctypes.addressof(zeroes) if command == _MAP_UPDATE_BATCH else 0
        bpf(command, struct.pack("=QQQQIIQQ", 0, 0, ctypes.addressof(raw), values, len(keys), self.fd, 0, 0))

    def like(self, name: str, max_entries: int = 0) -> Map:
        """A new map with this one's attributes and types, to be put into a map of maps. The caller closes it."""
        size = max_entries or self.max_entries
        attributes = struct.pack("=6I", self.kind, self.key_size, self.value_size, size, self.flags, 0)
        btf_id, *types = struct.unpack_from("=3I", _map_info(self.fd), 64)
        types_fd = bpf(_BTF_GET_FD_BY_ID, struct.pack("=I", btf_id))[0]
        try:
            made, _ = bpf(_MAP_CREATE, attributes + struct.pack("=24x3I", types_fd, *types))
        finally:
            os.close(types_fd)
        return Map.from_fd(name, made)


def _map_info(fd: int) -> bytes:
    """struct bpf_map_info."""
    info = ctypes.create_string_buffer(88)
    bpf(_OBJ_INFO, struct.pack("=IIQ", fd, 88, ctypes.addressof(info)))
    return info.raw


@functools.cache
def _possible_cpus() -> int:
    return int(Path("/sys/devices/system/cpu/possible").read_text().strip().split("-")[-1]) + 1


@dataclass(frozen=True)
class Run:
    """What BPF_PROG_RUN returned: verdict, the frame as the program left it, the context, ns for one repeat."""

    verdict: int
    frame: bytes
    context: bytes
    duration_ns: int


def prog_run(fd: int, frame: bytes = b"", context: bytes = b"", repeat: int = 0) -> Run:
    """BPF_PROG_RUN with data, context or both. Raises OSError."""
    source, sink = _buffer(frame), ctypes.create_string_buffer(len(frame) + 256)
    before, after = _buffer(context), ctypes.create_string_buffer(max(len(context), 1))
    sink_size = len(sink) if frame else 0
    after_address = ctypes.addressof(after) if frame and context else 0
    attributes = struct.pack(
        "=IIIIQQIIIIQQIII",
        fd,
        0,
        len(frame),
        sink_size,
        ctypes.addressof(source) if frame else 0,
        ctypes.addressof(sink) if frame else 0,
        repeat,
        0,
        len(context),
        len(context) if after_address else 0,
        ctypes.addressof(before) if context else 0,
        after_address,
        0,
        0,
        0,
    )
    result = bpf(_PROG_TEST_RUN, attributes)[1]
    verdict, _, left = struct.unpack_from("=III", result, 4)
    duration = struct.unpack_from("=I", result, 36)[0]
    # a SYSCALL program writes to the context in place, a packet program to the second buffer
    context_out = after.raw if after_address else before.raw[: len(context)]
    return Run(verdict, sink.raw[:left] if frame else b"", context_out, duration)


def tcx_attach(fd: int, ifindex: int, hook: int) -> int:
    """Attach a program to a device of the caller's network namespace. Returns the link: closing it detaches."""
    return bpf(_LINK_CREATE, struct.pack("=IIII", fd, ifindex, hook, 0))[0]


def map_keys_u32(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)
