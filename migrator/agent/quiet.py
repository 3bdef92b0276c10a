"""Keeps Python's garbage collector out of switchovers: a full collection costs more than the switchover itself."""

from __future__ import annotations

import gc


class Quiet:
    """Counts switchovers under way; collection is off while there is one."""

    def __init__(self) -> None:
        self._holders: set[str] = set()

    def begin(self, name: str) -> None:
        if not self._holders:
            gc.disable()
        self._holders.add(name)

    def end(self, name: str) -> None:
        self._holders.discard(name)
        if not self._holders:
            gc.enable()


QUIET = Quiet()
