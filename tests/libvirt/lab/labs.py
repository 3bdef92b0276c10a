# SPDX-License-Identifier: GPL-2.0-only
"""Labs whose hosts have a libvirtd: one with plain bridges, one with the cluster's agents and coordinator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from migrator.lab import netns
from migrator.lab.cluster import Cluster
from migrator.lab.processes import Daemon
from migrator.lab.topology import Lab

from .host import PLACES, HostDaemon, LibvirtHost

BRIDGE = "br0"


class LibvirtLab(Lab):
    """Hosts with a libvirtd each and nothing of the migrator: `bridge()` gives them a bridge on the fabric."""

    def __init__(self, hosts: Sequence[str] = ("h1", "h2")) -> None:
        super().__init__(hosts)
        self.hosts: dict[str, LibvirtHost] = {}

    def _build(self) -> None:
        super()._build()
        for name in self.host_names:
            self.hosts[name] = LibvirtHost(self, name)
            self.hosts[name].start_libvirtd(wait=False)
        for host in self.hosts.values():
            host.wait_for_libvirtd()

    def bridge(self) -> str:
        """A Linux bridge on each host, on the fabric by a wire of its own; its name."""
        for name in self.host_names:
            netns.set_sysctl(self.name(name), "net/ipv4/conf/all/arp_ignore", 1)  # the bridge does not answer for up0
            self.wire(name, "up1", "fabric", f"{name}-bridge")
            netns.ip_batch(self.name("fabric"), [f"link set {name}-bridge master br0 up"])
            netns.ip_batch(self.name(name), [f"link add {BRIDGE} type bridge", f"link set up1 master {BRIDGE} up"])
            netns.ip("link", "set", BRIDGE, "up", namespace=self.name(name))
        return BRIDGE


class LibvirtCluster(Cluster):
    """A cluster in which `machines` are libvirt hosts: their agents run in the same namespaces as libvirtd.

    The other hosts are as in any cluster: for peers. `guests` is the agents' section of that name on libvirt hosts.
    """

    def __init__(
        self,
        hosts: Sequence[str] = ("h1", "h2", "h3"),
        machines: Sequence[str] = ("h1", "h2"),
        guests: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(hosts, **options)
        self.machine_names = tuple(machines)
        self.guests = dict(guests or {"driver": "none"})
        self.hosts: dict[str, LibvirtHost] = {}

    def _mount_bpffs(self, host: str) -> None:
        """A host's mounts are a copy of those that are there when it is made."""
        super()._mount_bpffs(host)
        if host in self.machine_names:
            self.hosts[host] = LibvirtHost(self, host)
            self.hosts[host].start_libvirtd()

    def _agent_config(self, host: str) -> dict[str, Any]:
        config = super()._agent_config(host)
        return {**config, "guests": self.guests} if host in self.machine_names else config

    def _daemon(self, name: str, namespace: str, arguments: Sequence[str]) -> Daemon:
        daemon = super()._daemon(name, namespace, arguments)
        if namespace not in self.hosts:
            return daemon
        inside = HostDaemon(self.hosts[namespace], name, daemon.command)
        self.stack.callback(inside.stop)
        return inside


AnyLab = LibvirtLab | LibvirtCluster


def host_path(lab: AnyLab, host: str, inside: str) -> Path:
    """Where a file below one of a host's own places (`PLACES`) is seen from outside."""
    place = max((place for place in PLACES if inside.startswith(f"{place}/")), key=len)
    return lab.hosts[host].directory / PLACES[place] / Path(inside).relative_to(place)
