# SPDX-License-Identifier: GPL-2.0-only
"""Reads a BPF ring buffer through mmap, as kernel/bpf/ringbuf.c lays it out."""

from __future__ import annotations

import mmap
import struct

_BUSY, _DISCARDED = 1 << 31, 1 << 30


class Ring:
    """Records that arrive after it was made."""

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._size = size
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._data = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self.read()

    def close(self) -> None:
        self._consumer.close()
        self._data.close()

    def read(self) -> list[bytes]:
        records = []
        consumed = struct.unpack_from("=Q", self._consumer)[0]
        produced = struct.unpack_from("=Q", self._data)[0]
        while consumed < produced:
            start = mmap.PAGESIZE + consumed % self._size
            length = struct.unpack_from("=I", self._data, start)[0]
            if length & _BUSY:
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                records.append(self._data[start + 8 : start + 8 + size])
            consumed += (size + 8 + 7) // 8 * 8
        struct.pack_into("=Q", self._consumer, 0, consumed)
        return records
