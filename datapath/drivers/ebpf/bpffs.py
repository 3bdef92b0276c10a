"""The bpffs that holds the switch's pins: found, mounted, cleared.

    <bpffs>/migrator-<instance>/maps/NAME              every map of maps.h
                               /programs-DIGEST/NAME   of the object with that digest
                               /links/NAME             tcx links (attach.py)
                               /maps-next, /maps-before  while maps of another layout are taken over (takeover.py)

`ip netns exec` hides /sys, and a service manager may hide mounts: enter a namespace by setns, and give another path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from datapath.errors import DatapathError, KernelError

SYSTEM = Path("/sys/fs/bpf")
PRIVATE = Path("/run/migrator/bpf")

MAPS, NEXT, BEFORE = "maps", "maps-next", "maps-before"

_MAGIC = 0xCAFE4A11  # BPF_FS_MAGIC, linux/magic.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Pins:
    """Directories of one switch. `generation`: which maps; all but MAPS are there during a takeover only."""

    root: Path
    generation: str = MAPS

    @property
    def maps(self) -> Path:
        return self.root / self.generation

    def of(self, generation: str) -> Pins:
        return Pins(self.root, generation)

    def programs(self, digest: str) -> Path:
        return self.root / f"programs-{digest}"

    @property
    def links(self) -> Path:
        return self.root / "links"

    def make(self) -> None:
        """Raises KernelError (EPERM) for a directory of somebody else's, who could take pins out or put others in."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.root.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise KernelError(
                f"{self.root} is of user {found.st_uid}", errno.EPERM, hint="remove it; mount bpffs with mode=0700"
            )
        for directory in (self.maps, self.links):
            directory.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Everything pinned, relative to the root and sorted."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir())

    def clear(self) -> None:
        """Unpin all: links go first, so that no program runs on maps that are half gone."""
        clear(self.links)
        self.keep_programs("")
        for generation in (MAPS, NEXT, BEFORE):
            clear(self.root / generation)
        with contextlib.suppress(FileNotFoundError):
            self.root.rmdir()

    def turn(self) -> None:
        """The next maps are the ones from now on. A crash in between: `mend`."""
        (self.root / MAPS).rename(self.root / BEFORE)
        (self.root / NEXT).rename(self.root / MAPS)

    def mend(self) -> None:
        """End what a crash cut off: the second half of a turn; or before it, and then there are no next maps."""
        there = [(self.root / generation).is_dir() for generation in (MAPS, NEXT, BEFORE)]
        if there == [False, True, True]:
            (self.root / NEXT).rename(self.root / MAPS)
        clear(self.root / NEXT)

    def turned(self) -> bool:
        """A turn has been made and not been finished."""
        return (self.root / BEFORE).is_dir()

    def keep_programs(self, digest: str) -> None:
        """Unpin programs of all other objects."""
        for directory in self.root.glob("programs-*"):
            if directory != self.programs(digest):
                clear(directory)


def clear(directory: Path) -> None:
    """Unpin what is in a directory, and remove it."""
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            path.unlink(missing_ok=True)
        directory.rmdir()


def pins(instance: str, path: Path | None = None) -> Pins:
    """Directories of an instance, made. `path` is where the bpffs is or shall be; None: the system's, or our own.

    Raises KernelError when a bpffs cannot be mounted.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", instance):
        raise DatapathError(f"instance name {instance!r}", hint="up to 32 letters, digits, '-' and '_'")
    where = path or (SYSTEM if is_bpffs(SYSTEM) else PRIVATE)
    mount(where)
    found = Pins(where / f"migrator-{instance}")
    found.mend()
    found.make()
    return found


def mount(path: Path) -> None:
    """Mount a bpffs there unless there is one."""
    path.mkdir(parents=True, exist_ok=True)
    if is_bpffs(path):
        return
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700"):
        raise KernelError(
            f"mount a bpffs on {path}", ctypes.get_errno(), hint="needs CAP_SYS_ADMIN, or mount it before"
        )


def unmount(path: Path) -> None:
    """Take away a bpffs that `mount` made. One that others use, or the system's, stays."""
    if path == SYSTEM or not is_bpffs(path):
        return
    others = [name for name in os.listdir(path) if "." not in name]  # noqa: PTH208 (iterdir keeps the directory open)
    if others:  # names with a dot are the kernel's own: maps.debug, progs.debug
        return
    if _libc.umount2(os.fsencode(path), 0) and ctypes.get_errno() != errno.EBUSY:
        raise KernelError(f"unmount {path}", ctypes.get_errno())


def is_bpffs(path: Path) -> bool:
    result = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    if _libc.statfs(os.fsencode(path), ctypes.byref(result)):
        return False
    return int(result[0]) & 0xFFFFFFFF == _MAGIC
