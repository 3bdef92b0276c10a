"""Keeps the ports of this host's VMs as libvirt has them: declared when a VM starts, gone with it, repaired at start.

Hooks and events say the same twice and in either order, and some of it is missed while the agent is away: whatever is
heard only leads to another look at the live domain, and doing it again changes nothing. What is done about one VM is
done one after the other. A VM on its way here is its migration's business until it has come.

*Adoption*: of a VM that runs already when its ports are made, or that came running from a host without an agent,
connections exist that were never seen to begin. Such ports learn (they take up what is under way) until the operator
says `migrator port enforce`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from datapath.errors import Error, PortNotFound
from migrator.agent.libvirt.domain import Domain, parse, placed
from migrator.agent.libvirt.saved import Saved
from migrator.agent.side import AgentSide
from migrator.errors import AlreadyMigrating, PeerLost

WORD_S = 1.0  # from the hook `stopped` to the event that says why
RETRY_S = 2.0
FORGET_S = 60.0
ADOPTING = frozenset({"metadata", "migrated"})
"""Why a VM was looked at, when its interfaces may have been in use before they became ports. "up" is another reason,
unless its start was heard."""


class Domains(Protocol):
    """What libvirt says now. Calls that ask it raise GuestFailed."""

    def running(self) -> Iterable[str] | None:
        """Uuids of VMs whose machines run here (not those on their way here); None: libvirt does not answer."""

    async def xml(self, vm: str) -> str:
        """The live domain, "" when it is not active."""

    async def kept(self, vm: str) -> bool:
        """Has libvirt saved its memory, to go on from at the next start?"""


@dataclass
class _Vm:
    """What is known of one VM. `ended`: "saved" or "stopped", as the event said of its last run.

    `begins`: between the hook's first word and the guest's first instruction libvirt does not list it as running.
    `fresh`: its start was heard. `kept`, `gone`: what its end asks for has been done. `unknown`: nobody had ports of it
    when it was said to come.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: str = ""
    told: asyncio.Event = field(default_factory=asyncio.Event)
    restoring: bool = False
    begins: bool = False
    fresh: bool = False
    kept: bool = False
    gone: bool = False
    unknown: bool = False
    quiet: int = 0
    why: str = ""  # it is to be looked at again, for that reason
    problem: str = ""

    def adopts(self, why: str) -> bool:
        return why in ADOPTING or (why == "up" and not self.fresh)

    def begin(self, *, begins: bool) -> None:
        """It is about to run, or runs."""
        self.fresh = True
        self.begins, self.ended, self.kept, self.gone = begins, "", False, False
        self.told.clear()

    def end(self, how: str) -> None:
        self.begins = self.fresh = False
        self.ended = how
        self.told.set()


class Inventory:
    """`start`, then `stop`. The hook's operations call the four methods named after them, events come by `hear`."""

    def __init__(self, side: AgentSide, domains: Domains, saved: Saved) -> None:
        self._side, self._domains, self._saved = side, domains, saved
        self._vms: dict[str, _Vm] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    # ---- life ----

    async def start(self) -> None:
        """Compare everything if libvirt answers already; go on comparing what could not be settled."""
        self._go(self._retry())
        if self._domains.running() is not None:
            self.hear("", "up")

    async def stop(self) -> None:
        for task in set(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _vm(self, vm: str) -> _Vm:
        return self._vms.setdefault(vm, _Vm())

    # ---- what libvirt's hook says; it waits for the answer ----

    async def coming_back(self, domain: Domain) -> None:
        """Its machine is about to be made from saved memory."""
        self._vm(domain.uuid).restoring = True

    async def starting(self, domain: Domain, *, unknown: bool = False) -> list[str]:
        """Its machine is about to be made here. Returns warnings; raises what refuses the start.

        Interfaces whose devices libvirt has yet to name are declared by `restoring`. `unknown`: no agent had ports of
        it when it was said to come; only libvirt's event will say whether it came running.
        """
        self._vm(domain.uuid).begin(begins=True)
        self._vm(domain.uuid).unknown = unknown
        if any(not port.device for port in domain.ports):
            return []
        return await self._declare_start(domain)

    async def restoring(self, domain: Domain) -> list[str]:
        """Its machine is made, its guest does not run yet: the devices have names, what was saved is loaded."""
        known = self._vm(domain.uuid)
        warnings = [] if await self._is_declared(domain) else await self._declare_start(domain)
        if not self._saved.has(domain.uuid):
            known.restoring = False
        elif known.restoring:
            warnings += await self._restore(domain.uuid)
        else:  # booted anew: the connections ended with the memory
            self._saved.drop(domain.uuid)
        return warnings

    async def started(self, domain: Domain) -> None:
        """Its guest runs, or is about to: libvirt's event may come before this or after it."""
        await self._settle(domain.uuid, "started")

    async def stopped(self, domain: Domain) -> None:
        """Its machine is gone; only libvirt's event, which comes by another way, says why."""
        known = self._vm(domain.uuid)
        known.begins = False
        if not known.ended and self._domains.running() is not None:
            try:
                async with asyncio.timeout(WORD_S):
                    await known.told.wait()
            except TimeoutError:
                self._log.info("libvirt does not say why a VM ended", vm=domain.uuid)
        await self._ended(domain.uuid, known.ended)

    # ---- libvirt's events ----

    def hear(self, vm: str, what: str, detail: str = "") -> None:
        """A DomainEvent. Returns at once."""
        if what == "up":
            self._go(self._compare_all())
            return
        if what in {"stopped", "saved"}:
            self._vm(vm).end(what)
            self._go(self._settle(vm, what))
        elif what in {"started", "restored"}:
            self._vm(vm).begin(begins=False)
            self._vm(vm).unknown &= detail == "migrated"
            if (what, detail) == ("started", "booted"):
                self._saved.drop(vm)  # as `restoring` does, where there is no hook
            elif (what, detail) == ("restored", "saved"):
                self._vm(vm).restoring = self._saved.has(vm)
            self._go(self._settle(vm, "migrated" if detail == "migrated" else what))
        elif what in {"device-added", "device-removed", "metadata"}:
            self._go(self._settle(vm, what))
        elif what == "undefined" and detail != "renamed":
            self._saved.drop(vm)

    async def _compare_all(self) -> None:
        """libvirt is there (again): everything that may differ is looked at."""
        running = self._domains.running()
        if running is None:
            return  # gone again: it says so when it is back
        here = {status.instance.vm async for status in self._side.statuses()}
        for vm in sorted({*running, *here, *self._vms}):
            await self._settle(vm, "up")

    # ---- one VM ----

    async def _settle(self, vm: str, why: str) -> None:
        """Make it so for one VM; what cannot be done now is tried again."""
        known = self._vm(vm)
        running = self._domains.running()
        if running is None:
            return  # "up" comes
        try:
            if vm in running:
                await self._compare(vm, why)
            elif not self._comes(vm) and not known.begins:
                await self._ended(vm, known.ended)
        except Error as error:
            self._note(vm, why, error)
        except Exception as error:
            self._log.exception("broken", vm=vm, why=why)
            known.why = f"{type(error).__name__}"
        else:
            known.problem = ""
            if not known.begins:
                known.why = "up" if self._comes(vm) else ""

    def _note(self, vm: str, why: str, error: Error) -> None:
        known = self._vm(vm)
        known.why = known.why if known.adopts(known.why) else why
        text = str(error)
        if text != known.problem:
            known.problem = text
            level = self._log.info if isinstance(error, PeerLost | AlreadyMigrating) else self._log.warning
            level("ports are not as libvirt has them, tried again", vm=vm, why=why, error=text)

    def _comes(self, vm: str) -> bool:
        return bool(self._side.arriving(vm))

    async def _compare(self, vm: str, why: str) -> None:
        """The live domain against what is declared."""
        async with self._vm(vm).lock:
            if self._comes(vm):
                return
            self._vm(vm).begins = self._vm(vm).kept = self._vm(vm).gone = False
            xml = await self._domains.xml(vm)
            domain = parse(xml) if xml else None
            if domain is None:
                return  # it ends: an event says so
            if not domain.ours:
                if await self._instances(vm):  # its metadata was taken out
                    await self._side.withdraw(vm)
                return
            for reason in domain.refused:
                self._log.warning("interface is not a port", vm=vm, reason=reason)
            learning = self._vm(vm).adopts(why)
            await self._declare(domain, learning=learning)
            self._vm(vm).unknown &= not learning
            if self._vm(vm).restoring and self._saved.has(vm):
                await self._restore(vm)

    async def _declare_start(self, domain: Domain) -> list[str]:
        """Raises what refuses the start; a coordinator that is away does not."""
        async with self._vm(domain.uuid).lock:
            try:
                return await self._declare(domain, learning=False)
            except PeerLost as error:
                self._note(domain.uuid, "started", error)
                return [f"the ports of VM {domain.name} are declared later: {error}"]

    async def _declare(self, domain: Domain, *, learning: bool) -> list[str]:
        ports = placed([port for port in domain.ports if port.device], self._side.host)
        if learning:
            there = {} if self._vm(domain.uuid).unknown else await self._instances(domain.uuid)
            for port in ports:
                port.learning = port.mac not in there
                if port.learning:
                    self._log.info("port is adopted: it learns until told otherwise", vm=port.vm, mac=port.mac)
        return await self._side.declare(domain.uuid, ports)

    async def _is_declared(self, domain: Domain) -> bool:
        """Are all its ports here, on the devices that they have now?"""
        there = await self._instances(domain.uuid)
        return all(there.get(port.mac) == port.device for port in domain.ports if port.device)

    async def _instances(self, vm: str) -> dict[str, str]:
        """MAC -> device of the VM's ports in the switch; redirects of a VM that left do not count."""
        return {
            status.instance.mac: status.device
            async for status in self._side.statuses()
            if status.instance.vm == vm and status.instance.state != "stub"
        }

    async def _restore(self, vm: str) -> list[str]:
        """Load what was saved. A snapshot that cannot be used costs the connections, not the start."""
        try:
            loaded = await self._side.restore(vm, self._saved.path(vm))
        except PortNotFound:
            return [f"the connections of VM {vm} come back when its ports are there"]
        except Error as error:
            self._vm(vm).restoring = False
            aside = self._saved.put_aside(vm)
            return [f"VM {vm} starts without its connections, kept as {aside}: {error}"]
        self._vm(vm).restoring = False
        self._saved.drop(vm)
        self._log.info("restored", vm=vm, records=loaded)
        return []

    async def _ended(self, vm: str, how: str) -> None:
        """The VM is not here any more: its state is kept if its memory was, its ports go."""
        known = self._vm(vm)
        async with known.lock:
            if known.begins or known.gone:
                return
            if not known.kept and (how == "saved" or (not how and await self._domains.kept(vm))):
                await self._keep(vm)
                known.kept = True  # a later look would find what the withdrawal has left of it
            await self._side.withdraw(vm)
            known.gone = True

    async def _keep(self, vm: str) -> None:
        try:
            await self._side.checkpoint(vm, self._saved.path(vm))
            self._log.info("saved", vm=vm)
        except PortNotFound:
            pass  # it has no ports
        except Error as error:
            self._log.warning("the connections of a saved VM are lost", vm=vm, error=str(error))

    # ---- at intervals ----

    async def _retry(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            self._forget()
            for vm, why in [(vm, known.why) for vm, known in self._vms.items() if known.why]:
                await self._settle(vm, why)

    def _forget(self) -> None:
        """VMs that have left, when nobody says anything of them any more."""
        for vm, known in list(self._vms.items()):
            known.quiet = known.quiet + 1 if known.gone and not known.why else 0
            if known.quiet * RETRY_S > FORGET_S:
                del self._vms[vm]


def listener(inventory: Inventory) -> Callable[[Any], None]:
    """What `Happenings.listen` takes."""
    return lambda event: inventory.hear(event.vm, event.what, event.detail)
