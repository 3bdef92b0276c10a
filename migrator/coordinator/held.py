"""What a host would not see of a VM's configuration: kinds that its driver does not hold, rules that its agent reads as
wider than they are. A host that was never seen says nothing of what it holds."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.registry import KINDS
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.catalog import Catalog

_RULES = KINDS["acl"]


def missing_kinds(host: pb.Host | None, port: pb.Port) -> list[str]:
    """Kinds that are declared at the port and not held there."""
    if host is None or not host.kinds:
        return []
    return sorted(name for name in port.kinds if name not in host.kinds)


def unread_fields(host: pb.Host | None, policy: pb.Policy | None) -> list[str]:
    """Fields of the policy's rules that an older agent does not see: it would admit more than a rule says."""
    if host is None or not host.kinds or policy is None:
        return []
    known = host.kinds.get(_RULES.name, 0)
    newer = [name for name, version in _RULES.since.items() if version > known]
    return [name for name in newer if any(getattr(rule, name) for rule in policy.rules)]


def lacks(catalog: Catalog, vm: str, to: str) -> Iterator[str]:
    """Why the VM as it is configured now cannot go to a host, whatever its source has of that already."""
    host = catalog.hosts.get(to)
    policies: set[str] = set()
    for port in catalog.ports_of(vm):
        for kind in missing_kinds(host, port):
            yield f"host {to} holds no state of kind {kind} (port {port.mac})"
        policies.add(port.policy)
    for name in sorted(policies):
        for unread in unread_fields(host, catalog.policies.get(name))[:1]:
            yield f"the agent of {to} knows no rules with {unread} (policy {name})"
