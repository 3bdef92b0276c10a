# SPDX-License-Identifier: GPL-2.0-only
"""How much one caller may ask for, so that none takes what the others need. Generous: who keeps to its work meets none.

Sizes of messages are bounded by gRPC's own options, beside each server.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from migrator.errors import ResourceExhausted
from migrator.security.identity import ROOT, Identity, Role

CALLERS_MAX = 4096


@dataclass(frozen=True)
class Limits:
    """`rate`: calls a second in the long run, after a `burst` of so many at once. `calls`: under way at once."""

    rate: float = 200.0
    burst: int = 2000
    calls: int = 1024


class _Caller:
    def __init__(self, burst: int, now: float) -> None:
        self.tokens = float(burst)
        self.seen = now
        self.calls = 0


class Meter:
    """Counts the calls of each caller. Root is not limited, nor are callers that cannot be told apart."""

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or Limits()
        self._clock = clock
        self._callers: OrderedDict[Identity, _Caller] = OrderedDict()

    @contextmanager
    def call(self, identity: Identity) -> Iterator[None]:
        """While a call goes on. Raises ResourceExhausted."""
        if identity.role is Role.ANYONE or identity == ROOT:
            yield
            return
        caller = self._caller(identity)
        self._take(identity, caller)
        caller.calls += 1
        try:
            yield
        finally:
            caller.calls -= 1

    def _caller(self, identity: Identity) -> _Caller:
        caller = self._callers.setdefault(identity, _Caller(self._limits.burst, self._clock()))
        self._callers.move_to_end(identity)
        while len(self._callers) > CALLERS_MAX:
            self._callers.popitem(last=False)
        return caller

    def _take(self, identity: Identity, caller: _Caller) -> None:
        now, limits = self._clock(), self._limits
        caller.tokens = min(limits.burst, caller.tokens + (now - caller.seen) * limits.rate)
        caller.seen = now
        if caller.tokens < 1:
            raise ResourceExhausted(
                f"{identity} calls more than {limits.rate:g} times a second", hint="try again in a second"
            )
        if caller.calls >= limits.calls:
            raise ResourceExhausted(
                f"{identity} has {caller.calls} calls under way", hint="one of them has to end before the next begins"
            )
        caller.tokens -= 1
