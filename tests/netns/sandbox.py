# SPDX-License-Identifier: GPL-2.0-only
"""Runs a command under what a systemd unit restricts, without systemd: `sandbox.py UNIT [--write DIR]… -- COMMAND`.

Applied are, as systemd.exec(5) has them: the bounding set, NoNewPrivileges, UMask, ProtectSystem=strict with
ReadWritePaths, ProtectKernelTunables, ProtectHome, MemoryDenyWriteExecute, RestrictRealtime, RestrictSUIDSGID,
RestrictNamespaces, RestrictAddressFamilies, SystemCallFilter, by libseccomp of systemd's own groups, and LimitRTPRIO.
Not: what needs cgroups (DevicePolicy), other users (DynamicUser) or hides files that a lab has there (PrivateTmp).
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import ctypes
import errno
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NE, _EQ, _MASKED_EQ = 1, 4, 7  # enum scmp_compare
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_NAMESPACES = 0x7E020080
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19
_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_RDONLY = 442, 0x8000, 1
_PR_SET_MDWE, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 65, 38, 24
_SUID_SGID = 0o6000
_SCHED_OTHER = 0


class Unit(configparser.RawConfigParser):
    """A unit's settings, names as they stand there; of a repeated one all values, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None)
        self.optionxform = str  # type: ignore[assignment, method-assign]
        self.read_string(path.read_text())
        self._lines = path.read_text().splitlines()

    def values_of(self, name: str) -> list[str]:
        return [line.partition("=")[2] for line in self._lines if line.startswith(f"{name}=")]

    def words(self, name: str) -> list[str]:
        return " ".join(self.values_of(name)).split()

    def yes(self, name: str) -> bool:
        return self.values_of(name) == ["yes"]


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno() or -result
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# ---- mounts ----


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user"))


def read_only(path: str, on: bool) -> None:
    attr = _MountAttr(set=_ATTR_RDONLY if on else 0, clear=0 if on else _ATTR_RDONLY)
    done = _libc.syscall(_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE, ctypes.byref(attr), ctypes.sizeof(attr))
    checked(done, f"mount_setattr {path}")


def bind(path: str) -> None:
    checked(_libc.mount(path.encode(), path.encode(), None, _MS_BIND | _MS_REC, None), f"bind {path}")


def protect_files(unit: Unit, writable: Sequence[str]) -> None:
    """A mount namespace of its own, as systemd makes one."""
    checked(_libc.unshare(_CLONE_NEWNS), "unshare")
    checked(_libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "mount / slave")
    open_paths = [word.lstrip("-") for word in unit.words("ReadWritePaths")]
    kept = [path for path in (*open_paths, *writable) if Path(path).exists()]
    for path in kept:
        bind(path)
    assert unit["Service"]["ProtectSystem"] == "strict"
    read_only("/", True)
    for path in ("/dev", *(() if unit.yes("ProtectKernelTunables") else ("/proc", "/sys")), *kept):
        read_only(path, False)
    if unit.yes("ProtectKernelTunables"):
        open_proc(kept)
    if unit.yes("ProtectHome"):
        for home in ("/home", "/root"):
            if any(path.startswith(f"{home}/") for path in (__file__, sys.executable)):
                continue  # this checkout is there
            checked(_libc.mount(b"tmpfs", home.encode(), b"tmpfs", 1, b"mode=000"), f"hide {home}")


def open_proc(kept: Sequence[str]) -> None:
    """Only /proc/sys and the like are read-only: what is of a process is its own."""
    bind("/proc/sys")
    read_only("/proc", False)
    read_only("/proc/sys", True)
    for path in kept:
        if path.startswith("/proc/sys/"):
            read_only(path, False)


# ---- system calls ----


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def group(name: str) -> set[str]:
    """System calls of a group of systemd, those of groups in it as well."""
    command = ["systemd-analyze", "syscall-filter", name]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    found: set[str] = set()
    for line in text.splitlines():
        word = line.strip()
        if not line.startswith(" ") or word.startswith("#"):
            continue
        found |= group(word) if word.startswith("@") else {word}
    return found


def allowed(unit: Unit) -> set[str]:
    """What SystemCallFilter leaves; systemd adds what starts a process."""
    calls = group("@default")
    for value in unit.values_of("SystemCallFilter"):
        named = {call for word in value.lstrip("~").split() for call in (group(word) if word[0] == "@" else {word})}
        calls = calls - named if value.startswith("~") else calls | named
    return calls | {"execve"}


class Filter:
    """A seccomp filter that refuses all it does not allow."""

    def __init__(self) -> None:
        self._seccomp = ctypes.CDLL("libseccomp.so.2")
        self._seccomp.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._seccomp.seccomp_init(_ERRNO | errno.EPERM))

    def allow(self, call: str, *conditions: tuple[int, int, int, int]) -> None:
        self._add(_ALLOW, call, *conditions)

    def hide(self, call: str) -> None:
        """As a kernel that has no such call: the library goes on with an older one."""
        self._add(_ERRNO | errno.ENOSYS, call)

    def _add(self, action: int, call: str, *conditions: tuple[int, int, int, int]) -> None:
        number = self._seccomp.seccomp_syscall_resolve_name(call.encode())
        if number < 0:  # not on this machine
            return
        compared: Any = (_Compare * len(conditions))(*(_Compare(*condition) for condition in conditions))
        done = self._seccomp.seccomp_rule_add_array(self._context, action, number, len(conditions), compared)
        checked(done, f"seccomp rule for {call}")

    def load(self) -> None:
        checked(self._seccomp.seccomp_load(self._context), "seccomp_load")


def families(unit: Unit) -> list[int]:
    return [int(getattr(socket, name)) for name in unit.words("RestrictAddressFamilies")]


def restrict_calls(unit: Unit) -> None:
    made = Filter()
    calls = allowed(unit) - {"socket", "clone3"}
    made.hide("clone3")  # its flags are in memory, where no filter sees them
    for family in families(unit):
        made.allow("socket", (0, _EQ, family, 0))
    spaces = unit["Service"]["RestrictNamespaces"]
    assert spaces in ("yes", "net")
    denied = _NAMESPACES & ~(_CLONE_NEWNET if spaces == "net" else 0)
    for call, argument in (("unshare", 0), ("clone", 0), ("setns", 1)):
        calls.discard(call)
        made.allow(call, (argument, _MASKED_EQ, denied, 0))
    if unit.yes("RestrictRealtime"):
        calls.discard("sched_setscheduler")
        made.allow("sched_setscheduler", (1, _EQ, _SCHED_OTHER, 0))
    if unit.yes("RestrictSUIDSGID"):
        for call, argument in (("chmod", 1), ("fchmod", 1), ("fchmodat", 2)):
            calls.discard(call)
            made.allow(call, (argument, _MASKED_EQ, _SUID_SGID, 0))
    for call in sorted(calls):
        made.allow(call)
    made.load()


# ---- all of it ----


def capabilities(unit: Unit) -> list[int]:
    """Numbers of the bounding set."""
    text = Path("/usr/include/linux/capability.h").read_text()
    numbers = dict(re.findall(r"^#define (CAP_\w+)\s+(\d+)$", text, re.MULTILINE))
    return [int(numbers[name]) for name in unit.words("CapabilityBoundingSet")]


def bound(kept: Sequence[int]) -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        if number not in kept:
            checked(_libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0), f"drop capability {number}")


def limit_rank(rank: int) -> None:
    """Of real-time threads; no more than this process has itself, where it may not raise limits (CAP_SYS_RESOURCE)."""
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_RTPRIO, (rank, rank))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("unit", type=Path)
    parser.add_argument("--write", action="append", default=[])
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    unit = Unit(options.unit)
    os.umask(int(unit["Service"]["UMask"], 8))
    protect_files(unit, options.write)
    limit_rank(int(unit["Service"].get("LimitRTPRIO", "0")))
    bound(capabilities(unit))
    checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    restrict_calls(unit)
    if unit.yes("MemoryDenyWriteExecute"):
        checked(_libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0), "deny write and execute")
    os.execvp(options.command[0], options.command)


if __name__ == "__main__":
    main()
