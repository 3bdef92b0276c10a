"""What the eBPF switch needs of a machine, probed by name: each probe tries the thing itself and leaves nothing behind.

Nobody parses versions. Devices are made in a network namespace that only the probing thread is in.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyroute2 import IPRoute

from datapath.drivers.ebpf import attach, bpffs, btf, devices, htb, libbpf, syscall, tun
from datapath.drivers.ebpf.maps import Table
from datapath.drivers.ebpf.uapi import PROG_TYPE_SCHED_CLS, MapType
from datapath.errors import DatapathError, FeatureMissing

_CLONE_NEWNET = 0x40000000
_INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn: code, registers, offset, immediate
_CALL_TAI = _INSTRUCTION.pack(0x85, 0, 0, 208)  # bpf_ktime_get_tai_ns
_RETURN_0 = _INSTRUCTION.pack(0xB7, 0, 0, 0) + _INSTRUCTION.pack(0x95, 0, 0, 0)


@dataclass(frozen=True)
class Feature:
    """One thing that is there or not. `remedy` says how to get it. Not `needed`: the switch runs without."""

    name: str
    there: bool
    detail: str  # why not, or which of several
    remedy: str
    needed: bool = True


@dataclass(frozen=True)
class Probe:
    """`try_it` raises when the feature is missing, and may return a detail."""

    name: str
    try_it: Callable[[Mapping[str, Any]], str | None]
    remedy: str
    needed: bool = True
    devices: bool = False  # makes devices: run in a namespace of its own


def probe(options: Mapping[str, Any] | None = None) -> list[Feature]:
    """Try everything. `options`: the driver's table of the agent's configuration (`bpffs`)."""
    return [_run(one, options or {}) for one in PROBES]


def missing(features: list[Feature]) -> list[Feature]:
    """Those without which the switch does not run."""
    return [feature for feature in features if feature.needed and not feature.there]


def _run(one: Probe, options: Mapping[str, Any]) -> Feature:
    try:
        detail = _in_namespace(one, options) if one.devices else one.try_it(options)
    except (DatapathError, OSError) as error:
        return Feature(one.name, False, str(error), one.remedy, one.needed)
    return Feature(one.name, True, detail or "", one.remedy, one.needed)


def _in_namespace(one: Probe, options: Mapping[str, Any]) -> str | None:
    """Try it in a thread that has left the host's network namespace for an empty one."""
    results: list[str | None] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                raise FeatureMissing(
                    f"network namespace: {os.strerror(ctypes.get_errno())}", hint="needs CAP_SYS_ADMIN"
                )
            results.append(one.try_it(options))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"probe {one.name}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


# ---- probes ----


def _capability(number: int) -> Callable[[Mapping[str, Any]], None]:
    def try_it(_: Mapping[str, Any]) -> None:
        status = Path("/proc/thread-self/status").read_text()
        effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
        if not int(effective.split()[1], 16) >> number & 1:
            raise FeatureMissing("not in the effective set")

    return try_it


def _program(code: bytes) -> syscall.ProgInfo:
    fd = syscall.prog_load(PROG_TYPE_SCHED_CLS, code)
    try:
        return syscall.prog_info(fd)
    finally:
        os.close(fd)


def _kernel(_: Mapping[str, Any]) -> None:
    _program(_CALL_TAI + _RETURN_0)  # a helper that came with 6.1


def _jit(_: Mapping[str, Any]) -> None:
    if not _program(_RETURN_0).jited:
        raise FeatureMissing("programs are interpreted")


def _btf(_: Mapping[str, Any]) -> None:
    integer = struct.pack("=4I", 1, 1 << 24, 4, 32)  # name at 1, kind INT, 4 bytes, 32 bits
    header = struct.pack("=HBBI4I", 0xEB9F, 1, 0, 24, 0, len(integer), len(integer), 5)
    os.close(syscall.btf_load(header + integer + b"\0int\0"))


def _batches(_: Mapping[str, Any]) -> None:
    with Table.make("<u4", "<u4", 16) as table:
        table.load(np.arange(8), np.arange(8))
        if len(table.take_all()[0]) != 8:
            raise FeatureMissing("a batch loses elements")


def _ring(_: Mapping[str, Any]) -> None:
    os.close(syscall.map_create(MapType.RINGBUF, 0, 0, 4096))


def _bpffs(options: Mapping[str, Any]) -> str:
    path = Path(options["bpffs"]) if options.get("bpffs") else bpffs.SYSTEM
    if bpffs.is_bpffs(path):
        return str(path)
    with tempfile.TemporaryDirectory(prefix="migrator-probe-") as directory:
        bpffs.mount(Path(directory))
        bpffs.unmount(Path(directory))
    return f"will be mounted at {options.get('bpffs') or bpffs.PRIVATE}"


def _attach(_: Mapping[str, Any]) -> str:
    if attach.has_tcx():
        return "tcx"
    fd = syscall.prog_load(PROG_TYPE_SCHED_CLS, _RETURN_0)
    clsact = attach.ClsactAttachments("probe")
    try:
        clsact.attach(1, attach.Direction.INGRESS, fd)
    finally:
        clsact.close()
        os.close(fd)
    return "clsact"


def _vxlan(_: Mapping[str, Any]) -> None:
    devices.make_tunnel("probe0")


def _tap(_: Mapping[str, Any]) -> None:
    os.close(tun.open_tap("probe0"))


def _shaping(_: Mapping[str, Any]) -> None:
    with IPRoute() as route, devices.kernel_errors("make a veth pair and a macvlan on it"):
        route.link("add", ifname="probe0", kind="veth", peer={"ifname": "probe1"})
        below = route.link_lookup(ifname="probe0")[0]
        route.link("add", ifname="probe2", kind="macvlan", link=below, macvlan_mode="private")
    link = devices.link("probe2")
    if link is not None:
        htb.set_root(link.ifindex)
        htb.set_class(link.ifindex, 1, 1_000_000, 100_000)


def _libbpf(_: Mapping[str, Any]) -> str:
    libbpf.library()
    return libbpf.SONAME


def _object(_: Mapping[str, Any]) -> str:
    btf.read_object()
    return str(btf.OBJECT)


_KERNEL = "boot Linux 6.1 or newer (Debian: apt-get install linux-image-amd64 or linux-image-arm64, then reboot)"
_MODULES = "cloud kernels of Debian lack some modules: linux-image-amd64 has them"

PROBES = (
    Probe("CAP_NET_ADMIN", _capability(12), "run the agent as root or give the capability"),
    Probe("CAP_BPF", _capability(39), "run the agent as root or give the capability"),
    Probe("CAP_PERFMON", _capability(38), "run the agent as root or give the capability"),
    Probe("CAP_SYS_ADMIN", _capability(21), "give it, or mount the bpffs before the agent starts", needed=False),
    Probe("CAP_SYS_PTRACE", _capability(19), "give it, or guests' tap queues cannot be read at a pause", needed=False),
    Probe("Linux 6.1", _kernel, f"{_KERNEL} with CONFIG_BPF_SYSCALL"),
    Probe("BPF JIT", _jit, "CONFIG_BPF_JIT and sysctl net.core.bpf_jit_enable=1"),
    Probe("BTF", _btf, _KERNEL),
    Probe("map batch commands", _batches, _KERNEL),
    Probe("ring buffer", _ring, _KERNEL),
    Probe("bpffs", _bpffs, "mount -t bpf bpf /sys/fs/bpf, or name another path: option bpffs"),
    Probe(
        "tcx or clsact",
        _attach,
        f"modprobe -a sch_ingress cls_bpf (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF; {_MODULES}), or Linux 6.6",
        devices=True,
    ),
    Probe("vxlan, external with GBP", _vxlan, f"modprobe vxlan (CONFIG_VXLAN; {_MODULES})", devices=True),
    Probe("tap with vnet header", _tap, f"modprobe tun (CONFIG_TUN; {_MODULES})", devices=True),
    Probe(
        "HTB on macvlan (qos: shape)",
        _shaping,
        "modprobe -a sch_htb macvlan veth (CONFIG_NET_SCH_HTB, CONFIG_MACVLAN, CONFIG_VETH; "
        f"{_MODULES}), or police instead of shape",
        needed=False,
        devices=True,
    ),
    Probe("libbpf 1.0", _libbpf, "install libbpf 1.0 or newer (Debian and Ubuntu: apt-get install libbpf1)"),
    Probe("BPF programs", _object, "install the wheel; in a checkout: make bpf (it installs clang-19 and libbpf-dev)"),
)
