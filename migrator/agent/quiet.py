"""Keeps Python's garbage collector out of switchovers: a full collection costs more than the switchover itself."""

from __future__ import annotations

import asyncio
import gc

LONGEST_S = 10.0


class Quiet:
    """Counts switchovers under way; collection is off while there is one."""

    def __init__(self) -> None:
        self._holders: set[str] = set()

    def begin(self, name: str) -> None:
        """Until `end`, or for LONGEST_S. In the event loop's thread."""
        asyncio.get_running_loop().call_later(LONGEST_S, self.end, name)
        if not self._holders:
            gc.disable()
        self._holders.add(name)

    def end(self, name: str) -> None:
        self._holders.discard(name)
        if not self._holders:
            gc.enable()


QUIET = Quiet()
