"""The service State: snapshots of what the ports of this host hold, then every change, by looking at intervals.

Looking is one dump of each kind that somebody watches, compared with the one before. It uses what every driver has, for
every kind, costs packets nothing, and nothing at all while nobody watches (docs/decisions/0004-watch-by-looking.md).
A look goes through the VM's lane, and keeps out of the way of a switchover.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from datapath.errors import Error
from datapath.provider import Driver, PortRef, PortState
from datapath.registry import KINDS
from datapath.state.kind import Table
from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.end import End, Surroundings
from migrator.agent.watchers import Watcher
from migrator.coordinator.rpc import reported
from migrator.errors import ConfigInvalid, ResourceExhausted
from migrator.lifecycle import destination_words as coming
from migrator.lifecycle import source_words as leaving
from migrator.watching.compare import compare, joined
from migrator.watching.match import filters
from migrator.watching.wire import of_messages

WATCHERS_MAX = 32
INTERVAL_S = 1.0
INTERVAL_MIN_S, INTERVAL_MAX_S = 0.1, 3600.0
SHARE = 0.1
"""Of the time that a VM's lane has: a look that takes long is followed by a pause nine times as long."""
OPENED_S = 1.0
"""A port that has just opened is announced and takes what its source held, by the same lane: they go first."""
THERE = frozenset({PortState.ACTIVE, PortState.QUIESCED})
"""A quiesced port stands: it moves or comes back."""
URGENT = frozenset(
    {
        *(leaving.STOPPING | leaving.UNSURE | {leaving.Phase.HOLDING, leaving.Phase.REDIRECTING}),
        *(set(coming.Phase) - {coming.Phase.OPEN, *coming.OVER}),
    }
)


@dataclass
class _Vm:
    """What was seen of a VM's ports: by port and kind, the whole as it was at the last look."""

    contents: dict[PortRef, dict[str, Table]] = field(default_factory=dict)
    due: float = 0.0
    look: asyncio.Task[None] | None = None


class Watching:
    """`ends_of(vm)`: the VM's migrations that are in hand here."""

    def __init__(self, driver: Driver, around: Surroundings, ends_of: Callable[[str], Iterable[End]]) -> None:
        self._driver, self._around, self._ends_of = driver, around, ends_of
        self._watchers: set[Watcher] = set()
        self._vms: dict[str, _Vm] = {}
        self._opened: dict[str, float] = {}
        self._runner: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._log = structlog.get_logger()

    def __len__(self) -> int:
        return len(self._watchers)

    async def watch(self, request: pb.StateRequest) -> AsyncIterator[pb.StateUpdate]:
        """Raises ConfigInvalid (kinds, fields, values, interval), ResourceExhausted."""
        watcher = self._watcher(request)
        if len(self._watchers) >= WATCHERS_MAX:
            raise ResourceExhausted(f"{WATCHERS_MAX} watches are under way here", hint="end one of them")
        self._watchers.add(watcher)
        self._begin(watcher)
        try:
            while True:
                messages = (await watcher.next()).messages()
                while (message := await asyncio.to_thread(next, messages, None)) is not None:
                    yield message
        finally:
            self._watchers.discard(watcher)
            self._wake.set()

    def _watcher(self, request: pb.StateRequest) -> Watcher:
        held = self._driver.kinds()
        kinds = list(request.kinds) or [kind for kind in KINDS if kind in held]
        for kind in kinds:
            if kind not in held or kind not in KINDS:
                raise ConfigInvalid(f"kind {kind!r} is not held here", hint=f"held: {', '.join(held)}")
        interval = request.interval_s or INTERVAL_S
        if not INTERVAL_MIN_S <= interval <= INTERVAL_MAX_S:
            raise ConfigInvalid(f"interval: expected {INTERVAL_MIN_S:g} to {INTERVAL_MAX_S:g} s, not {interval:g}")
        vms, macs = frozenset(request.vms), frozenset(request.macs)
        return Watcher(filters(kinds, of_messages(request.matches)), vms, macs, interval)

    def _begin(self, watcher: Watcher) -> None:
        for vm in self._vms.values():
            if any(watcher.wants(ref) for ref in vm.contents):
                vm.due = 0.0
        self._wake.set()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop looking; streams end with their server."""
        tasks = [vm.look for vm in self._vms.values() if vm.look] + ([self._runner] if self._runner else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- looking ----

    async def _run(self) -> None:
        """As long as somebody watches; then nothing is kept."""
        while self._watchers:
            while self._watchers:
                await self._rest(await self._timed_turn())
            await asyncio.gather(*(vm.look for vm in self._vms.values() if vm.look), return_exceptions=True)
        self._vms.clear()

    async def _timed_turn(self) -> float:
        self._wake.clear()
        began = time.monotonic()
        try:
            await self._turn()
        except Error as error:
            self._log.info("not looked at this time", error=str(error))
        except Exception:
            self._log.exception("broken")
        return time.monotonic() - began

    async def _rest(self, took: float) -> None:
        pause = min((watcher.interval_s for watcher in self._watchers), default=0.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(pause, _pause(took))):
                await self._wake.wait()

    async def _turn(self) -> None:
        statuses = await asyncio.to_thread(self._driver.ports)
        there = {status.ref for status in statuses if status.state in THERE}
        active = {status.ref for status in statuses if status.state is PortState.ACTIVE}
        self._forget(there)
        for watcher in self._watchers:
            watcher.turn(active, there)
        wanted = {ref for ref in active if any(watcher.wants(ref) for watcher in self._watchers)}
        for name in {ref.vm for ref in wanted}:
            vm = self._vms.setdefault(name, _Vm())
            if vm.look is None and time.monotonic() >= vm.due and not self._urgent(name):
                refs = sorted(ref for ref in wanted if ref.vm == name)
                vm.look = asyncio.create_task(self._look(name, vm, refs))

    def _forget(self, there: set[PortRef]) -> None:
        for name, vm in list(self._vms.items()):
            if vm.look is not None:
                continue  # what it sees is told before the end of it
            for ref in [ref for ref in vm.contents if ref not in there]:
                del vm.contents[ref]
                for watcher in self._watchers:
                    watcher.gone(ref)
            if not vm.contents:
                del self._vms[name]

    def _urgent(self, vm: str) -> bool:
        """Is its lane needed for a switchover? Nothing of what happens meanwhile is lost: it is seen afterwards."""
        phases = {end.state.phase for end in self._ends_of(vm)}
        if coming.Phase.OPEN not in phases:
            self._opened.pop(vm, None)
        elif time.monotonic() - self._opened.setdefault(vm, time.monotonic()) < OPENED_S:
            return True
        return self.switching(vm)

    def switching(self, vm: str) -> bool:
        """Is a switchover of the VM under way here?"""
        return not {end.state.phase for end in self._ends_of(vm)}.isdisjoint(URGENT)

    async def _look(self, name: str, vm: _Vm, refs: list[PortRef]) -> None:
        took = 0.0
        try:
            for ref in refs:
                for kind in self._kinds_of(ref):
                    began = time.monotonic()
                    content = await self._content(ref, kind)
                    took += time.monotonic() - began
                    if content is None:
                        return
                    await self._told(vm, ref, kind, content)
        except Error as error:  # it went meanwhile: the next turn says so
            self._log.debug("ports not looked at", vm=name, error=str(error))
        except Exception:
            self._log.exception("broken", vm=name)
        finally:
            wanting = [one.interval_s for one in self._watchers if any(one.wants(ref) for ref in refs)]
            # A little less than the interval: turns come in its rhythm.
            vm.due = time.monotonic() + max(0.9 * min(wanting, default=INTERVAL_S) - took, _pause(took))
            vm.look = None

    def _kinds_of(self, ref: PortRef) -> list[str]:
        wanted = {kind for watcher in self._watchers if watcher.wants(ref) for kind in watcher.filters}
        return [kind for kind in KINDS if kind in wanted]

    async def _content(self, ref: PortRef, kind: str) -> Table | None:
        """All of a kind; None when the lane is needed for something else."""
        tables: list[Table] = []
        dump = await self._around.call(ref.vm, self._driver.dump, ref, kind)
        while (table := await self._around.call(ref.vm, next, dump, None)) is not None:
            if self._urgent(ref.vm):
                return None
            tables.append(table)
        return await asyncio.to_thread(joined, KINDS[kind], tables)

    async def _told(self, vm: _Vm, ref: PortRef, kind: str, content: Table) -> None:
        before = vm.contents.get(ref, {}).get(kind)
        difference = None if before is None else await asyncio.to_thread(compare, before, content)
        vm.contents.setdefault(ref, {})[kind] = content
        for watcher in self._watchers:
            watcher.looked(ref, kind, content, difference)


def _pause(took: float) -> float:
    """Seconds to leave alone what was busy for so long."""
    return took * (1 / SHARE - 1)


class StateService(rpc.StateServicer):
    """See proto/migrator/v1/migrator.proto."""

    def __init__(self, watching: Watching) -> None:
        self._watching = watching

    async def Watch(self, request: pb.StateRequest, context: Any) -> AsyncIterator[pb.StateUpdate]:  # noqa: N802
        async with reported(context):
            async for update in self._watching.watch(request):
                yield update
