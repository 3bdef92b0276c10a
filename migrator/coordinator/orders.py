"""What the coordinator tells the agents of a migration, and what it makes of what they say they have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from google.protobuf import json_format

from migrator import protocol
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.catalog import Catalog, device_at
from migrator.coordinator.held import lacks
from migrator.coordinator.roster import Roster
from migrator.coordinator.running import Running
from migrator.errors import PreflightFailed
from migrator.lifecycle import coordinator as machine
from migrator.lifecycle.machine import Role, Verdict

Phase = machine.Phase
TIMEOUT_MAX_S = 30 * 86_400
COPY_STORAGE = ("", "all", "inc")
STAGED = frozenset({Phase.STARTING, Phase.PRE_COPY, *machine.UNDECIDED})
"""Phases in which the destination has staged instances that configuration changes go to as well."""


def preflight(catalog: Catalog, roster: Roster, vm: str, request: pb.MigrateRequest) -> None:
    """Refuse what needs no question to an agent. Raises PreflightFailed with every reason."""
    source, to = catalog.host_of(vm), request.to
    reasons = [f"the agent of {host} is not connected" for host in (source, to) if roster.get(host) is None]
    reasons += _strangers(roster, source, to)
    if source == to:
        reasons = [f"it is at {to} already"]
    missing = [port.mac for port in catalog.ports_of(vm) if not device_at(port, to)]
    reasons += [f"port {mac} has no device on {to}" for mac in missing]
    reasons += lacks(catalog, vm, to)
    if not 0 <= request.timeout_s <= TIMEOUT_MAX_S:  # also what is no number
        reasons.append(f"it cannot have {request.timeout_s:g} s")
    if request.move.copy_storage not in COPY_STORAGE:
        reasons.append(f"storage cannot be copied as {request.move.copy_storage!r}")
    if reasons:
        known = ", ".join(sorted(session.host for session in roster)) or "none"
        raise PreflightFailed(f"VM {vm} cannot be moved to {to}", reasons=reasons, hint=f"hosts connected: {known}")


def _strangers(roster: Roster, source: str, to: str) -> Iterator[str]:
    """Agents that have no protocol in common with each other, or with this coordinator."""
    told = {host: session.hello.protocol for host in (source, to) if (session := roster.get(host)) is not None}
    told["the coordinator"] = protocol.spoken()
    for (one, first), (other, second) in itertools.combinations(told.items(), 2):
        if protocol.common(first, second) is None:
            yield f"{one} speaks protocol {protocol.text(first)}, {other} speaks {protocol.text(second)}"


def spoken(run: Running, roster: Roster) -> pb.Protocol:
    """What both agents of a migration speak; the lowest of this version when one is away."""
    agreed = protocol.spoken()
    for host in (run.agreed.source, run.agreed.destination):
        session = roster.get(host)
        agreed = protocol.common(agreed, session.hello.protocol if session else pb.Protocol()) or agreed
    return agreed


def body(
    order: machine.Order, run: Running, catalog: Catalog, peer: str, speaking: pb.Protocol | None = None
) -> dict[str, Any]:
    """The order's field of ToAgent. `speaking`: see `spoken`."""
    agreed = run.agreed
    if order is machine.Order.DESCRIBE:
        return {"describe": pb.Describe(vm=agreed.vm, leaving=agreed.ordered_elsewhere)}
    if order is machine.Order.PREPARE:
        return {"prepare": _preparation(run, catalog, speaking)}
    start = pb.StartSource(
        migration=agreed.id,
        vm=agreed.vm,
        epoch=agreed.epoch,
        epochs=run.epochs,
        destination=agreed.destination,
        peer=peer,
        channel=agreed.channel,
        strict=agreed.strict,
        without_state=agreed.without_state,
        timeout_s=agreed.timeout_s,
        downtime_ms=agreed.downtime_ms,
        token=bytes.fromhex(agreed.token),
        ordered_elsewhere=agreed.ordered_elsewhere,
        move=json_format.ParseDict(agreed.move, pb.MoveOptions(), ignore_unknown_fields=True),
        protocol=speaking,
    )
    return {"start": start}


def _preparation(run: Running, catalog: Catalog, speaking: pb.Protocol | None) -> pb.PrepareDestination:
    agreed = run.agreed
    return pb.PrepareDestination(
        migration=agreed.id,
        vm=agreed.vm,
        epoch=agreed.epoch,
        need=run.need,
        source=agreed.source,
        channel=agreed.channel,
        devices={port.mac: device_at(port, agreed.destination) for port in catalog.ports_of(agreed.vm)},
        strict=agreed.strict,
        dry_run=run.machine.dry_run,
        without_state=agreed.without_state,
        token=bytes.fromhex(agreed.token),
        protocol=speaking,
    )


def verdict(run: Running, known: Verdict) -> pb.Verdict:
    at = run.agreed.host(known.guest_at) if known.guest_at else ""
    return pb.Verdict(migration=run.id, guest_at=at, committed=known.committed, opened=known.opened, gone=known.gone)


def changed_since(catalog: Catalog, run: Running) -> Iterator[pb.PortOrder]:
    """Orders for the staged instances of ports whose configuration changed after the source described them."""
    for port in catalog.ports_of(run.agreed.vm):
        order = catalog.order(port, host=run.agreed.destination, epoch=run.agreed.epoch)
        if order.revision > run.described_at:
            yield order


def missed(run: Running, role: Role, hello: pb.Hello) -> list[str]:
    """Words of Progress that the agent's instances stand for: it may have said them while nobody listened."""
    words: list[str] = []
    for instance in hello.instances:
        if instance.vm != run.agreed.vm:
            continue
        if role is Role.DESTINATION and instance.epoch == run.agreed.epoch:
            if instance.committed or instance.state == "active":
                words.append("committed")
            if instance.state == "active":
                words.append("opened")
        if role is Role.SOURCE and run.epochs.get(instance.mac) == instance.epoch:
            if instance.redirecting:
                words.append("redirecting")
            if instance.state == "stub":
                words.append("settled")
    return list(dict.fromkeys(words))


def copy(report: pb.Migration) -> pb.Migration:
    twin = pb.Migration()
    twin.CopyFrom(report)
    return twin
