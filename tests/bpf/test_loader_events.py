# SPDX-License-Identifier: GPL-2.0-only
"""The ring of events, filled by a program and read in bulk."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datapath.build import compile_object
from datapath.drivers.ebpf import bpffs, loader
from datapath.drivers.ebpf.events import Events, Reader, Ring
from datapath.drivers.ebpf.layout import EVENT, C
from datapath.drivers.ebpf.loader import Switch

ROUND = 64  # events a run of `report`; each eighth of them is discarded
KEPT = [number for number in range(ROUND) if number % 8 != 7]


@pytest.fixture
def switch(tmp_path: Path) -> Iterator[Switch]:
    path = tmp_path / "bpf"
    pins = bpffs.pins(f"test-{os.getpid()}", path)
    try:
        small = compile_object(Path(__file__).with_name("small.bpf.c"), tmp_path / "small.bpf.o")
        made = loader.load(pins, path=small)
        yield made
        made.close()
    finally:
        pins.clear()
        bpffs.unmount(path)


def report(switch: Switch, first: int, count: int = ROUND) -> None:
    """Let the program write `count` events whose length is numbered from `first`."""
    context = np.zeros(1, EVENT)
    context["slot"], context["length"], context["rule"] = 7, count, first
    assert switch.call("report", context) == count


def test_events_come_in_order_without_the_discarded(switch: Switch) -> None:
    ring = Ring(switch.map_fd("events"))
    assert len(ring.read()) == 0
    report(switch, 1000)
    events = ring.read()
    assert events["length"].tolist() == [1000 + number for number in KEPT]
    assert events["data"][:, 0].tolist() == KEPT
    assert set(events["type"]) == {C.EVENT_TRACE}
    assert set(events["slot"]) == {7}
    assert len(ring.read()) == 0


def test_records_are_whole_at_the_end_of_the_ring(switch: Switch) -> None:
    """The ring's size is no multiple of a record's: some lie over its end."""
    ring = Ring(switch.map_fd("events"))
    rounds = 2 * (1 << 22) // (ROUND * (EVENT.itemsize + 8))
    for number in range(rounds):
        report(switch, number * ROUND)
        assert ring.read()["length"].tolist() == [number * ROUND + kept for kept in KEPT]


def test_a_full_ring_refuses_and_goes_on(switch: Switch) -> None:
    ring = Ring(switch.map_fd("events"))
    context = np.zeros(1, EVENT)
    context["length"] = ROUND
    while switch.call("report", context) == ROUND:
        pass
    assert len(ring.read()) > (1 << 22) // (EVENT.itemsize + 8) * 7 // 8 - ROUND
    report(switch, 5)
    assert ring.read()["length"][0] == 5


@pytest.mark.alone
def test_a_reader_wakes_up_and_loses_nothing(switch: Switch) -> None:
    seen: list[int] = []
    arrived = threading.Condition()

    def deliver(events: Events) -> None:
        with arrived:
            seen.extend(events["length"].tolist())
            arrived.notify()

    reader = Reader(switch.map_fd("events"), deliver)
    reader.start()
    began = time.monotonic()
    report(switch, 0)
    with arrived:
        assert arrived.wait_for(lambda: len(seen) == len(KEPT), 5)
    assert time.monotonic() - began < 0.3, "woken up, not by looking again"
    for number in range(1, 200):
        report(switch, number * ROUND)
    reader.stop()
    assert seen == [number * ROUND + kept for number in range(200) for kept in KEPT]


def test_what_the_receiver_raises_is_logged_and_the_next_batch_comes(
    switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    arrived: queue.Queue[int] = queue.Queue()

    def deliver(events: Events) -> None:
        arrived.put(len(events))
        raise ValueError("refused")

    reader = Reader(switch.map_fd("events"), deliver)
    reader.start()
    for _ in range(2):
        report(switch, 0)
        assert arrived.get(timeout=5) == len(KEPT)
    reader.stop()
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "refused" in caplog.text
