# SPDX-License-Identifier: GPL-2.0-only
"""Worker: captures of devices by name, through every life of a device, kept as numbers of the streams of `probe`.

    capture {devices}              begin; a device that is not there yet, or is made anew, is captured when it appears
    capturing                      devices that are captured now
    numbers {device, flow, way}    numbers of a flow that passed a device "in" or "out", in order

What a tunnel carries counts like any other frame: a number is found wherever in the frame it is.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from dataclasses import dataclass, field

from migrator.lab.lines import Message
from migrator.lab.loop import Loop, Operation, Orders
from migrator.lab.workers import serve
from migrator.lab.workers.probe import FORMAT, MAGIC
from migrator.lab.workers.raw import ALL, OUTGOING, SO_RCVBUFFORCE

BUFFER = 64 << 20
FRAME_MAX = 65600
LOOK_AGAIN_S = 0.002
BATCH = 256


@dataclass
class Tap:
    """One device's capture. `tap` is None while there is no such device."""

    device: str
    tap: socket.socket | None = None
    gone: bool = False  # the device went: what was captured before is read to its end
    passed: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def note(self, way: str, frame: bytes) -> None:
        at = frame.find(MAGIC)
        if 0 <= at <= len(frame) - FORMAT.size:
            _, flow, number = FORMAT.unpack_from(frame, at)
            self.passed.setdefault((flow, way), []).append(number)

    def drain(self, most: int) -> bool:
        """Read what waits, at most so many; False when the device has gone and nothing of it is left."""
        assert self.tap is not None
        for _ in range(most):
            try:
                frame, address = self.tap.recvfrom(FRAME_MAX)
            except BlockingIOError:
                return not self.gone
            except OSError:  # said once for each of down and gone; what was captured before comes behind it
                self.gone = True
                continue
            self.note("out" if address[2] == OUTGOING else "in", frame)
        return True


class Wire:
    def __init__(self, loop: Loop, _: list[Orders]) -> None:
        self.loop = loop
        self.taps: dict[str, Tap] = {}

    def operations(self) -> dict[str, Operation]:
        return {"capture": self.capture, "capturing": lambda _: self.capturing(), "numbers": self.numbers}

    def capture(self, order: Message) -> Message:
        for device in order["devices"]:
            self.taps[device] = Tap(device)
            self._look_for(self.taps[device])
        return self.capturing()

    def capturing(self) -> Message:
        return {"devices": [device for device, tap in self.taps.items() if tap.tap is not None]}

    def numbers(self, order: Message) -> Message:
        tap = self.taps[order["device"]]
        if tap.tap is not None:
            self._read(tap, sys.maxsize)
        return {"numbers": tap.passed.get((order["flow"], order["way"]), [])}

    def _look_for(self, tap: Tap) -> None:
        """Until it is there and up."""
        made = _capture(tap.device)
        if made is None:
            return self.loop.after(LOOK_AGAIN_S, lambda: self._look_for(tap))
        tap.tap, tap.gone = made, False
        return self.loop.watch(made.fileno(), lambda: self._read(tap, BATCH))

    def _read(self, tap: Tap, most: int) -> None:
        if tap.tap is None or tap.drain(most):
            return
        self.loop.forget(tap.tap.fileno())
        with contextlib.closing(tap.tap):
            tap.tap = None
        self._look_for(tap)


def _capture(device: str) -> socket.socket | None:
    """A socket that gets what passes the device; None when it is not there, or down."""
    made: socket.socket | None = None
    try:
        socket.if_nametoindex(device)  # the kernel takes tens of milliseconds to close a socket of this family
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        made.setblocking(False)
        made.bind((device, ALL))
        if not made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return made
    except OSError:
        pass
    if made is not None:
        made.close()
    return None


if __name__ == "__main__":
    sys.exit(serve(lambda loop, orders: Wire(loop, orders).operations()))
