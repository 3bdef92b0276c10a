"""The cluster's configuration, checked as a whole: what refers to what, and what each host is to have of it.

Pure: a catalogue is read from the journal's objects; `migrator.coordinator.change` plans what a request comes to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.journal import Entry, Write

SORTS: Mapping[str, type[Message]] = {
    "network": pb.Network,
    "address-set": pb.AddressSet,
    "policy": pb.Policy,
    "port": pb.Port,
    "place": pb.Place,
    "host": pb.Host,
    "migration": pb.Migration,
}
"""Sort of an object in the journal and in Watch -> its message."""


@dataclass
class Catalog:
    """All objects by sort and name, with the revision of their last change."""

    objects: dict[str, dict[str, Any]] = field(default_factory=lambda: {sort: {} for sort in SORTS})
    revisions: dict[tuple[str, str], int] = field(default_factory=dict)
    by_vm: dict[str, set[str]] = field(default_factory=dict)  # vm -> names of its ports
    configured: dict[str, int] = field(default_factory=dict)  # port -> revision since which it is as it is, wherever

    def take(self, entries: Iterable[Entry]) -> None:
        """Bring changes in, as the journal gave them."""
        for entry in entries:
            known = self.objects[entry.sort]
            if entry.sort == "port":
                self.by_vm.setdefault(entry.name.partition("/")[0], set()).discard(entry.name)
            if entry.body is None:
                known.pop(entry.name, None)
                self.revisions.pop((entry.sort, entry.name), None)
                continue
            before = known.get(entry.name)
            known[entry.name] = SORTS[entry.sort].FromString(entry.body)
            self.revisions[entry.sort, entry.name] = entry.revision
            if entry.sort == "port":
                self.by_vm[known[entry.name].vm].add(entry.name)
                if before is None or not _only_moved(before, known[entry.name]):
                    self.configured[entry.name] = entry.revision

    @property
    def networks(self) -> Mapping[str, pb.Network]:
        return self.objects["network"]

    @property
    def policies(self) -> Mapping[str, pb.Policy]:
        return self.objects["policy"]

    @property
    def sets(self) -> Mapping[str, pb.AddressSet]:
        return self.objects["address-set"]

    @property
    def ports(self) -> Mapping[str, pb.Port]:
        return self.objects["port"]

    @property
    def places(self) -> Mapping[str, pb.Place]:
        return self.objects["place"]

    @property
    def hosts(self) -> Mapping[str, pb.Host]:
        return self.objects["host"]

    def ports_of(self, vm: str) -> list[pb.Port]:
        return [self.ports[name] for name in sorted(self.by_vm.get(vm, ()))]

    def vm_named(self, word: str) -> str | None:
        """Uuid of the VM that `word` names (its uuid or its name), None when no port is declared for it."""
        if self.by_vm.get(word.lower()):
            return word.lower()
        return next((port.vm for port in self.ports.values() if port.name == word), None)

    def host_of(self, vm: str) -> str:
        return next((str(port.host) for port in self.ports_of(vm)), "")

    def epoch(self, port: pb.Port) -> int:
        """Epoch of the port's instance, as its place says; 0 when it has none."""
        place = self.places.get(f"{port.network}/{port.mac}")
        return int(place.epoch) if place is not None else 0

    def places_of(self, vm: str) -> list[pb.Place]:
        return [self.places[name] for name in self.place_names_of(vm) if name in self.places]

    def place_names_of(self, vm: str) -> list[str]:
        return [name for port in self.ports_of(vm) for name in place_names(port)]

    def place_revision(self, vm: str) -> int:
        """Revision since which the VM is where it is."""
        return max((self.revisions.get(("place", name), 0) for name in self.place_names_of(vm)), default=0)

    def order(self, port: pb.Port, *, host: str = "", epoch: int = 0) -> pb.PortOrder:
        """The port as an agent is to have it; `host` and `epoch` for an instance elsewhere than where the VM is."""
        copy = pb.Port()
        copy.CopyFrom(port)
        copy.host = host or port.host
        copy.timeouts_ms.update({**self._timeouts(port.policy), **port.timeouts_ms})
        return pb.PortOrder(
            port=copy,
            rules=self._resolved(port.policy),
            epoch=epoch or self.epoch(port),
            revision=self._order_revision(port),
            device=device_at(port, copy.host),
        )

    def _timeouts(self, policy: str) -> Mapping[str, int]:
        """What a policy says for the ports that do not say it themselves."""
        return self.policies[policy].timeouts_ms if policy else {}

    def _resolved(self, policy: str) -> Iterator[pb.Rule]:
        """Rules with prefixes for address sets. A rule whose sets are all empty matches nothing: it is left out, for
        an empty `remote` would match everything."""
        for rule in self.policies[policy].rules if policy else ():
            resolved = pb.Rule()
            resolved.CopyFrom(rule)
            del resolved.remote[:]
            prefixes = (p for item in rule.remote for p in self._prefixes(item))
            resolved.remote.extend(dict.fromkeys(prefixes))
            if resolved.remote or not rule.remote:
                yield resolved

    def _prefixes(self, item: str) -> Sequence[str]:
        return self.sets[item[1:]].prefixes if item.startswith("@") else (item,)

    def _order_revision(self, port: pb.Port) -> int:
        parts = [("network", port.network)]
        if port.policy:
            parts.append(("policy", port.policy))
            parts += [("address-set", name) for name in sets_of(self.policies[port.policy])]
        return max(self.configured.get(f"{port.vm}/{port.mac}", 0), *(self.revisions.get(part, 0) for part in parts))

    def ports_touched(self, entries: Iterable[Entry]) -> list[pb.Port]:
        """Ports whose order these changes alter."""
        changed = {(entry.sort, entry.name) for entry in entries}
        policies = {name for sort, name in changed if sort == "policy"}
        sets = {name for sort, name in changed if sort == "address-set"}
        if sets:  # nobody reads all rules of the cluster for a change that has nothing to do with them
            policies |= {name for name, policy in self.policies.items() if not sets.isdisjoint(sets_of(policy))}
        return [
            port
            for name, port in self.ports.items()
            if ("port", name) in changed or ("network", port.network) in changed or port.policy in policies
        ]

    def config(self, revision: int) -> pb.Config:
        return pb.Config(
            networks=self.networks.values(),
            address_sets=self.sets.values(),
            policies=self.policies.values(),
            ports=self.ports.values(),
            revision=revision,
        )


def _only_moved(before: pb.Port, after: pb.Port) -> bool:
    probe = pb.Port()
    probe.CopyFrom(after)
    probe.host = before.host
    return probe == before


def sets_of(policy: pb.Policy) -> set[str]:
    """Names of the address sets that a policy's rules name."""
    return {item[1:] for rule in policy.rules for item in rule.remote if item.startswith("@")}


def networks_of(port: pb.Port) -> list[str]:
    return list(dict.fromkeys([port.network, *port.trunk.values()]))


def place_names(port: pb.Port) -> list[str]:
    return [f"{network}/{port.mac}" for network in networks_of(port)]


def device_at(port: pb.Port, host: str) -> str:
    """Device of the port on a host, "" when none is declared."""
    pattern = str(port.devices.get(host, port.device))
    return pattern.replace("{vm8}", port.vm[:8]).replace("{mac6}", port.mac.replace(":", "")[-6:])


def place_writes(port: pb.Port, host: str, epoch: int) -> list[Write]:
    """The places of a port whose VM is at `host`."""
    places = [pb.Place(network=name, mac=port.mac, host=host, vm=port.vm, epoch=epoch) for name in networks_of(port)]
    return [Write("place", f"{place.network}/{place.mac}", place.SerializeToString()) for place in places]


def moved_writes(catalog: Catalog, vm: str, host: str, epoch: int) -> list[Write]:
    """What changes when a VM's ports are at `host` as instances of `epoch`."""
    writes: list[Write] = []
    for port in catalog.ports_of(vm):
        moved = pb.Port()
        moved.CopyFrom(port)
        moved.host = host
        writes.append(Write("port", f"{port.vm}/{port.mac}", moved.SerializeToString()))
        writes += place_writes(port, host, epoch)
    return writes
