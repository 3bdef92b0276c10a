"""Typed handles of BPF maps: keys and values are NumPy records, many at a time in batches.

    Table   one map with its key and value dtype: get, set, dump, load, take
    Outer   a map of maps: inner tables by index, made like its template
    Mapped  an mmapable array as a structured view, with 8-byte fields stored whole

A handle owns its descriptor; `close` or the garbage collector gives it back.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from datapath.drivers.ebpf import syscall
from datapath.drivers.ebpf.uapi import F_NO_PREALLOC, Command, MapType, Update
from datapath.errors import KernelError

Records = NDArray[Any]
U32 = np.dtype("<u4")
U64 = np.dtype("<u8")

BATCH = 16384
_FULL = (errno.E2BIG, errno.ENOMEM)
_GIVE_UP = 64  # refusals of a full table in a row after which the rest is not tried
_PERCPU = (MapType.PERCPU_ARRAY, MapType.PERCPU_HASH)


@cache
def possible_cpus() -> int:
    """CPUs that a per-CPU map has room for."""
    ranges = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")
    return max(int(part.split("-")[-1]) for part in ranges) + 1


@dataclass(frozen=True)
class Template:
    """How an inner map is made: as the object declares it. `entries` may differ for a hash.

    `types` are those of the outer map's own template: Linux 6.1 takes no inner map without (EINVAL), later ones do.
    """

    type: int
    key: np.dtype[Any]
    value: np.dtype[Any]
    entries: int
    flags: int
    types: syscall.MapTypes | None = None


@dataclass(frozen=True)
class Refused:
    """One element of a batch that the kernel did not take. `index` counts in what was given."""

    index: int
    errno: int


@dataclass(frozen=True)
class Batch:
    """What a load or a bulk delete did: `refused` names each element that was not taken."""

    done: int
    refused: list[Refused] = field(default_factory=list)


class Handle:
    """Owner of a descriptor."""

    fd: int = -1

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Table(Handle):
    """A map with fixed key and value layouts. Values of a per-CPU map have one more axis: (entries, CPUs).

    Keys go in as anything that NumPy makes a record of: an int, a tuple, a record of `key`.
    """

    def __init__(self, fd: int, key: DTypeLike, value: DTypeLike, name: str = "") -> None:
        """Take over `fd`. Raises KernelError EINVAL when the sizes are not the map's."""
        self.fd = fd
        self.info = syscall.map_info(fd)
        self.name = name or self.info.name
        self.key: np.dtype[Any] = np.dtype(key)
        self.value: np.dtype[Any] = np.dtype(value)
        self.percpu = self.info.type in _PERCPU
        self._check_sizes()
        self._slots = (possible_cpus(),) if self.percpu else ()
        self._stored = _padded(self.value) if self.percpu else self.value

    def _check_sizes(self) -> None:
        there = (self.info.key_size, self.info.value_size)
        asked = (self.key.itemsize, self.value.itemsize)
        if there != asked:
            self.close()
            raise KernelError(
                f"map {self.name}: key and value of {asked} bytes asked, the kernel's have {there}",
                errno.EINVAL,
                hint="the pinned map is of another version of the switch",
            )

    @classmethod
    def make(
        cls,
        key: DTypeLike,
        value: DTypeLike,
        entries: int,
        *,
        flags: int = F_NO_PREALLOC,
        type_: int = MapType.HASH,
        types: syscall.MapTypes | None = None,
    ) -> Self:
        """A new, unpinned map."""
        sizes = np.dtype(key).itemsize, np.dtype(value).itemsize
        return cls(syscall.map_create(type_, *sizes, entries, flags=flags, types=types), key, value)

    @classmethod
    def open(cls, path: Path, key: DTypeLike, value: DTypeLike) -> Self:
        """A pinned map."""
        return cls(syscall.obj_get(path), key, value, path.name)

    @property
    def entries(self) -> int:
        """Room, not use."""
        return self.info.max_entries

    # ---- one ----

    def get(self, key: Any) -> Any | None:
        """The value as a record of its own, an array (CPUs,) for a per-CPU map; None: no such key."""
        record, value = self._key(key), np.zeros(self._slots or 1, self._stored)
        if not syscall.map_lookup(self.fd, _address(record), _address(value), self.name):
            return None
        return value if self.percpu else value[0]

    def set(self, key: Any, value: Any, flags: int = Update.ANY) -> None:
        """Write one element. Raises KernelError: EEXIST or ENOENT (by flags), E2BIG (full)."""
        record, stored = self._key(key), np.zeros(self._slots or 1, self._stored)
        stored[...] = value
        syscall.map_update(self.fd, _address(record), _address(stored), flags, self.name)

    def delete(self, key: Any) -> bool:
        """False: it was not there."""
        record = self._key(key)
        return syscall.map_delete(self.fd, _address(record), self.name)

    def __contains__(self, key: Any) -> bool:
        return self.get(key) is not None

    def _key(self, key: Any) -> Records:
        record = np.zeros(1, self.key)
        record[0] = key
        return record

    # ---- many ----

    def dump(self, batch: int = BATCH) -> Iterator[tuple[Records, Records]]:
        """All elements in batches. What lives throughout comes exactly once, however the map changes meanwhile.

        The arrays are the caller's own.
        """
        return self._walk(Command.MAP_LOOKUP_BATCH, batch)

    def take(self, batch: int = BATCH) -> Iterator[tuple[Records, Records]]:
        """All elements in batches, each deleted as it is read."""
        return self._walk(Command.MAP_LOOKUP_AND_DELETE_BATCH, batch)

    def read(self) -> tuple[Records, Records]:
        """All elements in two arrays."""
        return self._join(self.dump())

    def take_all(self) -> tuple[Records, Records]:
        """All elements in two arrays, deleted."""
        return self._join(self.take())

    def keys(self) -> Records:
        return self.read()[0]

    def load(self, keys: Records, values: Records) -> Batch:
        """Write many. Goes on past elements that are refused; a table that stays full ends it (the rest is refused)."""
        values = np.ascontiguousarray(values, self._stored)
        return self._apply(Command.MAP_UPDATE_BATCH, np.ascontiguousarray(keys, self.key), values)

    def delete_many(self, keys: Records) -> int:
        """Delete many; what is not there is fine. Returns how many were."""
        done = self._apply(Command.MAP_DELETE_BATCH, np.ascontiguousarray(keys, self.key), None)
        hard = [one for one in done.refused if one.errno != errno.ENOENT]
        if hard:
            raise KernelError(f"delete element {hard[0].index} of {len(keys)} in map {self.name}", hard[0].errno)
        return done.done

    def _walk(self, command: Command, batch: int) -> Iterator[tuple[Records, Records]]:
        position = np.zeros(max(self.key.itemsize, 8), np.uint8)
        start = 0
        while True:
            keys = np.empty(batch, self.key)
            values = np.empty((batch, *self._slots), self._stored)
            count, error = syscall.map_batch(
                command, self.fd, _address(keys), _address(values), batch, start=start, end=_address(position)
            )
            if error == errno.ENOSPC:  # one bucket holds more than the batch
                batch *= 2
                continue
            if error not in (0, errno.ENOENT):
                raise KernelError(f"{command.name} of map {self.name}", error)
            if count:
                yield keys[:count], values[:count]
            if error:
                return
            start = _address(position)

    def _join(self, parts: Iterator[tuple[Records, Records]]) -> tuple[Records, Records]:
        found = list(parts)
        if not found:
            return np.empty(0, self.key), np.empty((0, *self._slots), self._stored)
        # dtype given: else fields in network order would come out in the machine's
        keys = np.concatenate([keys for keys, _ in found], dtype=self.key)
        return keys, np.concatenate([values for _, values in found], dtype=self._stored)

    def _apply(self, command: Command, keys: Records, values: Records | None) -> Batch:
        step = 0 if values is None else values.dtype.itemsize * int(np.prod(self._slots, dtype=int))
        total, at, row = len(keys), 0, 0
        refused: list[Refused] = []
        while at < total:
            value = 0 if values is None else _address(values) + at * step
            key = _address(keys) + at * self.key.itemsize
            count, error = syscall.map_batch(command, self.fd, key, value, total - at)
            at += count
            if not error:
                break
            if error in syscall.NOT_BEGUN:
                raise KernelError(f"{command.name} of {total} in map {self.name}", error)
            refused.append(Refused(at, error))
            row = row + 1 if count == 0 and error in _FULL else 0
            at += 1
            if row >= _GIVE_UP:
                refused += [Refused(index, error) for index in range(at, total)]
                break
        return Batch(total - len(refused), refused)


class Outer(Table):
    """A map of maps by u32: slot or generation -> inner table.

    Each write waits for RCU (10 ms and more): never between a pause and the commit.
    """

    def __init__(self, fd: int, template: Template, name: str = "") -> None:
        super().__init__(fd, U32, U32, name)
        self.template = template

    def new(self, entries: int | None = None) -> Table:
        """An inner table that is in no map yet: fill it, then `put` it."""
        made = self.template
        return Table.make(
            made.key, made.value, entries or made.entries, flags=made.flags, type_=made.type, types=made.types
        )

    def put(self, index: int, table: Table) -> None:
        self.set(index, table.fd)

    def inner(self, index: int) -> Table | None:
        """The table at an index, opened by its id; the caller closes it."""
        for _ in range(16):
            found = self.get(index)
            if found is None:
                return None
            try:
                return Table(syscall.map_by_id(int(found)), self.template.key, self.template.value)
            except KernelError as error:
                if error.errno != errno.ENOENT:  # replaced since: look again
                    raise
        return None

    def remove(self, index: int) -> bool:
        return self.delete(index)


class Mapped(Handle):
    """An array map (BPF_F_MMAPABLE) in this process's memory.

    `view` is the structured array (entries,): fields read and written there are the map's own. Words that programs race
    with are stored by `store`, in one 8-byte instruction; NumPy does not promise that.
    """

    def __init__(self, fd: int, value: DTypeLike, name: str = "") -> None:
        self.fd = fd
        info = syscall.map_info(fd)
        self.name = name or info.name
        self.value: np.dtype[Any] = np.dtype(value)
        self._stride = (info.value_size + 7) & ~7
        if self.value.itemsize != self._stride or info.value_size != self._stride:
            raise KernelError(f"map {self.name}: values of {info.value_size} bytes, not {value}", errno.EINVAL)
        pages = -(-info.max_entries * self._stride // mmap.PAGESIZE)
        self._memory = mmap.mmap(fd, pages * mmap.PAGESIZE)
        self.view: Records = np.frombuffer(self._memory, self.value, info.max_entries)

    def load(self, index: int, name: str) -> int:
        """An unsigned 8-byte field, read at once."""
        return self._word(index, name).value

    def store(self, index: int, name: str, value: int) -> None:
        """Write an 8-byte field by one aligned store: ctypes copies a c_uint64 as one, and the map starts on a page."""
        self._word(index, name).value = value

    def _word(self, index: int, name: str) -> ctypes.c_uint64:
        kind, offset = self.value.fields[name][:2] if self.value.fields else (self.value, 0)
        if kind.itemsize != 8 or offset % 8 or not 0 <= index < len(self.view):
            raise KernelError(f"map {self.name}[{index}].{name} is no 8-byte word", errno.EINVAL)
        return ctypes.c_uint64.from_buffer(self._memory, index * self._stride + offset)

    def close(self) -> None:
        """Give the descriptor back; the memory goes when nobody has a view of it any more."""
        super().close()


def _address(array: Records) -> int:
    return int(array.ctypes.data)


def _padded(value: np.dtype[Any]) -> np.dtype[Any]:
    """Layout of one CPU's copy: the kernel rounds values up to 8 bytes."""
    size = (value.itemsize + 7) & ~7
    if size == value.itemsize:
        return value
    if value.names is None:
        return np.dtype({"names": ["value"], "formats": [value], "offsets": [0], "itemsize": size})
    formats = [value.fields[name][0] for name in value.names] if value.fields else []
    offsets = [value.fields[name][1] for name in value.names] if value.fields else []
    return np.dtype({"names": list(value.names), "formats": formats, "offsets": offsets, "itemsize": size})
