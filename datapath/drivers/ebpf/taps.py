"""The guest's own tap queue: who holds it, is there something in it, and what.

The descriptor is QEMU's (or another process's). It is found by /proc/PID/fdinfo, and copied by pidfd_getfd(2), which
needs CAP_SYS_PTRACE. While the copy is open the tap lives, also when QEMU is gone: close it before the VM comes back.

With vhost-net a kernel thread reads the tap for QEMU, several frames ahead of the guest: an empty queue says nothing
then. What is left after a stop is in the queue again and can be taken as without it (drivers/vhost/net.c).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datapath.drivers.ebpf import tun
from datapath.errors import DatapathError, FeatureMissing, KernelError

TUN, VHOST = "/dev/net/tun", "/dev/vhost-net"
_SYS_PIDFD_GETFD = 438  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Holder:
    """A descriptor of a process that is a queue of a tap."""

    pid: int
    fd: int


def holders(name: str) -> list[Holder]:
    """Descriptors of other processes that say they are queues of a tap of that name, in any network namespace."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            tuns = _descriptors(process, TUN)
            found += [Holder(int(process.name), fd) for fd in tuns if _names(process, fd) == name]
    return sorted(found, key=lambda holder: (holder.pid, holder.fd))


def _descriptors(process: Path, device: str) -> Iterator[int]:
    with contextlib.suppress(OSError):  # it may end at any moment, or be of another user
        for entry in os.scandir(process / "fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == device:  # noqa: PTH115 (a thousand of them: no Path objects)
                    yield int(entry.name)


def _names(process: Path, fd: int) -> str:
    with contextlib.suppress(OSError):
        for line in (process / "fdinfo" / str(fd)).read_text().splitlines():
            if line.startswith("iff:"):
                return line.removeprefix("iff:").strip()
    return ""


class GuestTap:
    """Copies of all queues of one tap."""

    def __init__(self, name: str) -> None:
        """Find and copy. Raises FeatureMissing that names the reason: no such process, or no right."""
        self.name = name
        self.vhost = False  # of one of the process's taps: which one cannot be seen
        self._queues: dict[int, int] = {}  # descriptor -> bytes of its vnet header
        own = Path("/proc/thread-self/ns/net").stat().st_ino
        try:
            for holder in holders(name):
                self._copy(holder, own)
        except BaseException:
            self.close()
            raise
        if not self._queues:
            raise FeatureMissing(
                f"no process holds tap {name}", hint="its queue cannot be read: the VM is not on a tap, or has ended"
            )

    def _copy(self, holder: Holder, own: int) -> None:
        with _pidfd(holder.pid) as process:
            if process is None:
                return
            fd = _libc.syscall(_SYS_PIDFD_GETFD, process, holder.fd, 0)
        if fd < 0:
            failed = ctypes.get_errno()
            if failed in (errno.EBADF, errno.ESRCH):  # closed or ended since
                return
            raise FeatureMissing(
                f"tap {self.name} is held by process {holder.pid}, and its descriptor cannot be copied: "
                f"{os.strerror(failed)}",
                hint="the agent needs CAP_SYS_PTRACE",
            )
        try:
            there = tun.interface(fd)[0] == self.name and tun.namespace(fd) == own
            header = tun.header_size(fd) if there else 0
        except KernelError:
            there, header = False, 0
        if there:
            self._queues[fd] = header
            self.vhost = self.vhost or bool(list(_descriptors(Path("/proc", str(holder.pid)), VHOST)))
        else:
            os.close(fd)

    @property
    def queues(self) -> int:
        return len(self._queues)

    def readable(self, timeout_ms: int = 0) -> bool:
        """Has the guest left something in a queue?"""
        return any(tun.readable(fd, timeout_ms) for fd in self._queues)

    def drain(self) -> list[bytes]:
        """Take what waits in all queues, each in its order, with a vnet header of 10 bytes. Never blocks.

        The guest must be stopped, or it takes its share.
        """
        return [frame for fd, header in self._queues.items() for frame in tun.read_frames(fd, header)]

    def close(self) -> None:
        for fd in self._queues:
            os.close(fd)
        self._queues.clear()

    def __enter__(self) -> GuestTap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """None when the process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    except OSError as error:
        raise DatapathError(f"pidfd_open of process {pid}: {error.strerror}", hint="needs Linux 5.6") from None
    try:
        yield fd
    finally:
        os.close(fd)
