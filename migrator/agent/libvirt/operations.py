"""What each operation of libvirt's hook does.

    destination   migrate     the state of the VM begins to follow it here, or the move is refused; nothing of a VM that
                              nobody knows: it is off (`--offline`), or its host has no agent
                  prepare     taps are made; waits for the first full copy
    start         restore     the start will be one from saved memory
                  prepare     taps are made, ports declared, or the start is refused
                  start       what was saved is restored; the guest does not run yet
                  started     told
    end           stopped, release   told: ports go, taps are removed; an arrival that will not come is called off
    others        reconnect, attach   nothing: the inventory compares when libvirtd is back

libvirtd holds the VM while its hook runs, so nothing here waits for a call of libvirt. Operations of one VM are done
one after the other, in the order in which they came. Those that may not fail are answered at once and done afterwards.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import structlog

from datapath.errors import Error
from migrator.agent.libvirt.arrivals import Arrivals
from migrator.agent.libvirt.domain import Domain, device_names, parse, with_devices
from migrator.agent.libvirt.hooksocket import Reply, Request
from migrator.agent.libvirt.taps import Taps
from migrator.errors import MigrationNotFound, PreflightFailed

FREE_S = 2.0  # a device of the VM's last stay here is about to go
FREE_POLL_S = 0.02


class Inventory(Protocol):
    """Who keeps the ports of this host's VMs as libvirt has them. All calls may be repeated."""

    async def starting(self, domain: Domain, *, unknown: bool = False) -> list[str]:
        """The VM is about to start here: its ports are declared; returns warnings. Raises what refuses the start.

        `unknown`: nobody knew of it when it was last said to come; if it comes running its ports learn.
        """

    async def coming_back(self, domain: Domain) -> None:
        """Its machine is about to be made from saved memory."""

    async def restoring(self, domain: Domain) -> list[str]:
        """The guest is about to run: devices have their names, what was saved is loaded. Returns warnings."""

    async def started(self, domain: Domain) -> None:
        """Its machine runs here."""

    async def stopped(self, domain: Domain) -> None:
        """Its machine is no more here."""


class Operations:
    """Answers the requests of the hook (`op` "hook")."""

    def __init__(
        self, host: str, inventory: Inventory, taps: Taps, arrivals: Arrivals, *, strict: bool = False
    ) -> None:
        self._host = host
        self._inventory = inventory
        self._taps = taps
        self._arrivals = arrivals
        self._strict = strict
        self._turns: dict[str, _Turn] = {}
        self._expected: set[str] = set()  # VMs that have been announced, whose machine is not being made yet
        self._unknown: set[str] = set()  # VMs said to come that no agent had ports of, until their machine is made
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    async def answer(self, request: Request) -> Reply:
        """One operation. Raises Error: refused."""
        operation = request.get("operation", "")
        asked = _ASKED.get(operation)
        if asked is not None and request.get("sub", "") == "begin":
            domain = parse(request.get("xml", ""))
            return (
                await self._in_turn(domain.uuid, lambda: asked(self, domain, request)) if domain.ours else {"ok": True}
            )
        told = _TOLD.get(operation)
        if told is not None:
            self._later(told, request)
        return {"ok": True}

    def _later(self, told: Callable[[Operations, Domain], Coroutine[Any, Any, None]], request: Request) -> None:
        """What may not fail."""
        try:
            domain = parse(request.get("xml", ""))
        except Error as error:
            self._log.warning("hook: not understood", domain=request.get("domain"), error=str(error))
            return
        if domain.ours:
            task = asyncio.create_task(self._do(told, domain))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _do(self, told: Callable[[Operations, Domain], Coroutine[Any, Any, None]], domain: Domain) -> None:
        try:
            await self._in_turn(domain.uuid, lambda: told(self, domain))
        except Error as error:
            self._log.warning("hook: not done", vm=domain.uuid, what=told.__name__.strip("_"), error=str(error))
        except Exception:
            self._log.exception("broken", vm=domain.uuid, what=told.__name__.strip("_"))

    async def _in_turn(self, vm: str, work: Callable[[], Awaitable[Any]]) -> Any:
        turn = self._turns.setdefault(vm, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock:
                return await work()
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                self._turns.pop(vm, None)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- what may be refused ----

    async def _migrate(self, domain: Domain, _: Request) -> Reply:
        self._refuse(domain)
        self._expected.add(domain.uuid)
        await self._free(domain)
        try:
            strict = self._strict if domain.strict is None else domain.strict
            await self._arrivals.begin(domain.uuid, strict=strict)
        except MigrationNotFound:
            self._unknown.add(domain.uuid)
            self._log.info("a VM comes of which nobody has ports", vm=domain.uuid, name=domain.name)
        except asyncio.CancelledError:  # libvirtd has gone: nobody waits for this VM any more
            self._call_off(domain, "the destination's libvirtd gave up")
            raise
        return {"ok": True}

    async def _rewritten(self, domain: Domain, request: Request) -> Reply:
        """As `_migrate`; a device that libvirt named by itself gets the name under which its port waits here."""
        reply = await self._migrate(domain, request)
        names = device_names(domain)
        if names:
            self._log.info("devices named", vm=domain.uuid, devices=names)
            reply["xml"] = with_devices(request["xml"], names)
        return reply

    async def _prepare(self, domain: Domain, _: Request) -> Reply:
        self._refuse(domain)
        unknown = domain.uuid in self._unknown
        self._expected.discard(domain.uuid)
        self._unknown.discard(domain.uuid)
        await asyncio.to_thread(self._taps.make, domain)
        try:
            if self._arrivals.in_hand(domain.uuid):
                warnings = [await self._arrivals.copied(domain.uuid)]
            else:
                warnings = await self._inventory.starting(domain, unknown=unknown)
        except Error:
            await asyncio.to_thread(self._taps.remove, domain.uuid)
            raise
        self._warn(domain, warnings)
        return {"ok": True}

    async def _restore(self, domain: Domain, _: Request) -> Reply:
        await self._inventory.coming_back(domain)
        return {"ok": True}

    async def _start(self, domain: Domain, _: Request) -> Reply:
        if not self._arrivals.in_hand(domain.uuid):
            self._warn(domain, await self._inventory.restoring(domain))
        return {"ok": True}

    def _refuse(self, domain: Domain) -> None:
        if domain.refused:
            raise PreflightFailed(
                f"host {self._host} cannot own all interfaces of VM {domain.name}",
                hint="nothing has changed",
                reasons=domain.refused,
            )

    async def _free(self, domain: Domain) -> None:
        """libvirt fails on a device that exists, and deletes it; ours of the VM's last stay may be about to go."""
        names = [one.device for one in domain.owned if one.fixed and one.managed]
        deadline = time.monotonic() + FREE_S
        while taken := [name for name in names if _exists(name)]:
            if time.monotonic() >= deadline:
                raise PreflightFailed(
                    f"host {self._host} has a device {taken[0]} already, and VM {domain.name} is to get one so named",
                    hint=f"`ip -d link show {taken[0]}` shows what it is; remove it, or name the interface otherwise",
                )
            await asyncio.sleep(FREE_POLL_S)

    def _warn(self, domain: Domain, warnings: list[str]) -> None:
        for warning in filter(None, warnings):
            self._log.warning("hook", vm=domain.uuid, name=domain.name, warning=warning)

    # ---- what is only told ----

    async def _started(self, domain: Domain) -> None:
        if not self._arrivals.in_hand(domain.uuid):
            await self._inventory.started(domain)

    async def _stopped(self, domain: Domain) -> None:
        if not self._arrivals.in_hand(domain.uuid):
            await self._inventory.stopped(domain)
        elif domain.uuid in self._expected:  # a machine of an earlier attempt, which libvirtd has found at its start
            self._log.info("told late of the last attempt's end", vm=domain.uuid)
        else:
            await self._arrivals.call_off(domain.uuid, f"its machine on {self._host} ended before the guest ran there")

    async def _released(self, domain: Domain) -> None:
        if self._arrivals.in_hand(domain.uuid):
            await self._stopped(domain)
        await asyncio.to_thread(self._taps.remove, domain.uuid)

    def _call_off(self, domain: Domain, reason: str) -> None:
        task = asyncio.create_task(self._arrivals.call_off(domain.uuid, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Turn:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


_ASKED: dict[str, Callable[[Operations, Domain, Request], Awaitable[Reply]]] = {
    "migrate": Operations._rewritten,
    "restore": Operations._restore,
    "prepare": Operations._prepare,
    "start": Operations._start,
}
_TOLD: dict[str, Callable[[Operations, Domain], Coroutine[Any, Any, None]]] = {
    "started": Operations._started,
    "stopped": Operations._stopped,
    "release": Operations._released,
}


def _exists(device: str) -> bool:
    try:
        return bool(socket.if_nametoindex(device))
    except OSError:
        return False
