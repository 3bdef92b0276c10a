# SPDX-License-Identifier: GPL-2.0-only
"""Packets, sweeps and drains at the same time, on two CPUs."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from datapath.drivers.ebpf.layout import CT_ENTRY
from datapath.drivers.ebpf.maps import Table

from .frames import TCP
from .model import MODEL
from .probe import ACK, BOTH, FIN, FROM, FROM_ONLY, RST, SYN, TIMEOUTS_MS, TO, Probe, rule

Ports = Callable[..., Probe]
RACE_LENGTH = 4096
ROUNDS = 300
KEY = np.dtype("V40")
REST = f"V{CT_ENTRY.itemsize - 32}"
ENTRY = np.dtype([("word", "<u8"), ("seen", "<u8"), ("id", "<u8"), ("judged", "<u4"), ("mark", "<u4"), ("rest", REST)])


@contextmanager
def table_of(port: Probe) -> Iterator[Table]:
    with Table(os.dup(port.table.fd), KEY, ENTRY) as made:
        yield made


def test_a_packet_and_a_sweep_agree(ports: Ports) -> None:
    """4,096 old connections get one packet each while a sweep marks them. Where the packet passed, the connection is
    alive afterwards; where it did not, it was marked before."""
    port = ports(FROM_ONLY, limit=2 * RACE_LENGTH)
    switch = port.switch
    for rport in range(RACE_LENGTH):
        port.put(port.key(TCP, 40000, rport), MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED)
    now = port.now() + TIMEOUTS_MS["CT_ESTABLISHED"] * 1_000_000 - 60_000_000_000  # fresh: within the last minute
    frame = bytes(64)
    passed = marked = 0
    with table_of(port) as table, ThreadPoolExecutor(2) as both:
        for _ in range(ROUNDS):
            switch.run("race_reset", frame, mark=port.slot)
            start = threading.Barrier(2)
            packets = both.submit(lambda at: (at.wait(5), switch.run("race_packets", frame, mark=port.slot)), start)
            sweep = MODEL.ct_sweep(slot=port.slot, now=now)
            start.wait(5)
            assert switch.call("ct_expire", sweep) == 0
            packets.result(5)
            wrong, alive = check_round(switch.maps["race_verdicts"].fd, table)
            assert not wrong
            passed, marked = passed + alive, marked + RACE_LENGTH - alive
    assert passed and marked  # they did meet


def check_round(verdicts_fd: int, table: Table) -> tuple[list[tuple[int, int]], int]:
    """(connections whose verdict is not what became of them, passed ones)."""
    with Table(os.dup(verdicts_fd), "<u4", "<u4") as verdicts:
        index, verdict = verdicts.read()
    by_port = np.zeros(RACE_LENGTH, np.uint32)
    by_port[index] = verdict
    keys, entries = table.read()
    rports = np.frombuffer(keys.tobytes(), np.uint8).reshape(-1, 40)[:, 34:36].copy().view(">u2")[:, 0]
    dying = (entries["word"] >> np.uint64(8) & np.uint64(MODEL.CT_F_DYING)) != 0
    outcome = by_port[rports]
    expected = np.where(dying, MODEL.DROP_CT_INVALID, MODEL.DROP_NONE)
    wrong = np.flatnonzero(outcome != expected)
    return [(int(rports[at]), int(outcome[at])) for at in wrong], int((outcome == MODEL.DROP_NONE).sum())


def test_a_sweep_ends_with_the_active_port(ports: Ports) -> None:
    """A switchover does not wait for a walk over a large table, and nothing changes after it."""
    count = 100_000
    port = ports(FROM_ONLY, limit=2 * count)
    keys, entries = np.zeros(count, KEY), np.zeros(count, ENTRY)
    keys.view(np.uint8).reshape(count, 40)[:, :4] = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 4)
    entries["word"] = MODEL.CT_NEW
    result, visited = 0, count
    end = time.monotonic() + 30
    with table_of(port) as table, ThreadPoolExecutor(1) as other:
        while result == 0 or visited == count:  # until one is caught in the middle
            assert time.monotonic() < end
            port.set_flags(0)
            assert not table.load(keys, entries).refused
            sweep = MODEL.ct_sweep(slot=port.slot, now=1 << 62)
            running = other.submit(port.switch.call, "ct_expire", sweep)
            while not (next(table.dump(64))[1]["word"] >> np.uint64(8)).any():
                assert time.monotonic() < end  # it walks as a dump does
            port.set_flags(0, MODEL.PORT_QUIESCED)
            result, visited = running.result(5), sweep.visited
        marked = (table.read()[1]["word"] >> np.uint64(8) & np.uint64(MODEL.CT_F_DYING)) != 0
    assert result == -errno.EBUSY
    assert marked.sum() == sweep.marked == visited > 0


def rebuild(replica: dict[bytes, tuple[int, ...]], changes: Table, table: Table) -> None:
    """One drain: takes the keys and reads the current values."""
    for key in changes.take_all()[0]:
        value = table.get(key)
        if value is None:
            replica.pop(key.tobytes(), None)
        else:
            replica[key.tobytes()] = tuple(int(value[name]) for name in ("word", "id", "judged", "mark"))


def churn(port: Probe, seed: int, end: float) -> int:
    """Random packets of a few connections, so that both CPUs meet at each."""
    chance = random.Random(seed)
    sent = 0
    while time.monotonic() < end:
        direction, lport = chance.choice([FROM, TO]), chance.randrange(24)
        if chance.random() < 0.7:
            port.tcp(direction, chance.choice([SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST]), lport)
        else:
            port.udp(direction, lport, 53)
        sent += 1
    return sent


def disturb(port: Probe, seed: int, end: float) -> int:
    """Sweeps of every kind, under a clock that runs wild."""
    chance = random.Random(seed)
    swept = 0
    while time.monotonic() < end:
        later = port.now() + chance.choice([0, 0, 10**12])
        program = chance.choice(["ct_expire"] * 6 + ["ct_early_drop", "ct_flush"])
        sweep = MODEL.ct_sweep(slot=port.slot, now=later, limit=chance.randrange(4))
        sweep.match.lport = struct.unpack("=H", struct.pack("!H", 1 + chance.randrange(24)))[0]
        assert port.switch.call(program, sweep) == 0
        swept += 1
    return swept


@pytest.mark.parametrize("limit", [256, 16])
def test_rule_a_table_is_rebuilt_from_its_dirty_keys(ports: Ports, limit: int) -> None:
    """Whatever packets, evictions, policies and sweeps did, draining keys and reading values gives the same table."""
    port = ports(BOTH, limit=limit)
    port.track()
    assert port.changes is not None
    replica: dict[bytes, tuple[int, ...]] = {}
    end = time.monotonic() + 3
    policies = [[rule(number, "from"), rule(90, "to", protocol="tcp")] for number in range(1, 5)]
    with (
        table_of(port) as table,
        Table(os.dup(port.changes.fd), KEY, "<u4") as changes,
        ThreadPoolExecutor(3) as threads,
    ):
        work = [threads.submit(churn, port, seed, end) for seed in (1, 2)] + [threads.submit(disturb, port, 3, end)]
        while time.monotonic() < end:
            rebuild(replica, changes, table)
            port.set_policy(policies[len(replica) % len(policies)])
        counts = [each.result(10) for each in work]
        rebuild(replica, changes, table)
        keys, entries = table.read()
    there = {
        key.tobytes(): tuple(int(entry[name]) for name in ("word", "id", "judged", "mark"))
        for key, entry in zip(keys, entries, strict=True)
    }
    assert all(count > 100 for count in counts)
    assert not port.port.word >> 8 & MODEL.PORT_F_OVERFLOW
    assert replica == there
    for word, identifier, _, _ in there.values():
        assert word >> 32 == identifier & 0xFFFFFFFF
        assert not word >> 8 & MODEL.CT_F_DEAD
