"""Checkpoint and restore of a VM's connections, end to end: kernel map to snapshot bytes and back.

Beside them, in turns, `conntrack -L -o save` and `conntrack -R` of as many connections in nf_conntrack of a namespace
of its own: what a user would otherwise use. Each workload is counted before its time is used.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from bench.figures import Figures
from datapath.provider import PortRef
from datapath.state.conntrack import ASSURED, REPLIED, STATES
from datapath.state.kind import Columns, Table
from migrator.checkpoint import checkpoint
from migrator.lab import netns
from migrator.snapshot import SnapshotReader
from tests.contract.hosts import Host, ebpf_host

HOUR_NS = 3_600_000_000_000
Result = TypeVar("Result")


def measure(*, quick: bool) -> Figures:
    figures = Figures()
    for count in (1_000, 10_000) if quick else (1_000, 100_000, 1_000_000):
        _one_size(figures, count, 3 if quick else 5)
    _among_others(figures, 20_000 if quick else 1_000_000, 3 if quick else 7)
    return figures


# ---- workloads ----


def connections(count: int, first: int = 0) -> Columns:
    """Established TCP connections of one guest with clients in 10/8, ages and ids of their own."""
    number = np.arange(first, first + count, dtype=np.uint32)
    mapped = np.zeros((count, 16), np.uint8)
    mapped[:, 10:12] = 255
    remote = mapped.copy()
    remote[:, 12] = 10
    remote[:, 13:] = number.astype(">u4").view(np.uint8).reshape(count, 4)[:, 1:]
    mapped[:, 12:] = (192, 0, 2, 10)
    rng = np.random.default_rng(1)
    return {
        "laddr": np.ascontiguousarray(mapped).view("V16").reshape(count),
        "raddr": np.ascontiguousarray(remote).view("V16").reshape(count),
        "lport": np.full(count, 443, "<u2"),
        "rport": (1024 + number % 60_000).astype("<u2"),
        "proto": np.full(count, socket.IPPROTO_TCP, "u1"),
        "type": np.zeros(count, "u1"),
        "from": np.zeros(count, "u1"),
        "state": np.full(count, STATES["ESTABLISHED"], "u1"),
        "flags": np.full(count, REPLIED | ASSURED, "u1"),
        "age_ns": rng.integers(0, HOUR_NS // 2, count, dtype="<u8"),
        "id": rng.integers(1, 1 << 63, count, dtype="<u8"),
        "judged": np.zeros(count, "<u4"),
        "mark": np.zeros(count, "<u4"),
    }


def staged(host: Host, count: int, epoch: int, *, last: int = 1, limit: int = 0) -> PortRef:
    """A port that holds `count` connections."""
    mac = f"02:00:00:00:00:{last:02x}"
    ref = host.stage(epoch, mac=mac, connections_max=limit or max(2 * count, 65_536))
    loaded = host.driver.load(ref, Table("conntrack", columns=connections(count), port_time_ns=HOUR_NS))
    assert loaded.loaded == count, loaded
    return ref


@contextlib.contextmanager
def nf_conntrack(count: int) -> Iterator[tuple[str, Path]]:
    """A namespace whose nf_conntrack holds `count` connections, and their text as `conntrack -L -o save` prints it."""
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        space = f"mg{os.getpid()}-bench"
        netns.make(space)
        stack.callback(netns.remove, space)
        text = directory / "connections"
        with text.open("w") as file:
            for number in range(count):
                remote = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
                file.write(
                    f"-A -t 43200 -u SEEN_REPLY,ASSURED -s {remote} -d 192.0.2.10 -r 192.0.2.10 -q {remote} "
                    f"-p tcp --sport {1024 + number % 60_000} --dport 443 --reply-port-src 443 "
                    f"--reply-port-dst {1024 + number % 60_000} --state ESTABLISHED\n"
                )
        yield space, text


def _peer(space: str, *arguments: str) -> float:
    began = time.perf_counter()
    command = ["nsenter", f"--net={netns.path(space)}", "conntrack", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def _peer_count(space: str) -> int:
    command = ["nsenter", f"--net={netns.path(space)}", "conntrack", "-C"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# ---- measurements ----


def _timed(work: Callable[..., Result], *arguments: object) -> tuple[float, Result]:
    """Seconds, and what the work returned."""
    began = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - began, result


def _snapshot(host: Host, ref: PortRef, codec: str) -> bytes:
    return b"".join(checkpoint(host.driver, [ref], "bench", codec=codec))


def _restored(host: Host, data: bytes, ref: PortRef) -> int:
    loaded = 0
    for section in SnapshotReader(io.BytesIO(data)):
        if section.kind == "conntrack" and section.table is not None:
            loaded += host.driver.load(ref, section.table).loaded
    return loaded


def _one_size(figures: Figures, count: int, rounds: int) -> None:
    ours_out, ours_in, peer_out, peer_in = [], [], [], []
    sizes: dict[str, int] = {}
    with ebpf_host() as host, nf_conntrack(count) as (space, text):
        ref = staged(host, count, 1)
        for number in range(rounds):
            seconds, data = _timed(_snapshot, host, ref, "none")
            ours_out.append(seconds)
            target = host.stage(2 + number, mac="02:00:00:00:00:02", connections_max=max(2 * count, 65_536))
            seconds, loaded = _timed(_restored, host, data, target)
            assert loaded == count, f"restored {loaded} of {count}"
            ours_in.append(seconds)
            host.driver.purge(target)
            _peer(space, "-F")
            peer_in.append(_peer(space, "-R", str(text)))
            assert _peer_count(space) == count, f"nf_conntrack holds {_peer_count(space)} of {count}"
            peer_out.append(_peer(space, "-L", "-o", "save"))
            sizes["raw"] = len(data)
        sizes["compressed"] = len(_snapshot(host, ref, "zstd"))
    _report(figures, count, ours_out, ours_in, peer_out, peer_in, sizes)


def _report(
    figures: Figures,
    count: int,
    ours_out: list[float],
    ours_in: list[float],
    peer_out: list[float],
    peer_in: list[float],
    sizes: dict[str, int],
) -> None:
    large = count >= 100_000
    for what, ours, peer, rate, ratio in (
        ("checkpoint", ours_out, peer_out, ">2e6", ">8"),
        ("restore", ours_in, peer_in, ">6e5", ">6"),
    ):
        figures.add(f"{what} {count:,}", "entries/s", [count / t for t in ours], rate if large else "")
        tool = {"checkpoint": "conntrack -L -o save", "restore": "conntrack -R"}[what]
        mine = figures.add(f"{what} {count:,}: {tool}", "entries/s", [count / t for t in peer])
        figures.ratio(f"{what} {count:,}: ours / {tool}", figures.rows[-2], mine, ratio if large else "")
    # counters are 32 of these bytes; the budget is for a snapshot without optional columns
    figures.add(f"bytes a connection {count:,}, with counters", "B", [sizes["raw"] / count])
    figures.add(f"bytes a connection {count:,}, compressed", "B", [sizes["compressed"] / count])


def _among_others(figures: Figures, others: int, rounds: int) -> None:
    """1,000 connections of one VM: alone on its host, and beside those of another."""
    with ebpf_host() as host:
        ref = staged(host, 1_000, 1)

        def times() -> list[float]:
            taken = [_timed(_snapshot, host, ref, "none") for _ in range(rounds + 1)][1:]
            assert all(len(data) > 64 * 1_000 for _, data in taken)
            return [1e3 * seconds for seconds, _ in taken]

        alone = figures.add("checkpoint of 1,000, empty host", "ms", times())
        staged(host, others, 1, last=2)
        beside = figures.add(f"checkpoint of 1,000 beside {others:,}", "ms", times())
    figures.ratio("beside others / alone", beside, alone, "<1.2")
