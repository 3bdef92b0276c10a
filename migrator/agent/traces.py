"""Live traces of ports: switched on while somebody looks. And what rules with `log` say, which the log gets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import structlog

from datapath.errors import PortNotFound
from datapath.provider import Driver, Event, PortRef
from migrator import packet
from migrator._pb import migrator_pb2 as pb
from migrator.agent.end import Surroundings

WAITING_MAX = 10_000


class Traces:
    """Gives what the switch reports of a port to all who look at it."""

    def __init__(self, driver: Driver, around: Surroundings) -> None:
        self._driver = driver
        self._around = around
        self._lookers: list[tuple[set[PortRef], asyncio.Queue[Event]]] = []
        self._counts: Counter[PortRef] = Counter()

    def take(self, event: Event) -> None:
        """An event "trace" or "log" of the driver; a looker who does not keep up misses events."""
        if event.what == "log":
            return _note(event)
        for refs, queue in self._lookers:
            if event.ref in refs and not queue.full():
                queue.put_nowait(event)
        return None

    async def look(self, vm: str, mac: str) -> AsyncIterator[pb.TraceEvent]:
        """Events of a VM's port, or of all its ports. Raises PortNotFound."""
        statuses = await asyncio.to_thread(self._driver.ports, vm)
        refs = [s.ref for s in statuses if mac in ("", s.ref.mac)]
        if not refs:
            raise PortNotFound(f"VM {vm} has no port {mac} here", hint="migrator port list shows where it is")
        looker = (set(refs), asyncio.Queue[Event](WAITING_MAX))
        await self._switch(vm, refs, 1)
        self._lookers.append(looker)
        try:
            while True:
                yield _message(await looker[1].get())
        finally:
            self._lookers.remove(looker)
            await self._switch(vm, refs, -1)

    async def _switch(self, vm: str, refs: Sequence[PortRef], change: int) -> None:
        for ref in refs:
            was = self._counts[ref]
            self._counts[ref] += change
            if bool(was) != bool(self._counts[ref]):
                await self._around.call(vm, self._set, ref, bool(self._counts[ref]))

    def _set(self, ref: PortRef, on: bool) -> None:
        try:
            self._driver.set_trace(ref, on)
        except PortNotFound:
            if on:
                raise


def _note(event: Event) -> None:
    """A line of the log. The driver bounds how many there are; what a rule has hit is counted exactly elsewhere."""
    told = {name: event.data.get(name, "") for name in ("rule", "direction", "verdict", "reason", "length")}
    ref = event.ref
    names = {"vm": ref.vm, "mac": ref.mac} if ref else {}
    structlog.get_logger().info("rule", **names, **told, frame=packet.describe(bytes(event.data.get("frame", b""))))


def _message(event: Event) -> pb.TraceEvent:
    data = event.data
    return pb.TraceEvent(
        time=float(data.get("time_ns", 0)) / 1e9,
        mac=event.ref.mac if event.ref else "",
        direction=str(data.get("direction", "")),
        verdict=str(data.get("verdict", "")),
        reason=str(data.get("reason", "")),
        rule=int(data.get("rule", 0)),
        length=int(data.get("length", 0)),
        frame=bytes(data.get("frame", b"")),
    )
