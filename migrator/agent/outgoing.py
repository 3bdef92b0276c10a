"""What waits to be written to the coordinator: bounded, however long it reads nothing.

What is told is state, so a later word takes the place of an earlier one of the same thing: of a migration the same
event at the same end (its report holds all that the earlier one held), of a guest what it does, of a redirect how idle
it is, of places how far they are known. Different events of a migration are kept, each once, in the order in which they
were said last. Replies are kept all. Whoever reads nothing for so long that even this is too much is cut off: when it
comes back it hears the state again, from the beginning.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Hashable

from migrator._pb import migrator_pb2 as pb

WAITING_MAX = 10_000


class Outgoing:
    """A queue with one reader. Only in the loop's thread."""

    def __init__(self, limit: int = WAITING_MAX) -> None:
        self._limit = limit
        self._waiting: OrderedDict[Hashable, pb.FromAgent] = OrderedDict()
        self._numbers = itertools.count()
        self._more = asyncio.Event()
        self.full = asyncio.Event()
        """Set for good once something had to be left out: the stream is of no use any more."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: pb.FromAgent) -> None:
        """Queue a message in place of the one that it makes superfluous."""
        key = _subject(message) or next(self._numbers)
        self._waiting.pop(key, None)
        if len(self._waiting) >= self._limit:
            return self.full.set()
        self._waiting[key] = message
        return self._more.set()

    async def get(self) -> pb.FromAgent:
        """The next message."""
        while not self._waiting:
            self._more.clear()
            await self._more.wait()
        return self._waiting.popitem(last=False)[1]


def _subject(message: pb.FromAgent) -> Hashable:
    """What a message is the latest word of; None for one that has to be said in any case."""
    which = message.WhichOneof("message")
    match which:
        case "progress":
            progress = message.progress
            return which, progress.migration, progress.role, progress.event
        case "guest":
            return which, message.guest.vm
        case "instance":
            return which, message.instance.vm, message.instance.mac, message.instance.epoch
        case "redirect_idle":
            return which, message.redirect_idle.vm, message.redirect_idle.epoch
        case "places":
            return (which,)
    return None
