"""What a request to change the configuration comes to: every object checked against all others, then the writes.

Nothing here applies anything. A request that is wrong anywhere raises and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.catalog import Catalog, device_at, networks_of, place_names, place_writes, sets_of
from migrator.coordinator.claims import check_claims
from migrator.coordinator.held import missing_kinds, unread_fields
from migrator.coordinator.journal import Entry, Journal, Write
from migrator.errors import AlreadyMigrating, ConfigInvalid, ObjectNotFound

RULE_COUNTER = "rule"
RULE_ID_MAX = (1 << 32) - 1
_ON_ITS_WAY = "the VM is being moved there, wait for the end of it or abort it"


def epoch_counter(vm: str) -> str:
    """Name of the counter that gives a VM's epochs."""
    return f"epoch/{vm}"


@dataclass
class Planned:
    """Writes of a request, counters they need, and what to tell the operator."""

    writes: list[Write] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def put(self, catalog: Catalog, sort: str, name: str, message: Any) -> None:
        """Write `message` if it differs from what is there."""
        known = catalog.objects[sort].get(name)
        if known == message:
            return
        self.writes.append(Write(sort, name, message.SerializeToString(deterministic=True)))
        self.changed.append(f"{sort} {name}: {'added' if known is None else 'changed'}")


class Counters:
    """Reads counters that a plan has already raised, and the journal's for the others."""

    def __init__(self, planned: Planned, journal: Journal) -> None:
        self._planned, self._journal = planned, journal

    def next(self, name: str) -> int:
        self._planned.counters[name] = self.value(name) + 1
        return self._planned.counters[name]

    def value(self, name: str) -> int:
        return self._planned.counters.get(name) or self._journal.counter(name)

    def before(self, name: str) -> int:
        """Value before this plan."""
        return self._journal.counter(name)

    def once(self, name: str) -> int:
        """One new value for the whole plan."""
        return self.value(name) if self.value(name) > self.before(name) else self.next(name)

    def at_least(self, name: str, value: int) -> None:
        self._planned.counters[name] = max(value, self.value(name))


Running = Mapping[tuple[str, str, str], int]
"""(vm, mac, host) -> epoch of the active instance that the host's agent has."""

Moving = Mapping[str, str]
"""VM that is being moved -> the host where it is to go."""


def plan_apply(catalog: Catalog, wanted: config.Config, journal: Journal, moving: Moving, running: Running) -> Planned:
    """Writes that make `wanted` so; what it does not name stays.

    Raises ConfigInvalid or AlreadyMigrating.
    """
    planned = Planned()
    counters = Counters(planned, journal)
    _refuse_twins(wanted)
    for network in wanted.networks:
        planned.put(catalog, "network", network.name, config.to_message(network))
    for address_set in wanted.address_sets:
        planned.put(catalog, "address-set", address_set.name, config.to_message(address_set))
    for policy in wanted.policies:
        planned.put(catalog, "policy", policy.name, _with_ids(catalog, policy, counters))
    for port in wanted.ports:
        message = config.to_message(port)
        _plan_port(catalog, message, planned, moving)
        _plan_places(catalog, message, planned, counters, running)
    _check(outcome(catalog, planned), planned, moving)
    return planned


def plan_removal(catalog: Catalog, sort: str, name: str, moving: Moving) -> Planned:
    """Writes that remove one object.

    Raises ObjectNotFound, ConfigInvalid (something still refers to it) or AlreadyMigrating.
    """
    if sort not in ("network", "address-set", "policy", "port", "host"):
        raise ConfigInvalid(f"{sort!r} is no sort of object", hint="network, address-set, policy, port or host")
    if sort == "port":
        name = "/".join(part.lower() for part in name.split("/"))
    known = catalog.objects[sort].get(name)
    if known is None:
        raise ObjectNotFound(f"no {sort} {name!r}")
    users = _users(catalog, sort, name)
    if users:
        raise ConfigInvalid(f"{sort} {name} is in use by {', '.join(users[:5])}", hint="remove or change these first")
    planned = Planned(writes=[Write(sort, name, None)], changed=[f"{sort} {name}: removed"])
    if sort == "port":
        _refuse_moving(known.vm, moving)
        planned.writes += [Write("place", place, None) for place in place_names(known) if place in catalog.places]
    return planned


def _users(catalog: Catalog, sort: str, name: str) -> list[str]:
    if sort == "address-set":
        return [f"policy {policy.name}" for policy in catalog.policies.values() if name in sets_of(policy)]
    if sort == "host" and catalog.hosts[name].connected:
        return ["its agent, which is connected"]
    return [f"port {key}" for key, port in catalog.ports.items() if _uses(port, sort, name)]


def _uses(port: pb.Port, sort: str, name: str) -> bool:
    if sort == "network":
        return name in networks_of(port)
    if sort == "host" and port.declared_by:  # whichever host starts it next declares it
        return False
    return bool(name == {"policy": port.policy, "host": port.host}.get(sort))


def _refuse_twins(wanted: config.Config) -> None:
    for sort, names in (
        ("network", [network.name for network in wanted.networks]),
        ("address set", [address_set.name for address_set in wanted.address_sets]),
        ("policy", [policy.name for policy in wanted.policies]),
        ("port", [port.key for port in wanted.ports]),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigInvalid(f"{sort} {twice[0]} is given twice")


def _refuse_moving(vm: str, moving: Moving) -> None:
    if vm in moving:
        raise AlreadyMigrating(f"VM {vm} is being moved: its ports cannot be added or removed", hint="wait for its end")


def _with_ids(catalog: Catalog, policy: config.Policy, counters: Counters) -> pb.Policy:
    """The policy with an id for each rule: an unchanged rule keeps its own, so that its hits stay with it."""
    message: pb.Policy = config.to_message(policy)
    known = catalog.policies.get(policy.name)
    given = {rule.id for rule in message.rules if rule.id}
    if given:  # all rules of the cluster are looked at only for ids that an operator names
        _refuse_taken(catalog, policy.name, given)
    counters.at_least(RULE_COUNTER, max(given, default=0))
    free = [rule for rule in (known.rules if known else ()) if rule.id not in given]
    for rule in message.rules:
        if rule.id:
            continue
        same = next((old for old in free if _same_but_id(old, rule)), None)
        if same is None:
            rule.id = _free_id(counters, catalog, message)
        else:
            free.remove(same)
            rule.id = same.id
    return message


def _refuse_taken(catalog: Catalog, policy: str, given: Set[int]) -> None:
    elsewhere = _owners(catalog, policy)
    for number in given & elsewhere.keys():
        raise ConfigInvalid(
            f"policy {policy}: rule id {number} belongs to policy {elsewhere[number]}", hint="leave the id out"
        )


def _owners(catalog: Catalog, policy: str) -> dict[int, str]:
    """Rule id -> its policy, of all other policies."""
    return {rule.id: name for name, other in catalog.policies.items() if name != policy for rule in other.rules}


def _free_id(counters: Counters, catalog: Catalog, policy: pb.Policy) -> int:
    """The next one; when somebody has named the highest, so that there is no next, the lowest that is free."""
    number = counters.next(RULE_COUNTER)
    if number <= RULE_ID_MAX:
        return number
    taken = _owners(catalog, policy.name).keys() | {rule.id for rule in policy.rules}
    return next(n for n in count(1) if n not in taken)


def _same_but_id(old: pb.Rule, new: pb.Rule) -> bool:
    probe = pb.Rule()
    probe.CopyFrom(new)
    probe.id = old.id
    return probe == old


def _plan_port(catalog: Catalog, port: pb.Port, planned: Planned, moving: Moving) -> None:
    key = f"{port.vm}/{port.mac}"
    known = catalog.ports.get(key)
    if known is None:
        _refuse_moving(port.vm, moving)
        port.host = port.host or catalog.host_of(port.vm)
    else:
        if known.network != port.network:
            raise ConfigInvalid(
                f"port {key}: network {known.network} cannot become {port.network}", hint="remove the port, then add it"
            )
        if port.host not in ("", known.host):
            planned.warnings.append(f"port {key}: stays at {known.host}, only migrate moves a VM (not to {port.host})")
        port.host = known.host
    planned.put(catalog, "port", key, port)


def _plan_places(catalog: Catalog, port: pb.Port, planned: Planned, counters: Counters, running: Running) -> None:
    known = catalog.ports.get(f"{port.vm}/{port.mac}")
    epoch = catalog.epoch(known) if known is not None else _new_epoch(port, counters, running)
    gone = set(place_names(known)) - set(place_names(port)) if known is not None else set()
    planned.writes += [Write("place", name, None) for name in sorted(gone)]
    for write in place_writes(port, port.host, epoch):
        place = catalog.places.get(write.name)
        if place is None or (place.vm == port.vm and place.SerializeToString() != write.body):
            planned.writes.append(write)


def _new_epoch(port: pb.Port, counters: Counters, running: Running) -> int:
    """Epoch of a port's first instance: the ports of a VM that are declared together have the same.

    An instance that runs there already and that the journal never knew, for an earlier journal was lost, is taken over
    as it is: its connections live on.
    """
    name = epoch_counter(port.vm)
    found = running.get((port.vm, port.mac, port.host), 0)
    if found <= counters.before(name):
        return counters.once(name)
    counters.at_least(name, found)
    return found


def outcome(catalog: Catalog, planned: Planned) -> Catalog:
    """The catalogue as it would be, sharing what does not change."""
    after = Catalog(
        {sort: dict(known) for sort, known in catalog.objects.items()},
        {},
        {vm: set(names) for vm, names in catalog.by_vm.items()},
    )
    after.take(Entry(0, write.sort, write.name, write.body) for write in planned.writes)
    return after


def _check(after: Catalog, planned: Planned, moving: Moving) -> None:
    _check_networks(after)
    for policy in (after.policies[write.name] for write in planned.writes if write.sort == "policy"):
        for name in sorted(sets_of(policy) - after.sets.keys()):
            raise ConfigInvalid(f"policy {policy.name}: there is no address set {name}")
    owners: dict[str, str] = {}
    addresses: dict[tuple[str, str], str] = {}
    for key, port in after.ports.items():
        _check_port(after, key, port)
        for place in place_names(port):
            if place in owners:
                raise ConfigInvalid(f"port {key}: MAC {port.mac} is in its network already, at port {owners[place]}")
            owners[place] = key
        for address in port.addresses:
            other = addresses.setdefault((port.network, address), key)
            if other != key:
                planned.warnings.append(f"port {key}: address {address} is also port {other}'s")
    _check_vms(after, planned)
    changed = frozenset(write.name for write in planned.writes if write.sort == "port")
    _check_rules(after, {write.name for write in planned.writes if write.sort == "policy"}, changed, moving)
    for port in (after.ports[name] for name in changed if name in after.ports):
        _check_kinds(after, port, moving.get(port.vm, port.host))
    planned.warnings += check_claims(after.ports.values(), changed)


def _check_networks(after: Catalog) -> None:
    taken: dict[tuple[object, ...], str] = {}
    for network in after.networks.values():
        if network.kind == "local":
            continue
        wire = ("vlan", network.vlan, "on", network.uplink or "the uplink")
        tag = ("vni", network.vni) if network.kind == "overlay" else wire
        other = taken.setdefault(tag, network.name)
        if other != network.name:
            raise ConfigInvalid(f"network {network.name}: {' '.join(map(str, tag))} is network {other}'s already")


def _check_port(after: Catalog, key: str, port: pb.Port) -> None:
    for name in networks_of(port):
        if name not in after.networks:
            raise ConfigInvalid(f"port {key}: there is no network {name}")
    _check_mtu(after, key, port)
    if port.policy and port.policy not in after.policies:
        raise ConfigInvalid(f"port {key}: there is no policy {port.policy}")
    if not port.host:
        raise ConfigInvalid(f"port {key}: host is missing", hint="name the host where the VM is")
    _check_kinds(after, port, port.host)
    if not device_at(port, port.host):
        raise ConfigInvalid(f"port {key}: no device on host {port.host}", hint="give device, or devices with that host")


def _check_kinds(after: Catalog, port: pb.Port, at: str) -> None:
    """`at`: where the VM is, or is to go."""
    host = after.hosts.get(at)
    missing = missing_kinds(host, port)
    if host is not None and missing:
        held = f"its driver {host.driver} holds {', '.join(sorted(host.kinds))}"
        raise ConfigInvalid(
            f"port {port.vm}/{port.mac}: host {at} holds no state of kind {missing[0]}",
            hint=held if at == port.host else f"{held}; {_ON_ITS_WAY}",
        )


def _check_rules(after: Catalog, policies: Set[str], ports: Set[str], moving: Moving) -> None:
    unread: dict[tuple[str, str], list[str]] = {}
    for key, port in after.ports.items():
        if key not in ports and port.policy not in policies:
            continue
        for at in dict.fromkeys((port.host, moving.get(port.vm, port.host))):
            host, known = after.hosts.get(at), (at, port.policy)
            if known not in unread:
                unread[known] = unread_fields(host, after.policies.get(port.policy))
            if host is not None and unread[known]:
                upgrade = f"its version is {host.version or 'unknown'}: upgrade it before such rules are declared"
                raise ConfigInvalid(
                    f"policy {port.policy}: the agent of {at} (port {key}) knows no rules with {unread[known][0]}",
                    hint=upgrade if at == port.host else f"{upgrade}; {_ON_ITS_WAY}",
                )


def _check_mtu(after: Catalog, key: str, port: pb.Port) -> None:
    """A host refuses such a port when it comes to it: the VM could not move."""
    carried = {name: after.networks[name].mtu or config.MTU_DEFAULT for name in networks_of(port)}
    mtu = port.mtu or carried[port.network]
    for name in carried:
        if mtu > carried[name]:
            hint = f"give the port an mtu of at most {carried[name]}, or the network a larger one"
            raise ConfigInvalid(f"port {key}: MTU {mtu}, and network {name} carries {carried[name]}", hint=hint)


def _check_vms(after: Catalog, planned: Planned) -> None:
    named: dict[str, str] = {}
    for vm, keys in after.by_vm.items():
        ports = [after.ports[key] for key in keys]
        hosts = sorted({port.host for port in ports})
        if len(hosts) > 1:
            raise ConfigInvalid(f"VM {vm}: its ports name hosts {' and '.join(hosts)}; a VM is on one host")
        for name in {port.name for port in ports if port.name}:
            if named.setdefault(name, vm) != vm:
                raise ConfigInvalid(f"VM name {name} is {named[name]}'s and {vm}'s")
    unknown: Mapping[str, None] = {p.host: None for p in after.ports.values() if p.host not in after.hosts}
    planned.warnings += [f"host {name} has no agent yet" for name in unknown]
