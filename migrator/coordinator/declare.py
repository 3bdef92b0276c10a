"""What an agent declares: the ports of a VM, as the hypervisor of its host has them.

A VM whose ports come from its hypervisor is where that one runs it. So a declaration may bring it to another host (it
was shut down here and started there), if nothing of it runs where it was: two open ports of one VM must never be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.catalog import Catalog, device_at, moved_writes, place_names
from migrator.coordinator.change import Planned, Running, epoch_counter, outcome, plan_apply
from migrator.coordinator.fanout import Fanout
from migrator.coordinator.journal import Batch, Entry, Journal, Write
from migrator.coordinator.migrations import Migrations
from migrator.coordinator.removals import Removals
from migrator.coordinator.roster import Roster
from migrator.coordinator.store import Store
from migrator.errors import AlreadyMigrating, ConfigInvalid, DeadlineExceeded, PreflightFailed

ASK_S = 5.0
ATTEMPTS = 3

log = structlog.get_logger()


@dataclass
class Declaration:
    """A plan, and the port instances that end with it: host and order."""

    planned: Planned
    removals: list[tuple[str, pb.PortRemoval]] = field(default_factory=list)


def plan_declare(
    catalog: Catalog, host: str, vm: str, ports: Sequence[pb.Port], journal: Journal, running: Running
) -> Declaration:
    """Writes that make these, and no others, the VM's declared ports at `host`. Ports of an operator's stay.

    Whether it may come here from another host the caller has found out. Raises ConfigInvalid.
    """
    planned = Planned()
    plan = Declaration(planned)
    there = catalog.host_of(vm)
    if not ports and there != host:
        return plan
    if there not in ("", host):
        _come(catalog, vm, host, journal, plan)
    known = {port.mac: port for port in catalog.ports_of(vm)}
    wanted = {port.mac: _merged(catalog, host, port, known.get(port.mac), planned) for port in ports}
    for mac, port in known.items():
        new = wanted.get(mac)
        if port.declared_by and (new is None or _another(port, new, host)):
            _leave(catalog, port, plan)
    model = config.from_message(pb.Config(ports=wanted.values()), config.Config)
    rest = plan_apply(outcome(catalog, planned), model, journal, {}, running)
    last = {(write.sort, write.name): write for write in [*planned.writes, *rest.writes]}
    planned.writes = list(last.values())
    planned.counters.update(rest.counters)
    planned.changed += rest.changed
    planned.warnings += rest.warnings
    return plan


def _come(catalog: Catalog, vm: str, host: str, journal: Journal, plan: Declaration) -> None:
    """The VM is at another host from now on, as new instances: nothing of what is left at the old one counts."""
    there, epoch = catalog.host_of(vm), journal.counter(epoch_counter(vm)) + 1
    plan.planned.writes += moved_writes(catalog, vm, host, epoch)
    plan.planned.counters[epoch_counter(vm)] = epoch
    plan.planned.changed.append(f"vm {vm}: comes from {there} to {host}")
    plan.removals += [(there, _removal(catalog, port)) for port in catalog.ports_of(vm)]


def _another(port: pb.Port, new: pb.Port, host: str) -> bool:
    """Is it no change of a port but another one? A machine that runs keeps its device: a new one is a new machine's."""
    return bool(new.network != port.network or (port.host == host and device_at(new, host) != device_at(port, host)))


def _leave(catalog: Catalog, port: pb.Port, plan: Declaration) -> None:
    key = f"{port.vm}/{port.mac}"
    plan.planned.writes.append(Write("port", key, None))
    plan.planned.writes += [Write("place", name, None) for name in place_names(port) if name in catalog.places]
    plan.planned.changed.append(f"port {key}: removed")
    if not any(order.mac == port.mac for _, order in plan.removals):
        plan.removals.append((port.host, _removal(catalog, port)))


def _removal(catalog: Catalog, port: pb.Port) -> pb.PortRemoval:
    return pb.PortRemoval(vm=port.vm, mac=port.mac, epoch=catalog.epoch(port))


def _merged(catalog: Catalog, host: str, port: pb.Port, known: pb.Port | None, planned: Planned) -> pb.Port:
    """The port as it is to be: whether it still learns, and kinds of state, are the operator's to say."""
    new = pb.Port()
    new.CopyFrom(port)
    new.host = host
    if known is not None:
        new.learning = port.learning or known.learning
        new.kinds.update({**known.kinds, **port.kinds})
        if not known.declared_by:
            planned.warnings.append(f"port {port.vm}/{port.mac}: an operator's so far, now as {port.declared_by} says")
    namesake = catalog.vm_named(port.name) if port.name else None
    if namesake not in (None, port.vm):
        new.name = ""
        planned.warnings.append(f"VM {port.vm} has no name here: {port.name} is VM {namesake}'s")
    return new


def refuse_foreign(catalog: Catalog, ports: Iterable[config.Port]) -> None:
    """An operator may say of a declared port that it learns no more, and its kinds of state. Raises ConfigInvalid."""
    for port in ports:
        known = catalog.ports.get(port.key)
        by = known.declared_by if known is not None else ""
        if not by and port.declared_by:
            raise ConfigInvalid(f"port {port.key}: declared_by is not for operators to say", hint="leave it out")
        if known is None or not by:
            continue
        new = config.to_message(port)
        new.host, new.learning = known.host, known.learning
        new.ClearField("kinds")
        new.kinds.update(known.kinds)
        if new != known:
            raise ConfigInvalid(f"port {port.key} is declared by {by}", hint=_where(known))


def refuse_foreign_removal(catalog: Catalog, roster: Roster, removal: pb.Removal) -> None:
    """A declared port goes with its VM, or with a host that is gone. Raises ConfigInvalid."""
    known = catalog.ports.get(removal.name.lower()) if removal.sort == "port" else None
    if known is not None and known.declared_by and roster.get(known.host) is not None:
        raise ConfigInvalid(f"port {removal.name} is declared by {known.declared_by}", hint=_where(known))


def _where(port: pb.Port) -> str:
    return f"edit the metadata of domain {port.name or port.vm} on {port.host}"


class Declarations:
    """Carries out what agents declare. `push` tells agents of changed objects."""

    def __init__(
        self,
        store: Store,
        roster: Roster,
        fanout: Fanout,
        migrations: Migrations,
        removals: Removals,
        running: Callable[[], Mapping[tuple[str, str, str], int]],
        push: Callable[[Sequence[Entry]], None],
    ) -> None:
        self._store, self._roster, self._fanout, self._migrations = store, roster, fanout, migrations
        self._removals, self._running, self._push = removals, running, push

    async def declare(self, request: pb.DeclareRequest) -> pb.ApplyReply:
        """Raises ConfigInvalid, AlreadyMigrating (another set during a move), PreflightFailed (it runs elsewhere)."""
        _check(request)
        for _ in range(ATTEMPTS):
            moving = self._migrations.moving(request.vm)
            if moving is not None and request.host == moving.destination:
                return pb.ApplyReply(revision=self._store.revision)  # its arrival says it all
            there = self._store.catalog.host_of(request.vm)
            if moving is None and request.ports and there not in ("", request.host):
                await self._refuse_twice(request.vm, there, request.host)
            if (self._migrations.moving(request.vm), self._store.catalog.host_of(request.vm)) == (moving, there):
                return self._carry_out(request, moving=moving is not None)
        raise AlreadyMigrating(f"VM {request.vm} moves while it is declared", hint="declare it again")

    async def _refuse_twice(self, vm: str, there: str, here: str) -> None:
        """Raises PreflightFailed unless the VM does not run where it was last."""
        session = self._roster.get(there)
        if session is None:
            if there not in self._store.catalog.hosts:
                return
            raise PreflightFailed(
                f"VM {vm} is at {there}, whose agent is not connected: it cannot be declared at {here}",
                hint=f"start the agent there; `migrator host remove {there}` if that host is gone for good",
            )
        try:
            said = (await session.request(ASK_S, guest=pb.GuestQuery(vm=vm))).guest
        except DeadlineExceeded:
            said = ""
        if said == "gone":
            return
        known = f"it is {said} there" if said else "no hypervisor there says that it is gone"
        raise PreflightFailed(
            f"VM {vm} is at {there}, it cannot be declared at {here}: {known}", hint=f"stop it at {there} first"
        )

    def _carry_out(self, request: pb.DeclareRequest, *, moving: bool) -> pb.ApplyReply:
        catalog = self._store.catalog
        plan = plan_declare(catalog, request.host, request.vm, request.ports, self._store.journal, self._running())
        planned = plan.planned
        if moving and (planned.writes or plan.removals):
            raise AlreadyMigrating(f"VM {request.vm} is being moved: its ports cannot change", hint="wait for its end")
        for _, removal in plan.removals:
            planned.counters.update(self._removals.counters(removal))
        before = dict(catalog.places)
        entries = self._store.commit(Batch(planned.writes, counters=planned.counters)) if planned.writes else ()
        for host, removal in plan.removals:
            self._removals.order(host, removal)
        changed = (entry.name for entry in entries if entry.sort == "place")
        gone = [before[name] for name in changed if name in before and name not in catalog.places]
        self._fanout.tell(gone)
        if entries:
            self._push(entries)
            log.info("ports declared", host=request.host, vm=request.vm, changed=planned.changed)
        return pb.ApplyReply(revision=self._store.revision, changed=planned.changed, warnings=planned.warnings)


def _check(request: pb.DeclareRequest) -> None:
    if not request.host or not request.vm:
        raise ConfigInvalid("a declaration names its host and its VM")
    macs = [port.mac for port in request.ports]
    if len(set(macs)) != len(macs):
        raise ConfigInvalid(f"two ports of VM {request.vm} have the same MAC")
    strange = next((port for port in request.ports if port.vm != request.vm or not port.declared_by), None)
    if strange is not None:
        raise ConfigInvalid(f"port {strange.vm}/{strange.mac} cannot be declared with VM {request.vm}")
    config.from_message(pb.Config(ports=request.ports), config.Config)
