# SPDX-License-Identifier: GPL-2.0-only
"""What tcpdump saw on a device of a test's host or guest, as bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from migrator.lab import netns
from migrator.lab.processes import PATIENT_S

from .driver_lab import Place, wait_until

_HEADER, _RECORD = 24, struct.Struct("=IIII")  # pcap(5), in this machine's byte order
_FILE = 0xA1B2C3D4


class Capture:
    """A running tcpdump in a place, or in a namespace by its name. `outer_tag`: the first tag is not the frame's."""

    def __init__(
        self, place: Place | str, device: str, expression: str, directory: Path, outer_tag: bool = False
    ) -> None:
        self._path = directory / f"{device}-{os.urandom(4).hex()}.pcap"
        self._log = self._path.with_suffix(".log")
        self._outer_tag = outer_tag
        options = [
            "-i",
            device,
            "-w",
            str(self._path),
            "-s",
            "0",
            "-B",
            "16384",
            "-U",
            "--immediate-mode",
            "-Z",
            "root",
        ]
        self._process = self._start(place, ["tcpdump", "-n", *options, expression])
        wait_until(lambda: "listening on" in self._log.read_text(), f"tcpdump listens on {device}")

    def _start(self, place: Place | str, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log.open("w") as log:
            if isinstance(place, str):
                return subprocess.Popen(netns.inside(place, command), stderr=log, stdin=subprocess.DEVNULL)
            return place.run(lambda: subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL))

    def frames(self) -> list[bytes]:
        """All that has been written so far, in order."""
        data = self._path.read_bytes() if self._path.exists() else b""
        if len(data) < _HEADER:
            return []
        assert struct.unpack_from("=I", data)[0] == _FILE, "a pcap file of this machine"
        found, at = [], _HEADER
        while at + _RECORD.size <= len(data):
            captured = _RECORD.unpack_from(data, at)[2]
            at += _RECORD.size
            if at + captured > len(data):
                break
            frame = data[at : at + captured]
            found.append(frame[:12] + frame[16:] if self._outer_tag else frame)
            at += captured
        return found

    def stop(self) -> list[bytes]:
        """All frames. Fails when tcpdump itself lost some."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(20)
        said = self._log.read_text()
        assert "\n0 packets dropped by kernel" in said, said
        return self.frames()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(20)


class Captures:
    """Captures of one test, all of them stopped at its end."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory, self._stack = directory, stack

    def on(
        self, place: Place | str, device: str, expression: str = "udp or tcp", *, outer_tag: bool = False
    ) -> Capture:
        made = Capture(place, device, expression, self._directory, outer_tag)
        self._stack.callback(made.close)
        return made


@contextlib.contextmanager
def captures() -> Iterator[Captures]:
    with tempfile.TemporaryDirectory(prefix="captures-") as directory, contextlib.ExitStack() as stack:
        yield Captures(Path(directory), stack)


def whole(frame: bytes) -> bytes | None:
    return frame


def same(
    there: list[Capture],
    wires: list[Capture],
    deadline_s: float = PATIENT_S,
    *,
    due: Callable[[bytes], bytes | None] = whole,
    counts: Callable[[bytes], bool] = bool,
) -> Counter[bytes]:
    """Each frame of the wires is once in `there`, byte for byte, and nothing else. Returns them.

    `counts`: frames that are compared, the same at both ends. `due`: what of a frame has to be there, None: nothing.
    """

    def copied(ones: list[Capture], read: Callable[[Capture], list[bytes]] = Capture.frames) -> Counter[bytes]:
        return Counter(frame for one in ones for frame in read(one) if counts(frame))

    def owed(read: Callable[[Capture], list[bytes]] = Capture.frames) -> Counter[bytes]:
        frames = copied(wires, read)
        parts = ((due(frame), number) for frame, number in frames.items())
        found: Counter[bytes] = Counter()
        for part, number in parts:
            if part is not None:
                found[part] += number
        return found

    with contextlib.suppress(Exception):  # what differs says more than that it did
        wait_until(lambda: copied(there) == owed(), "copies are as the wires", deadline_s)
    copies, frames = copied(there, Capture.stop), owed(Capture.stop)
    missing, extra = frames - copies, copies - frames
    some = [f"{name}: {frame.hex()}" for name, found in (("-", missing), ("+", extra)) for frame in list(found)[:3]]
    assert not some, f"{missing.total()} missing, {extra.total()} too many of {frames.total()}: {some}"
    return copies
