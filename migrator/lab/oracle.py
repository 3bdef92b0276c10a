# SPDX-License-Identifier: GPL-2.0-only
"""What is really there: connection tables read back through the agents, and all that a VM may leave on a host."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.state.conntrack import CONNTRACK, STATES
from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.cluster import Cluster
from migrator.lab.machines import Machine
from migrator.snapshot import decode_section

_NAMES = {number: name for name, number in STATES.items()}


@dataclass(frozen=True)
class Connection:
    """One tracked connection, for comparison and for people."""

    protocol: int
    local: str
    local_port: int
    remote: str
    remote_port: int
    state: str
    id: int


def columns(cluster: Cluster, host: str, machine: Machine) -> dict[str, NDArray[Any]]:
    """The connection table of a VM on a host, as columns; fragment records are left out."""
    request = pb.VmRequest(vm=machine.uuid, kind=CONNTRACK.name)
    tables = []
    for chunk in cluster.agent_stub(host).Dump(request, timeout=30):
        table = decode_section(chunk.data).table
        if table is not None and table.columns is not None:
            tables.append(table.columns)
    joined = {name: np.concatenate([t[name] for t in tables]) for name in (tables[0] if tables else {})}
    if not joined:
        return {name: np.zeros(0, dtype=column.dtype) for name, column in CONNTRACK.columns.items()}
    wanted = joined["type"] == 0
    return {name: values[wanted] for name, values in joined.items()}


def connections(cluster: Cluster, host: str, machine: Machine) -> set[Connection]:
    """The same as objects: for tables of a few thousand."""
    return set(_rows(columns(cluster, host, machine)))


def keys(table: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Keys with their connection ids as bytes, sorted: equal arrays are equal tables."""
    count = len(table["id"])
    parts = [np.ascontiguousarray(table[name]).view(np.uint8).reshape(count, -1) for name in (*CONNTRACK.key, "id")]
    end = np.ones((count, 1), dtype=np.uint8)  # NumPy compares byte strings without the zeroes at their end
    rows = np.ascontiguousarray(np.hstack([*parts, end]))
    return np.sort(rows.view(f"S{rows.shape[1]}").ravel())


def _rows(table: dict[str, NDArray[Any]]) -> Iterator[Connection]:
    for n in range(len(table["proto"])):
        yield Connection(
            int(table["proto"][n]),
            _address(table["laddr"][n]),
            int(table["lport"][n]),
            _address(table["raddr"][n]),
            int(table["rport"][n]),
            _NAMES.get(int(table["state"][n]), str(table["state"][n])),
            int(table["id"][n]),
        )


def _address(value: Any) -> str:
    packed = ipaddress.IPv6Address(bytes(value).ljust(16, b"\0"))
    return str(packed.ipv4_mapped or packed)


def traces(cluster: Cluster, host: str) -> dict[str, list[str]]:
    """Everything of VMs on a host that one can see: the switch's own list, devices, filters, pins."""
    found = dict(cluster.remains(host))
    links = json.loads(netns.ip("-j", "link", namespace=cluster.name(host)) or "[]")
    found["links"] = sorted(link["ifname"] for link in links)
    pins = cluster.directory / host / "bpf"
    found["pinned files"] = sorted(str(p.relative_to(pins)) for p in pins.rglob("*"))
    return found


def difference(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """What one listing has and the other has not; [] when they are equal."""
    return [
        f"{sort}: {sign}{name}"
        for sort in sorted({*before, *after})
        for sign, one, other in (("+", after, before), ("-", before, after))
        for name in sorted(set(one.get(sort, [])) - set(other.get(sort, [])))
    ]
