"""Frames that were taken out of a guest's queue, on disk until they have been passed on: they outlive the agent.

A file of one byte, which says whether passing them on has begun, and a msgpack map of MAC to frames. An agent that
finds it not begun passes them on; one that finds it begun cannot know how far, and counts them as frames that may be
lost: a frame twice is worse than one that is missing. Nothing is flushed, as in migrator.agent.store.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgpack
import structlog

KEPT, PASSING_ON = b"k", b"p"

log = structlog.get_logger()


class TakenFrames:
    """The file at `path`. That it cannot be written is a warning: the guest waits for no disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._there = path.exists()

    def keep(self, frames: Mapping[str, Sequence[bytes]]) -> None:
        """All that has been taken so far, by MAC."""
        self._write(KEPT + msgpack.packb(dict(frames)), os.O_CREAT | os.O_TRUNC)
        self._there = True

    def pass_on(self) -> None:
        """From now on some of them may have gone."""
        if self._there:
            self._write(PASSING_ON)

    def forget(self) -> None:
        """They have gone."""
        if self._there:
            self._path.unlink(missing_ok=True)
            self._there = False

    def recall(self) -> tuple[dict[str, list[bytes]], int]:
        """What an earlier run had taken and not passed on; and how many frames it may or may not have passed on."""
        try:
            data = self._path.read_bytes()
            frames = _checked(msgpack.unpackb(data[1:]))
            count = sum(len(some) for some in frames.values())
        except FileNotFoundError:
            return {}, 0
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("taken frames cannot be read", file=str(self._path), error=str(error))
            return {}, 0
        return (frames, 0) if data[:1] == KEPT else ({}, count)

    def _write(self, data: bytes, flags: int = 0) -> None:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
            try:
                if os.pwrite(descriptor, data, 0) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            log.warning("taken frames are in memory only", file=str(self._path), error=str(error))


def _checked(frames: object) -> dict[str, list[bytes]]:
    """Raises ValueError for what is no map of MAC to frames."""
    if not isinstance(frames, dict) or not all(_is_taken(mac, some) for mac, some in frames.items()):
        raise ValueError("no frames by MAC")
    return frames


def _is_taken(mac: object, some: object) -> bool:
    return isinstance(mac, str) and isinstance(some, list) and all(isinstance(frame, bytes) for frame in some)
