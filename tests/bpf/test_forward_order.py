# SPDX-License-Identifier: GPL-2.0-only
"""The promise of the gate under traffic: whatever the agent does to it, each frame arrives once and in order."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import threading
import time
from collections.abc import Callable

from .frames import datagram, mac
from .lab import DEADLINE_S, Lab, Tap, Wire, wait_for
from .model import MODEL

A, B = mac(1), mac(2)
FRAMES, BURST, PAUSE_S = 20_000, 10, 0.0005
NUMBER = 14 + 20 + 8  # offset of a frame's number


class Words:
    """Single fields of a port, read and written without touching what programs change beside them."""

    def __init__(self, lab: Lab, slot: int) -> None:
        self._view = lab.ports_memory()
        self._base = slot * ctypes.sizeof(MODEL.port)

    def read(self, field: str) -> int:
        return int(struct.unpack_from("=q", self._view, self._offset(field))[0])

    def write(self, field: str, value: int) -> None:
        struct.pack_into("=Q", self._view, self._offset(field), value)

    def _offset(self, field: str) -> int:
        return self._base + int(getattr(MODEL.port, field).offset)


def pace(seconds: float) -> None:
    """Sets a rhythm; nothing is waited for."""
    threading.Event().wait(seconds)


def send_all(wire: Wire, target: str, source: str) -> threading.Thread:
    """Sends FRAMES numbered frames in small bursts, so that a pump in Python keeps up.

    From one CPU: Linux takes in a frame on the CPU that sends it, and where that has other work, one that is sent from
    another CPU comes before it.
    """

    def work() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for number in range(FRAMES):
            wire.send(datagram(target, source, struct.pack("=I", number)))
            if number % BURST == 0:
                pace(PAUSE_S)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def pump(tap: Tap, waiting: Callable[[], int]) -> None:
    """As the agent does: what the tap holds is written back until nothing waits."""
    end = time.monotonic() + DEADLINE_S
    while waiting():
        assert time.monotonic() < end, "the hold does not empty"
        if frame := tap.read():
            tap.write(frame)


def numbers(frames: list[bytes]) -> list[int]:
    return [struct.unpack_from("=I", frame, NUMBER)[0] for frame in frames]


def collect(wire: Wire, frames: list[bytes], thread: threading.Thread) -> None:
    thread.join(60)
    assert not thread.is_alive()
    wait_for(lambda: frames.extend(wire.waiting()) or len(frames) >= FRAMES, "all frames")


def test_shutting_and_opening_loses_nothing_and_keeps_the_order(lab: Lab) -> None:
    lab.network(1)
    a, b = lab.port(1, A), lab.port(2, B)
    lab.place(B, MODEL.L2_PORT, 2)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_TO)
    lab.change_port(2, hold_to=tap.ifindex)
    words, frames, rounds = Words(lab, 2), [], 0
    b.buffer(1 << 26)
    thread = send_all(a, B, A)
    while thread.is_alive():
        words.write("gate", MODEL.GATE_LOCAL | 1 << 8)
        pace(random.random() * 0.005)
        words.write("gate", MODEL.GATE_LOCAL)
        pump(tap, lambda: words.read("held_to"))
        frames.extend(b.waiting())
        rounds += 1
    collect(b, frames, thread)
    assert rounds > 10
    assert lab.counted(2, "held", 1) > 0
    assert numbers(frames) == list(range(FRAMES))


def test_an_opening_port_loses_nothing_of_its_guest(lab: Lab) -> None:
    lab.network(1)
    a, b = lab.port(1, A), lab.port(2, B, state=MODEL.PORT_STAGED, gate=MODEL.GATE_NONE, epoch=3)
    lab.place(A, MODEL.L2_PORT, 1)
    tap = lab.tap(2, MODEL.DEVICE_HOLD_FROM)
    lab.change_port(2, hold_from=tap.ifindex)
    words, frames = Words(lab, 2), []
    a.buffer(1 << 26)
    thread = send_all(b, A, B)
    wait_for(lambda: words.read("held_from") > 100, "frames in the hold")
    words.write("commit", 3)  # the next frame opens the port
    wait_for(lambda: words.read("word") & 0xFF == MODEL.PORT_ACTIVE, "the port is open")
    pump(tap, lambda: words.read("held_from"))
    collect(a, frames, thread)
    assert numbers(frames) == list(range(FRAMES))
