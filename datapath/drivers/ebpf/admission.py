"""Why this host cannot take certain ports, said before a VM moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from datapath.drivers.ebpf.acl import RULES_MAX
from datapath.drivers.ebpf.instances import Instances
from datapath.drivers.ebpf.networks import Networks
from datapath.drivers.ebpf.records import CONNECTIONS_LIMIT
from datapath.provider import Need
from datapath.state.kind import Record

_ENTRY_BYTES = 256  # key, value and the kernel's element, NO_PREALLOC
_BUCKET_BYTES = 16
_MEMINFO = Path("/proc/meminfo")


def obstacles(need: Need, kinds: Mapping[str, int], networks: Networks, instances: Instances) -> list[str]:
    """Each a sentence that names the thing; [] when there is none."""
    found = [*_kinds(need, kinds), *_room(need, instances)]
    for record in need.records:
        found += _port(record, networks)
    return found


def _kinds(need: Need, kinds: Mapping[str, int]) -> Iterator[str]:
    for kind, version in need.kinds.items():
        if kind not in kinds:
            yield f"The driver ebpf cannot hold state of kind {kind}."
        elif version > kinds[kind]:
            yield f"Kind {kind} has version {version}, this host knows up to {kinds[kind]}."


def _room(need: Need, instances: Instances) -> Iterator[str]:
    if len(need.records) > instances.free():
        yield f"The VM has {len(need.records)} ports, {instances.free()} slots are free."
    if need.rules_max > RULES_MAX:
        yield f"A policy has {need.rules_max} rules, the switch holds {RULES_MAX}."
    wanted, free = table_bytes(need.connections), available_bytes()
    if wanted > free:
        yield f"Tables for {need.connections} connections take {wanted >> 20} MiB, {free >> 20} MiB are available."


def _port(record: Record, networks: Networks) -> Iterator[str]:
    mac, mtu = record.get("mac", "?"), int(record.get("mtu", 0))
    for name in {str(record.get("network", "")), *record.get("trunk", {}).values()}:
        if not networks.has(name):
            yield f"Port {mac} is on network {name}, which this host does not have."
            continue
        network = networks.get(networks.index(name))
        if network is not None and mtu > network.mtu:
            yield f"Port {mac} has MTU {mtu}, network {name} carries {network.mtu} here."
    if int(record.get("connections_max", 0)) > CONNECTIONS_LIMIT:
        yield f"Port {mac} has {record['connections_max']} connections at most, the switch holds {CONNECTIONS_LIMIT}."


def table_bytes(connections: int) -> int:
    """Roughly what full tables take."""
    return connections * (_ENTRY_BYTES + _BUCKET_BYTES)


def available_bytes() -> int:
    """MemAvailable."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
