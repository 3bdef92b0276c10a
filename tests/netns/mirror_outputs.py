# SPDX-License-Identifier: GPL-2.0-only
"""Outputs of mirrors on a lab's fabric: VLANs that it floods and learns nothing from, a collector behind a router.

Each is a context manager that gives what goes into a mirror's document, by name, and a capture of what comes there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.cluster import Cluster
from migrator.lab.topology import UNDERLAY_MTU

from .captures import Capture, Captures

COLLECTOR, ROUTER = "198.51.100.9", "10.66.0.200"
VLAN, VNI = 301, 7701  # the first ones
LARGE = 9000


@dataclass(frozen=True)
class There:
    """An output as the document has it, and tcpdump where its copies come."""

    output: Mapping[str, Any]
    capture: Capture


@contextlib.contextmanager
def vlans(cluster: Cluster, watch: Captures, names: Sequence[str]) -> Iterator[dict[str, There]]:
    """RSPAN: a VLAN of the uplinks for each name."""
    fabric, behind = cluster.name("fabric"), cluster.namespace("rspan")
    made = {name: VLAN + number for number, name in enumerate(names)}
    for vlan in made.values():
        cluster.wire("fabric", f"s{vlan}", "rspan", f"r{vlan}")
        for device, place in ((f"s{vlan}", fabric), (f"r{vlan}", behind)):
            netns.ip("link", "set", device, "mtu", str(LARGE), "up", namespace=place)
    with contextlib.ExitStack() as stack:
        netns.run(netns.inside(fabric, ["nft", "-f", "-"]), _flooding(cluster.host_names, made.values()))
        stack.callback(netns.run, netns.inside(fabric, ["nft", "delete", "table", "netdev", "rspan"]))
        for name, vlan in made.items():
            cluster.apply(networks=[{"name": name, "kind": "uplink", "vlan": vlan, "uplink": "up0"}])
            stack.callback(_forget, cluster, name)
        yield {
            name: There({"network": name}, watch.on(behind, f"r{vlan}", "", outer_tag=True))
            for name, vlan in made.items()
        }


def _flooding(hosts: Sequence[str], vlans: Iterable[int]) -> str:
    """What a host sends into a VLAN comes to its recorder and to all other hosts, past what the bridge learns."""
    lines = ["table netdev rspan {"]
    for host in hosts:
        lines += [f"chain {host} {{", f'type filter hook ingress device "{host}" priority 0']
        for vlan in vlans:
            lines += [f'vlan id {vlan} dup to "{other}"' for other in hosts if other != host]
            lines.append(f'vlan id {vlan} fwd to "s{vlan}"')
        lines.append("}")
    return "\n".join([*lines, "}", ""])


def _forget(cluster: Cluster, network: str) -> None:
    with contextlib.suppress(grpc.RpcError):  # the test has failed and left a port that names it
        cluster.coordinator_stub().Remove(pb.Removal(sort="network", name=network), timeout=10)


@contextlib.contextmanager
def collector(cluster: Cluster, watch: Captures, names: Sequence[str]) -> Iterator[dict[str, There]]:
    """A machine with the kernel's own VXLAN devices, one for each name, at an address that hosts have a route to."""
    place, fabric = cluster.namespace("collector"), cluster.name("fabric")
    cluster.wire("fabric", "col", "collector", "up0")
    netns.ip_batch(fabric, [f"link set col master br0 mtu {UNDERLAY_MTU} up"])
    lines = [f"link set up0 mtu {UNDERLAY_MTU} up", f"addr add {ROUTER}/24 dev up0", f"addr add {COLLECTOR} dev lo"]
    made = {name: VNI + number for number, name in enumerate(names)}
    for vni in made.values():
        lines.append(f"link add vx{vni} type vxlan id {vni} dstport 4789 local {COLLECTOR}")
        lines.append(f"link set vx{vni} up")
    netns.ip_batch(place, lines)
    with routed(cluster, *cluster.host_names):
        yield {
            name: There({"remote": {"address": COLLECTOR, "vni": vni}}, watch.on(place, f"vx{vni}", ""))
            for name, vni in made.items()
        }


@contextlib.contextmanager
def routed(cluster: Cluster, *hosts: str) -> Iterator[None]:
    """The collector's address has a way there from these hosts."""
    with contextlib.ExitStack() as stack:
        for host in hosts:
            way = [f"{COLLECTOR}/32", "via", ROUTER]
            netns.ip("route", "add", *way, namespace=cluster.name(host))
            stack.callback(netns.ip, "route", "del", *way, namespace=cluster.name(host))
        yield
