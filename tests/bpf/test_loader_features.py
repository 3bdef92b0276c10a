# SPDX-License-Identifier: GPL-2.0-only
"""Probes: what is there is found, what is not is named, nothing stays behind."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from datapath import features
from datapath.drivers.ebpf import devices, htb, uapi
from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.drivers.ebpf.uapi import QueryAttr

WITHOUT = """
import ctypes, sys
from datapath import features
libc = ctypes.CDLL(None)
PR_CAPBSET_DROP = 24
for number in (12, 19, 21, 38, 39):
    assert libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0
import os
os.execv(sys.executable, [sys.executable, "-c",
    "from datapath import features\\n"
    "for one in features.probe():\\n"
    "    print(one.name, one.there, one.remedy, sep='|')"])
"""


def traces() -> tuple[set[str], set[str], int]:
    """Devices, mounts and descriptors."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    mine = {line for line in mounts if "migrator-probe" in line or "/nowhere" in line}
    return set(devices.links()), mine, len(list(Path("/proc/self/fd").iterdir()))


def test_this_machine_has_what_the_switch_needs() -> None:
    before = traces()
    found = features.probe({"bpffs": "/nowhere/bpf"})
    names = [feature.name for feature in found]
    assert len(names) == len(set(names)) == len(features.PROBES)
    assert [feature for feature in features.missing(found) if feature.name != "BPF programs"] == []
    assert next(one.detail for one in found if one.name == "bpffs") == "will be mounted at /nowhere/bpf"
    assert all(one.there for one in found if one.name.startswith("HTB"))
    assert traces() == before


class WithoutHtb:
    """A connection to the kernel that asks for a qdisc which no kernel has."""

    def __init__(self) -> None:
        self._route = IPRoute()

    def __enter__(self) -> WithoutHtb:
        return self

    def __exit__(self, *_: object) -> None:
        self._route.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._route, name)

    def tc(self, command: str, kind: str, *rest: Any, **named: Any) -> Any:
        return self._route.tc(command, kind.replace("htb", "htb9"), *rest, **named)


def test_without_htb_the_host_says_that_it_cannot_shape(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel without the module knows no such kind of qdisc."""
    monkeypatch.setattr(htb, "IPRoute", WithoutHtb)
    assert all(there for _, there, _ in EbpfDriver.check({})), "the switch runs"
    assert "HTB on macvlan (qos: shape) is not there" in caplog.text
    assert "modprobe -a sch_htb macvlan veth" in caplog.text


def test_a_process_without_rights_is_told_each() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, timeout=60)
    there = {line.split("|")[0]: line.split("|")[1] == "True" for line in run.stdout.splitlines()}
    for name in ("CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"):
        assert not there[name]
    assert not there["tap with vnet header"]
    assert not there["bpffs"]
    assert not there["HTB on macvlan (qos: shape)"]
    assert there["libbpf 1.0"]
    assert all(line.split("|")[2] for line in run.stdout.splitlines()), "each says how to get it"


def test_a_probe_that_fails_is_a_missing_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(features, "PROBES", (features.Probe("thing", fails, "buy one", devices=True),))
    found = features.probe()
    assert features.missing(found) == found
    assert "not supported" in found[0].detail
    assert found[0].remedy == "buy one"


def test_what_the_switch_runs_without_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr(features, "PROBES", (features.Probe("thing", fails, "buy one", needed=False),))
    assert EbpfDriver.check({}) == []
    assert "thing is not there" in caplog.text and "buy one" in caplog.text


def test_remedies_name_packages() -> None:
    remedies = {one.name: one.remedy for one in features.PROBES}
    assert "apt-get install linux-image-amd64" in remedies["Linux 6.1"]
    assert "apt-get install libbpf1" in remedies["libbpf 1.0"]
    assert all("modprobe" in remedies[name] for name in ("vxlan, external with GBP", "tap with vnet header"))


def test_attributes_that_the_kernel_writes_are_complete() -> None:
    """BPF_PROG_QUERY writes `revision` even past the size that it was told: it must be memory of ours."""
    assert QueryAttr.revision.offset == 56
    assert ctypes.sizeof(QueryAttr) == 64
    assert ctypes.sizeof(uapi.BatchAttr) == 56
