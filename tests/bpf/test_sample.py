# SPDX-License-Identifier: GPL-2.0-only
"""Sampling: which frames are taken, and what the agent is told of each."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any

import pytest

from .frames import BROADCAST, datagram, mac
from .lab import Lab
from .model import MODEL
from .ring import Ring

A, B = mac(1), mac(2)
SLOT, EPOCH = 1, 7
UDP_HEADERS = 14 + 20 + 8


class Sampled:
    """Port 1 of network 1, sampled one in `rate`."""

    def __init__(self, lab: Lab, rate: int, header_bytes: int = MODEL.SAMPLE_BYTES, **fields: int) -> None:
        self.lab = lab
        lab.network(1)
        self.wire = lab.port(SLOT, A, epoch=EPOCH, features=MODEL.FEATURE_SAMPLE, **fields)
        self.ifindex = lab.switch.get("ports", "port", SLOT).ifindex
        self.configure(rate=rate, header_bytes=header_bytes)
        ring = lab.switch.maps["samples"]
        self.ring = Ring(ring.fd, ring.max_entries)

    def configure(self, **fields: int) -> None:
        before = self.state()
        for name, value in fields.items():
            setattr(before, name, value)
        self.lab.switch.put("samplings", SLOT, before)

    def state(self) -> Any:
        return self.lab.switch.get("samplings", "sampling", SLOT)

    def send(self, frame: bytes, program: str = "from_port", **fields: int) -> None:
        self.lab.switch.run(program, frame, self.ifindex, **fields)

    def read(self) -> list[Any]:
        return [MODEL.sample.from_buffer_copy(record) for record in self.ring.read()]


def data(sample: Any) -> bytes:
    return bytes(sample.data)[: sample.captured]


@pytest.mark.parametrize(("program", "direction"), [("from_port", 0), ("to_port", 1)])
def test_a_sample_says_what_passed(lab: Lab, program: str, direction: int) -> None:
    port = Sampled(lab, rate=1)
    frames = [datagram(B, A, bytes(range(size))) for size in (0, 40, 250)]
    for frame in frames:
        port.send(frame, program)
    samples = port.read()
    assert [data(one) for one in samples] == [frame[:128] for frame in frames]
    assert [one.length for one in samples] == [len(frame) for frame in frames]
    assert [one.pool for one in samples] == [1, 2, 3]
    assert {(one.slot, one.epoch, one.direction, one.drops, one.vlan) for one in samples} == {
        (SLOT, EPOCH, direction, 0, 0)
    }
    assert {(one.size, one.headers, one.segment, one.last) for one in samples} == {(0, 0, 0, 1)}


def test_a_sample_has_as_many_bytes_as_are_asked_for(lab: Lab) -> None:
    port = Sampled(lab, rate=1, header_bytes=64)
    frames = [datagram(B, A, bytes(100)), datagram(B, A)]
    for frame in frames:
        port.send(frame)
    assert [data(one) for one in port.read()] == [frames[0][:64], frames[1]]


def test_segments_of_a_gso_frame_are_sampled_one_by_one(lab: Lab) -> None:
    port = Sampled(lab, rate=1)
    payload = bytes(number % 251 for number in range(3500))
    frame = datagram(B, A, payload)
    port.send(frame, gso_size=1000)
    samples = port.read()
    assert [one.length for one in samples] == [UDP_HEADERS + size for size in (1000, 1000, 1000, 500)]
    pieces = [payload[start : start + 128 - UDP_HEADERS] for start in range(0, 3500, 1000)]
    assert [data(one) for one in samples] == [frame[:UDP_HEADERS] + piece for piece in pieces]
    assert [(one.segment, one.size, one.headers, one.last) for one in samples] == [
        (number, 1000, UDP_HEADERS, int(number == 3)) for number in range(4)
    ]
    assert {one.pool for one in samples} == {4}


def test_a_gso_frame_may_be_cut_within_its_headers(lab: Lab) -> None:
    port = Sampled(lab, rate=1, header_bytes=20)
    frame = datagram(B, A, bytes(2000))
    port.send(frame, gso_size=1000)
    assert [data(one) for one in port.read()] == [frame[:20]] * 2


def test_what_is_beyond_a_frame_s_share_is_a_drop(lab: Lab) -> None:
    port = Sampled(lab, rate=1)
    port.configure(next=1)
    port.send(datagram(B, A, bytes(1000)), gso_size=1)
    assert len(port.read()) == 512
    state = port.state()
    assert (state.pool, state.drops) == (1000, 1000 - 512)
    port.configure(due=0, next=1001)
    port.send(datagram(B, A))
    assert [(one.pool, one.drops) for one in port.read()] == [(1001, 1000 - 512)]


@pytest.mark.parametrize(("rate", "gso_size", "frames"), [(16, 0, 40_000), (50, 100, 10_000)])
def test_one_in_so_many_is_taken(lab: Lab, rate: int, gso_size: int, frames: int) -> None:
    """Within 4 sigma of independent choices; distances between samples are 1 .. 2 * rate - 1."""
    port = Sampled(lab, rate=rate)
    frame = datagram(B, A, bytes(1000))
    a_frame = 10 if gso_size else 1
    taken: list[Any] = []
    for _ in range(frames // 1000):
        port.configure(due=0)
        port.send(frame, repeat=1000, gso_size=gso_size)
        taken += port.read()
    pool = frames * a_frame
    assert port.state().pool == pool
    assert port.state().drops == 0
    expected = pool / rate
    assert abs(len(taken) - expected) < 4 * math.sqrt(expected * (1 - 1 / rate))
    numbers = [one.pool - a_frame + 1 + one.segment for one in taken]
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    assert min(gaps) >= 1
    assert max(gaps) <= 2 * rate - 1
    if gso_size:  # each segment has its chance
        assert {one.segment for one in taken} == set(range(10))


def test_the_process_goes_on_from_any_number(lab: Lab) -> None:
    port = Sampled(lab, rate=1000)
    port.configure(pool=1 << 40, next=(1 << 40) + 3, drops=5)
    for _ in range(4):
        port.send(datagram(B, A))
    assert [(one.pool, one.drops) for one in port.read()] == [((1 << 40) + 3, 5)]
    assert (1 << 40) + 3 < port.state().next <= (1 << 40) + 3 + 1999


def test_only_frames_that_pass_are_in_the_pool(lab: Lab) -> None:
    port = Sampled(lab, rate=1, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_ANTISPOOF)
    port.send(datagram(B, mac(9)))
    assert port.read() == []
    assert port.state().pool == 0


@pytest.mark.parametrize("off", ["feature", "rate"])
def test_a_port_without_sampling_has_no_pool(lab: Lab, off: str) -> None:
    port = Sampled(lab, rate=1 if off == "feature" else 0)
    if off == "feature":
        lab.change_port(SLOT, features=0)
    port.send(datagram(B, A))
    port.send(datagram(B, A), "to_port")
    assert port.read() == []
    assert port.state().pool == 0


def test_a_flood_of_samples_is_limited_and_counted(lab: Lab) -> None:
    port = Sampled(lab, rate=1)
    port.send(datagram(B, A), repeat=20_000)
    taken, state = len(port.read()), port.state()
    assert 512 <= taken < 20_000
    assert (state.pool, state.drops) == (20_000, 20_000 - taken)


def test_a_full_ring_is_counted(lab: Lab) -> None:
    port = Sampled(lab, rate=1)
    room = lab.switch.maps["samples"].max_entries // (8 + len(bytes(MODEL.sample())))
    for _ in range(room // 500 + 2):
        port.configure(due=0)
        port.send(datagram(B, A), repeat=500)
    taken, state = len(port.read()), port.state()
    assert taken <= room
    assert state.drops == state.pool - taken > 0


@pytest.mark.parametrize("program", ["from_port", "to_port"])
def test_a_sample_names_the_tag_of_the_guest(lab: Lab, program: str) -> None:
    port = Sampled(lab, rate=1, flags=MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRUNK)
    lab.network(2)
    lab.switch.put("trunks", MODEL.trunk_key(slot=SLOT, vid=5), 2)
    port.send(datagram(BROADCAST if program == "to_port" else B, A, vlan=5), program)
    (sample,) = port.read()
    assert sample.vlan == 5
    if program == "from_port":
        assert sample.length == 60
        assert struct.unpack_from("!H", data(sample), 12) == (0x0800,)
