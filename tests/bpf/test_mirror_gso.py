# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors of large segments: one copy, whole or cut, and the segment as it was."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from .lab import Lab
from .mirrors import FROM, counted, cutter, mirror
from .model import MODEL
from .test_forward_gso import HEADERS, PAYLOAD, GuestTap, large_segment, taps, told

__all__ = ["taps"]
VNET_HEADER = 10


@pytest.fixture
def output(lab: Lab) -> Iterator[GuestTap]:  # noqa: ARG001 - in its namespace
    """A device that takes large segments as they are."""
    made = GuestTap("monitor")
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("snap", [0, 64, 1500, 60_000])
def test_a_large_segment_is_one_copy(lab: Lab, taps: list[GuestTap], output: GuestTap, snap: int) -> None:
    cutter(lab)
    a, b, _ = taps
    mirror(lab, 1, output=MODEL.MIRROR_DEVICE, target=output.ifindex, directions=FROM, snap=snap)
    os.write(a.fd, large_segment())
    assert told(b.read()) == told(large_segment())
    copy, frame = output.read(), large_segment()[VNET_HEADER:]
    if 0 < snap < len(frame):
        assert copy[VNET_HEADER:] == frame[:snap] and copy[1] == 0, "no large segment any more: there is nothing to cut"
    else:
        assert told(copy) == told(large_segment())
    assert counted(lab, 1) == (4, len(PAYLOAD) + 4 * HEADERS, 0)


@pytest.mark.parametrize(("start", "left"), [(100, 128), (700, 1000)], ids=["twice as much", "the whole frame"])
def test_what_waits_for_its_checksum_further_back_is_cut_there(
    lab: Lab, taps: list[GuestTap], output: GuestTap, start: int, left: int
) -> None:
    """As a tunnel of the guest's leaves it: what the device is yet to fill in is not cut off."""
    cutter(lab)
    a, b, _ = taps
    mirror(lab, 1, output=MODEL.MIRROR_DEVICE, target=output.ifindex, directions=FROM, snap=64)
    frame = large_segment()[VNET_HEADER:][:1000]
    frame = frame[:16] + struct.pack("!H", len(frame) - 14) + frame[18:]
    os.write(a.fd, struct.pack("=BBHHHH", 1, 0, 0, 0, start, 16) + frame)
    got = b.read()
    assert len(got) == VNET_HEADER + len(frame)
    assert output.read()[VNET_HEADER:] == got[VNET_HEADER:][:left]
