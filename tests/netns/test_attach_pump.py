# SPDX-License-Identifier: GPL-2.0-only
"""A hold tap's pump where frames do not leave, or leave slowly."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
from pyroute2 import IPRoute

from datapath.drivers.ebpf.holds import HoldTap, Pump
from datapath.drivers.ebpf.layout import C

from .private import ETH_P_ALL, private_namespace, raw_socket
from .test_attach_taps import frame, headed, put


@pytest.fixture
def hold() -> Iterator[HoldTap]:
    with private_namespace():
        made = HoldTap("hold0")
        yield made
        made.destroy()


def test_it_ends_when_nothing_moves(hold: HoldTap) -> None:
    assert hold.pump(lambda: 3, seconds=0.05) == Pump(0, 0, 3)


def test_it_goes_on_while_frames_move(hold: HoldTap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds a frame on a machine without CPU: more than five for all of them."""
    put(hold, headed([frame(number) for number in range(4)]))
    clock = itertools.count(step=3)
    monkeypatch.setattr("datapath.drivers.ebpf.holds.time.monotonic", lambda: next(clock))
    assert hold.pump(counting(4), seconds=5.0) == Pump(4, 0, 0)


def test_it_ends_when_frames_join_as_fast_as_they_leave(hold: HoldTap, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hold, headed([frame(number) for number in range(40)]))
    clock = itertools.count(step=3)
    monkeypatch.setattr("datapath.drivers.ebpf.holds.time.monotonic", lambda: next(clock))
    assert hold.pump(lambda: 1) == Pump(20, 0, 1)


def test_what_the_device_refuses_stays_in_order(hold: HoldTap) -> None:
    frames = [frame(number) for number in range(5)]
    put(hold, headed(frames))
    with IPRoute() as route:
        route.link("set", ifname="hold0", state="down")
        assert hold.pump(lambda: 5, seconds=0.05) == Pump(0, 0, 5)
        route.link("set", ifname="hold0", state="up")
    with raw_socket(hold.ifindex, ETH_P_ALL) as watcher:
        assert hold.pump(counting(5)) == Pump(5, 0, 0)
        assert [watcher.recv(2000) for _ in frames] == frames


@pytest.mark.parametrize("read", range(0, 33, 5))
def test_a_full_hold_has_room_for_as_many_as_have_left(hold: HoldTap, read: int) -> None:
    """The kernel's ring gives places back sixteen at a time: at once, or what joins a hold that is full is lost there
    while the programs count it as held, for ever."""
    full = C.HOLD_FRAMES
    put(hold, headed([frame(number) for number in range(full)]))
    for _ in range(read):
        os.read(hold.fd, 2000)
    put(hold, headed([frame(number) for number in range(full, full + read)]))
    assert len(hold.drain()) == full


def counting(frames: int) -> Callable[[], int]:
    """A counter of held frames: so many, then one less at each look."""
    left = iter(range(frames, -1, -1))
    return lambda: next(left)
