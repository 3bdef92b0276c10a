"""Hold taps: where frames wait that must not go anywhere yet.

Nothing in tc can hold a frame; a tap that nobody reads can. Programs put frames in; `pump` later reads each and writes
it back to the same descriptor, and the tap's ingress program hands it on as it would have gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyroute2 import IPRoute

from datapath.drivers.ebpf import devices, tun
from datapath.drivers.ebpf.keeper import Keeper
from datapath.drivers.ebpf.maps import Handle
from datapath.errors import KernelError

QUEUE_LENGTH = 16384  # frames: what a guest's device has to take when a hold is given back
TAP_LENGTH = QUEUE_LENGTH + 64
"""Frames that a hold tap's own queue has places for. More than programs put in (HOLD_FRAMES): the kernel gives back the
places of frames that were read sixteen at a time (__ptr_ring_discard_one, linux/ptr_ring.h). What finds none meanwhile
is dropped behind the program's back, which counts it as held for ever."""
MTU = 65521
PUMP_MOST_S = 60.0
_LOOK_AGAIN_MS = 1
_LATER = frozenset({errno.EAGAIN, errno.EIO, errno.ENOBUFS, errno.ENOMEM})  # EIO: the device is down


@dataclass(frozen=True)
class Pump:
    """What a pump did. `left` is what the counter still shows: 0 unless it gave up."""

    passed: int
    failed: int  # frames that the device will never take back
    left: int


class HoldTap(Handle):
    """One hold tap, made or taken over with the frames in it.

    The device outlives the agent; its frames do as well if a keeper holds the descriptor too.
    """

    def __init__(self, name: str, keeper: Keeper | None = None) -> None:
        """Raises FeatureMissing (no tun), KernelError (EBUSY: another process has it; EINVAL: the name is too long)."""
        if len(name) > tun.NAME_MAX:
            raise KernelError(f"hold tap {name}", errno.EINVAL, hint=f"names have up to {tun.NAME_MAX} characters")
        self.name = name
        self._lock = threading.Lock()
        self._refused: bytes | None = None  # read, and not taken by the device yet
        self._keeper = keeper
        kept = keeper.take(name) if keeper else None
        self.kept = kept is not None
        """It was the keeper's: what waits in it has outlived the agent before."""
        self.fd = tun.open_tap(name, persist=True) if kept is None else kept
        self.ifindex = self._set_up()
        if keeper and kept is None:
            keeper.keep(name, self.fd)

    def _set_up(self) -> int:
        devices.quiet(self.name)  # before it is up: the kernel shall send nothing of its own
        there = devices.link(self.name)
        if there is None or (there.up, there.mtu, there.queue) != (True, MTU, TAP_LENGTH):
            with IPRoute() as route, devices.kernel_errors(f"set up hold tap {self.name}"):
                route.link("set", ifname=self.name, txqlen=TAP_LENGTH, mtu=MTU, state="up")
            there = devices.link(self.name)
        if there is None:
            raise KernelError(f"hold tap {self.name}", errno.ENODEV)
        return there.ifindex

    def pump(self, remaining: Callable[[], int], seconds: float = 5.0, most_s: float = PUMP_MOST_S) -> Pump:
        """Give back every frame, in order, also those that join meanwhile, until `remaining()` says 0.

        `remaining` is the port's counter of held frames: it also counts a frame on its way into the tap. Gives up after
        `seconds` in which nothing moved (a machine without CPU is slow, and goes on), or when frames join as fast as
        they leave for `most_s`. What is left stays, in order: a frame that the device refuses is the next one's first.
        """
        room = bytearray(tun.FRAME_MAX)
        began = moved = time.monotonic()
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        passed = failed = 0
        with self._lock:
            while left := remaining():
                done = self._pass_one(room)
                now = time.monotonic()
                if done is None:
                    if now - moved >= seconds:
                        break
                    if self._refused:
                        time.sleep(_LOOK_AGAIN_MS / 1e3)
                    else:
                        poll.poll(_LOOK_AGAIN_MS)
                    continue
                passed, failed, moved = passed + done, failed + (not done), now
                if now - began >= most_s:
                    break
        return Pump(passed, failed, left)

    def _pass_one(self, room: bytearray) -> bool | None:
        """The next frame: True when the device took it, False when it never will, None when nothing moved."""
        try:
            frame = self._refused or memoryview(room)[: os.readv(self.fd, [room])]
        except BlockingIOError:
            return None
        try:
            os.write(self.fd, frame)
        except OSError as error:
            self._refused = bytes(frame) if error.errno in _LATER else None
            return None if self._refused else False
        self._refused = None
        return True

    def write(self, frames: Sequence[bytes]) -> int:
        """Hand frames with vnet header to the tap's ingress program. Returns how many were taken."""
        with self._lock:
            return tun.send_all(lambda frame: os.write(self.fd, frame), frames, f"write to hold tap {self.name}")

    def drain(self) -> list[bytes]:
        """Take the waiting frames out for good, with vnet header."""
        with self._lock:
            refused, self._refused = self._refused, None
            return [*([refused] if refused else []), *tun.read_frames(self.fd, tun.VNET_HEADER)]

    def destroy(self) -> None:
        """Delete the device and what waits in it."""
        if self.fd < 0:
            return
        if self._keeper:
            self._keeper.drop(self.name)
        with contextlib.suppress(KernelError):
            tun.release_tap(self.fd)
        self.close()
        devices.remove(self.name)
