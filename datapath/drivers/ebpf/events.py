"""Ring buffers of the switch, read by NumPy over mmap: many records at a time, by threads that sleep in between.

Layout (Documentation/bpf/ringbuf.rst): one page with the consumer's position, one with the producer's, then the data,
mapped twice in a row so that no record is cut. A record is an 8-byte header and a structure, all of one size.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import select
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import syscall
from datapath.drivers.ebpf.layout import EVENT

Events = NDArray[Any]

_log = logging.getLogger(__name__)

_BUSY = np.uint32(1 << 31)  # being written
_DISCARDED = np.uint32(1 << 30)
_AT_MOST = 65536  # records a read


class Ring:
    """The ring in this process's memory. One reader at a time."""

    def __init__(self, fd: int, layout: np.dtype[Any] = EVENT) -> None:
        """`fd` stays the caller's. Records are of `layout`, in multiples of 8 bytes."""
        self._record = np.dtype([("length", "<u4"), ("page", "<u4"), ("event", layout)])
        self._size = syscall.map_info(fd).max_entries
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(fd, page)
        self._producer = mmap.mmap(fd, page + 2 * self._size, prot=mmap.PROT_READ, offset=page)
        self._read_to = ctypes.c_uint64.from_buffer(self._consumer)
        self._written_to: NDArray[np.uint64] = np.frombuffer(self._producer, "<u8", 1)

    def written(self) -> int:
        """Where what is there now ends, in bytes since the ring was made."""
        return int(self._written_to[0])

    def read_to(self) -> int:
        """Up to where it has been read, likewise."""
        return self._read_to.value

    def read(self, at_most: int = _AT_MOST) -> Events:
        """Records that are there now, oldest first, as an array of the caller's own. Empty if there are none."""
        start, end = self._read_to.value, int(self._written_to[0])
        count = min((end - start) // self._record.itemsize, at_most)
        offset = mmap.PAGESIZE + (start & (self._size - 1))
        records = np.frombuffer(self._producer, self._record, count, offset)
        busy = np.flatnonzero(records["length"] & _BUSY)
        records = records[: busy[0]] if len(busy) else records
        events: Events = records["event"][(records["length"] & _DISCARDED) == 0].copy()
        # After the copy: programs may write there from now on. x86 keeps the order of these; elsewhere the call does.
        self._read_to.value = start + len(records) * self._record.itemsize
        return events


class Reader:
    """Calls `deliver` with each batch of events, from a thread of its own.

    `deliver` gets a structured array of struct event (layout.EVENT), never empty. What it raises is logged, and the
    next batch comes.
    """

    _LOOK_AGAIN_MS = 500  # should a wake-up be lost

    def __init__(self, fd: int, deliver: Callable[[Events], None]) -> None:
        """`fd`: of the ring, the caller's; open until `stop`."""
        self._ring = Ring(fd)
        self._fd = fd
        self._deliver = deliver
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when what was in the ring has been delivered."""
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        with select.epoll() as poll:
            poll.register(self._fd, select.EPOLLIN)
            poll.register(self._wake, select.EPOLLIN)
            while True:
                ready = poll.poll(self._LOOK_AGAIN_MS / 1000)
                while len(events := self._ring.read()):
                    self._hand_over(events)
                if any(fd == self._wake for fd, _ in ready):
                    return

    def _hand_over(self, events: Events) -> None:
        try:
            self._deliver(events)
        except Exception:
            _log.exception("%d events of the switch were not handled", len(events))
