"""Who has acknowledged which place: a redirect may end only when every connected host sends to the new one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import Histogram

FANOUT = Histogram(
    "migrator_place_fanout_seconds",
    "From a VM's new place to the last host's acknowledgement",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)


@dataclass
class _Pending:
    revision: int
    waiting: set[str]
    known: Callable[[], object]
    names: frozenset[str]
    begun: float = field(default_factory=time.monotonic)


class Acknowledgements:
    """Counts acknowledgements of place revisions. `known` is called once, when none is left to wait for."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def expect(
        self, revision: int, hosts: Iterable[str], known: Callable[[], object], names: Iterable[str] = ()
    ) -> None:
        """`hosts` were told of `revision`, in which the places `names` (network/MAC) are new."""
        self._pending.append(_Pending(revision, set(hosts), known, frozenset(names)))
        self._settle()

    def joined(self, host: str) -> None:
        """A host that attaches is told all places: until it says so it may still send to the old ones."""
        for pending in self._pending:
            pending.waiting.add(host)

    def left(self, host: str) -> None:
        for pending in self._pending:
            pending.waiting.discard(host)
        self._settle()

    def acknowledge(self, host: str, revision: int, unset: Iterable[str] = ()) -> None:
        """The host has all places up to `revision`, but for `unset`: of these it still sends to the old ones."""
        missing = frozenset(unset)
        for pending in self._pending:
            if pending.names & missing:
                pending.waiting.add(host)  # also when it said otherwise before: it may have lost them since
            elif pending.revision <= revision:
                pending.waiting.discard(host)
        self._settle()

    def _settle(self) -> None:
        done = [pending for pending in self._pending if not pending.waiting]
        if not done:
            return
        self._pending = [pending for pending in self._pending if pending.waiting]
        for pending in done:
            FANOUT.observe(time.monotonic() - pending.begun)
            pending.known()
