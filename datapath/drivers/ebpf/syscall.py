"""bpf(2) through ctypes: one function a command, errno as KernelError.

Keys, values and contexts are addresses of memory that the caller owns (`array.ctypes.data`): nothing is copied here.
The GIL is released while the kernel works. Layouts and numbers: /usr/include/linux/bpf.h (union bpf_attr).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from datapath.drivers.ebpf.uapi import (
    NAME_LENGTH,
    AttachType,
    Attr,
    BatchAttr,
    BtfInfoRaw,
    BtfLoadAttr,
    ByIdAttr,
    Command,
    ElementAttr,
    InfoAttr,
    LinkCreateAttr,
    LinkDetachAttr,
    LinkInfoRaw,
    LinkUpdateAttr,
    MapCreateAttr,
    MapInfoRaw,
    MapType,
    ObjectAttr,
    ProgInfoRaw,
    ProgLoadAttr,
    QueryAttr,
    RunAttr,
    Update,
)
from datapath.errors import KernelError

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}


@dataclass(frozen=True)
class MapInfo:
    """What the kernel says of a map. `btf_*` are 0 when it was made without BTF."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str
    btf_id: int
    btf_key_type_id: int
    btf_value_type_id: int


@dataclass(frozen=True)
class ProgInfo:
    type: int
    id: int
    name: str
    jited: bool
    btf_id: int  # of the object's types; 0 none


@dataclass(frozen=True)
class LinkInfo:
    """A tcx link. `ifindex` 0: its device is gone."""

    type: int
    id: int
    prog_id: int
    ifindex: int
    attach_type: int


@dataclass(frozen=True)
class Run:
    """Result of PROG_RUN. `duration_ns` is the mean of the repeats."""

    retval: int
    duration_ns: int
    data: bytes


_HINTS = {
    errno.EPERM: "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
    errno.ENOSYS: "this kernel has no bpf(2)",
    errno.ENOMEM: "raise the memory limit of the unit or cgroup, or use smaller tables",
}

_ENOTSUPP = 524  # the kernel's own, not in errno.h
NOT_BEGUN = (errno.EFAULT, errno.EPERM, errno.EBADF, errno.EINVAL, _ENOTSUPP)  # of a batch: `count` was not written


def _syscall_number() -> int:
    machine = platform.machine()
    if machine not in _NUMBERS:
        raise KernelError(f"bpf(2) on {machine}", errno.ENOSYS, hint=f"supported: {', '.join(_NUMBERS)}")
    return _NUMBERS[machine]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t)


def _bpf(command: Command, attr: Attr) -> tuple[int, int]:
    """(result, 0), or (-1, errno). Begun again when a signal came in between."""
    while True:
        result = _libc.syscall(_syscall_number(), command, ctypes.addressof(attr), ctypes.sizeof(attr))
        error = ctypes.get_errno() if result < 0 else 0
        if error != errno.EINTR:
            return int(result), error


def _call(command: Command, attr: Attr, what: str) -> int:
    result, error = _bpf(command, attr)
    if error:
        raise KernelError(f"bpf {command.name} {what}", error, hint=_HINTS.get(error, ""))
    return result


# ---- maps ----


@dataclass(frozen=True)
class MapTypes:
    """What a map says of its layouts: id of loaded BTF, and the types in it."""

    btf_id: int
    key: int
    value: int


def map_create(
    type_: int,
    key_size: int,
    value_size: int,
    max_entries: int,
    *,
    flags: int = 0,
    name: str = "",
    inner_fd: int = 0,
    types: MapTypes | None = None,
) -> int:
    """Make a map; sizes in bytes. Returns a descriptor."""
    attr = MapCreateAttr(type_, key_size, value_size, max_entries, flags, inner_fd, 0, name.encode()[: NAME_LENGTH - 1])
    what = f"{name or MapType(type_).name} of {max_entries}"
    if types is None:
        return _call(Command.MAP_CREATE, attr, what)
    attr.btf_fd, attr.btf_key_type_id, attr.btf_value_type_id = _btf_by_id(types.btf_id), types.key, types.value
    try:
        return _call(Command.MAP_CREATE, attr, what)
    finally:
        os.close(attr.btf_fd)


def map_lookup(fd: int, key: int, value: int, what: str = "") -> bool:
    """Copy the value of `*key` to `*value`. False: no such key."""
    result, error = _bpf(Command.MAP_LOOKUP_ELEM, ElementAttr(fd, key, value, 0))
    if error and error != errno.ENOENT:
        raise KernelError(f"look up in map {what or fd}", error, hint=_HINTS.get(error, ""))
    return result == 0


def map_update(fd: int, key: int, value: int, flags: int = Update.ANY, what: str = "") -> None:
    """Write an element. Raises KernelError: EEXIST, ENOENT (by flags), E2BIG (full), ENOMEM."""
    _call(Command.MAP_UPDATE_ELEM, ElementAttr(fd, key, value, flags), f"in map {what or fd}")


def map_delete(fd: int, key: int, what: str = "") -> bool:
    """Delete `*key`. False: it was not there."""
    result, error = _bpf(Command.MAP_DELETE_ELEM, ElementAttr(fd, key, 0, 0))
    if error and error != errno.ENOENT:
        raise KernelError(f"delete in map {what or fd}", error, hint=_HINTS.get(error, ""))
    return result == 0


def map_next_key(fd: int, key: int, following: int, what: str = "") -> bool:
    """Write the key after `*key` (address 0: the first) to `*following`. False: that was the last."""
    result, error = _bpf(Command.MAP_GET_NEXT_KEY, ElementAttr(fd, key, following, 0))
    if error and error != errno.ENOENT:
        raise KernelError(f"next key of map {what or fd}", error)
    return result == 0


def map_batch(
    command: Command, fd: int, keys: int, values: int, count: int, *, start: int = 0, end: int = 0
) -> tuple[int, int]:
    """One MAP_*_BATCH command: (elements done, errno). `start`, `end`: addresses of a walk's position; start 0 begins.

    errno ENOENT ends a walk, or names the key that DELETE did not find; ENOSPC asks a walk for a larger count.
    (The kernel takes no BPF_NOEXIST or BPF_EXIST here.)
    """
    attr = BatchAttr(start, end, keys, values, count, fd)
    _, error = _bpf(command, attr)
    return (0 if error in NOT_BEGUN else int(attr.count)), error


def map_by_id(id_: int) -> int:
    """Descriptor of a map by its id (what a map-in-map shows as value)."""
    return _call(Command.MAP_GET_FD_BY_ID, ByIdAttr(id_, 0, 0), f"{id_}")


# ---- pins ----


def obj_pin(fd: int, path: Path) -> None:
    """Pin a map, program or link at a path in a bpffs. Raises KernelError EEXIST, EPERM (a dot in the name)."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _call(Command.OBJ_PIN, ObjectAttr(ctypes.addressof(name), fd, 0), str(path))


def obj_get(path: Path) -> int:
    """Descriptor of what is pinned there. Raises KernelError ENOENT."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _call(Command.OBJ_GET, ObjectAttr(ctypes.addressof(name), 0, 0), str(path))


# ---- information ----


def _info(fd: int, info: ctypes.Structure) -> None:
    attr = InfoAttr(fd, ctypes.sizeof(info), ctypes.addressof(info))
    _call(Command.OBJ_GET_INFO_BY_FD, attr, f"of descriptor {fd}")


def map_info(fd: int) -> MapInfo:
    raw = MapInfoRaw()
    _info(fd, raw)
    return MapInfo(
        raw.type,
        raw.id,
        raw.key_size,
        raw.value_size,
        raw.max_entries,
        raw.map_flags,
        raw.name.decode(),
        raw.btf_id,
        raw.btf_key_type_id,
        raw.btf_value_type_id,
    )


def prog_info(fd: int) -> ProgInfo:
    raw = ProgInfoRaw()
    _info(fd, raw)
    return ProgInfo(raw.type, raw.id, raw.name.decode(), raw.jited_prog_len != 0, raw.btf_id)


def prog_maps(fd: int) -> set[int]:
    """Ids of the maps that a program uses."""
    raw = ProgInfoRaw()
    _info(fd, raw)
    ids = (ctypes.c_uint32 * raw.nr_map_ids)()
    again = ProgInfoRaw(nr_map_ids=raw.nr_map_ids, map_ids=ctypes.addressof(ids))
    _info(fd, again)
    return set(ids)


def link_info(fd: int) -> LinkInfo:
    raw = LinkInfoRaw()
    _info(fd, raw)
    return LinkInfo(raw.type, raw.id, raw.prog_id, raw.ifindex, raw.attach_type)


def btf_load(data: bytes) -> int:
    """Give the kernel type information. For probes; libbpf loads the real one."""
    text = ctypes.create_string_buffer(data, len(data))
    return _call(Command.BTF_LOAD, BtfLoadAttr(ctypes.addressof(text), 0, len(data)), f"of {len(data)} bytes")


def btf_data(id_: int) -> bytes:
    """Raw BTF of that id, as `btf.parse` takes it."""
    fd = _btf_by_id(id_)
    try:
        size = BtfInfoRaw()
        _info(fd, size)
        data = ctypes.create_string_buffer(size.btf_size)
        _info(fd, BtfInfoRaw(ctypes.addressof(data), size.btf_size))
        return data.raw
    finally:
        os.close(fd)


def _btf_by_id(id_: int) -> int:
    return _call(Command.BTF_GET_FD_BY_ID, ByIdAttr(id_, 0, 0), f"{id_}")


# ---- programs and links ----


def prog_load(type_: int, instructions: bytes, license_: str = "GPL") -> int:
    """Load raw instructions (8 bytes each). For probes; libbpf loads the real ones."""
    text = ctypes.create_string_buffer(license_.encode())
    code = ctypes.create_string_buffer(instructions, len(instructions))
    attr = ProgLoadAttr(type_, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(text))
    return _call(Command.PROG_LOAD, attr, "of a program")


def prog_run(fd: int, data: bytes | None = None, *, ctx: int = 0, ctx_size: int = 0, repeat: int = 0) -> Run:
    """BPF_PROG_RUN. A tc program takes a frame as `data`, a struct __sk_buff as ctx if wanted; others take a ctx.

    `ctx` is the address of `ctx_size` bytes. A syscall program writes its results there; that of a tc program is only
    read. `data` of the result is the frame as the program left it.
    """
    attr = RunAttr(prog_fd=fd, repeat=repeat, ctx_in=ctx, ctx_size_in=ctx_size)
    out = b""
    if data is not None:
        frame = ctypes.create_string_buffer(data, len(data))
        room = ctypes.create_string_buffer(len(data) + 512)
        attr.data_in, attr.data_size_in = ctypes.addressof(frame), len(data)
        attr.data_out, attr.data_size_out = ctypes.addressof(room), len(data) + 512
    _call(Command.PROG_RUN, attr, f"of program {fd}")
    if data is not None:
        out = room.raw[: attr.data_size_out]
    return Run(int(attr.retval), int(attr.duration), out)


def link_create(prog_fd: int, ifindex: int, attach_type: AttachType) -> int:
    """Attach a tc program to a device by a tcx link, behind those that are there. Returns the link's descriptor."""
    attr = LinkCreateAttr(prog_fd, ifindex, attach_type)
    return _call(Command.LINK_CREATE, attr, f"{attach_type.name} on device {ifindex}")


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replace the program of a link: each packet meets the old or the new one."""
    _call(Command.LINK_UPDATE, LinkUpdateAttr(link_fd, prog_fd), f"of link {link_fd}")


def link_detach(link_fd: int) -> None:
    """Take the program off its device; the link stays as an empty shell."""
    _call(Command.LINK_DETACH, LinkDetachAttr(link_fd), f"of link {link_fd}")


def prog_query(ifindex: int, attach_type: AttachType) -> list[int]:
    """Ids of the tcx programs on a device, in their order."""
    ids = (ctypes.c_uint32 * 64)()
    attr = QueryAttr(ifindex, attach_type, 0, 0, ctypes.addressof(ids), 64)
    _call(Command.PROG_QUERY, attr, f"{attach_type.name} of device {ifindex}")
    return list(ids[: attr.count])
