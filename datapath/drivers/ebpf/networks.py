"""Networks of this host: their indexes, tags and tunnel ids, and who of this host is flooded to in each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from datapath.drivers.ebpf.floods import Floods, Member
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.ledger import Ledger
from datapath.drivers.ebpf.uplinks import Uplinks
from datapath.errors import NotReady, UnsupportedKind
from datapath.provider import Network, NetworkKind

VNI_MAX = (1 << 24) - 1


class Networks:
    """`peers` gives the indexes of hosts that an overlay floods to, `room` the largest packet that one may have."""

    def __init__(
        self,
        kernel: Kernel,
        ledger: Ledger,
        uplinks: Uplinks,
        floods: Floods,
        peers: Callable[[], Sequence[int]],
        room: Callable[[], int],
    ) -> None:
        self._kernel, self._ledger, self._uplinks, self._floods, self._peers = kernel, ledger, uplinks, floods, peers
        self._room = room
        self._known = ledger.networks()
        self._lock = threading.RLock()

    def restore(self) -> None:
        """Bring what the ledger has into the maps."""
        for index, network in self._known.items():
            self._floods.restore(index)
            self._program(index, network)

    def all(self) -> list[Network]:
        with self._lock:
            return [self._known[index] for index in sorted(self._known)]

    def index(self, name: str) -> int:
        """Raises UnsupportedKind when there is no such network here."""
        with self._lock:
            for index, network in self._known.items():
                if network.name == name:
                    return index
        raise UnsupportedKind(f"there is no network {name!r} on this host", hint="add it to the host's configuration")

    def get(self, index: int) -> Network | None:
        return self._known.get(index)

    def known(self) -> dict[int, Network]:
        """Index -> network."""
        return dict(self._known)

    def uplink_ifindex(self, network: Network) -> int:
        return self._uplinks.ifindex(network.uplink)

    def has(self, name: str) -> bool:
        return any(network.name == name for network in self._known.values())

    def set(self, network: Network) -> None:
        """Make or change a network. Raises UnsupportedKind saying why it cannot be carried; then nothing changed."""
        if network.kind is NetworkKind.UPLINK and not network.uplink:
            network = replace(network, uplink=self._uplinks.first())
        with self._lock:
            self._check(network)
            index = next((i for i, known in self._known.items() if known.name == network.name), None)
            before = self._known.get(index) if index is not None else None
            if before is not None and index is not None and not _same_way(before, network):
                self._floods.discard(lambda i, member: i != index or member[0] == C.L2_PORT)
            if index is None:
                index = self._free()
                self._floods.create(index)
            self._program(index, network)
            if before is not None:
                self._clear_keys(before, network)
            self._known[index] = network
            self._ledger.save_networks(self._known)

    def remove(self, name: str) -> int:
        """Returns the index that is free now. Raises UnsupportedKind when it is not here."""
        with self._lock:
            index = self.index(name)
            self._clear_keys(self._known[index], None)
            self._kernel.networks.set(index, np.zeros((), self._kernel.networks.value))
            self._floods.remove(index)
            del self._known[index]
            self._ledger.save_networks(self._known)
            return index

    def hosts_changed(self) -> None:
        """Overlays flood to the hosts that are now."""
        peers = set(self._peers())
        overlays = [i for i, n in self._known.items() if n.kind is NetworkKind.OVERLAY]
        self._floods.add((index, (C.L2_TUNNEL, 0, peer)) for index in overlays for peer in peers)
        self._floods.discard(lambda _, member: member[0] != C.L2_TUNNEL or member[2] in peers)

    def uplink_changed(self, uplink: str) -> None:
        """The interface was made anew: program its networks with the new index."""
        with self._lock:
            for index, network in self._known.items():
                if network.uplink == uplink and network.kind is NetworkKind.UPLINK:
                    self._floods.discard(_but_uplinks_of(index))
                    self._program(index, network)

    def _free(self) -> int:
        for index in range(1, self._kernel.networks.entries):
            if index not in self._known:
                return index
        raise UnsupportedKind(
            f"more than {self._kernel.networks.entries - 1} networks", hint="raise the driver's option `networks`"
        )

    # ---- what cannot be carried ----

    def _check(self, network: Network) -> None:
        others = [known for known in self._known.values() if known.name != network.name]
        if not 68 <= network.mtu <= 65_535:
            raise UnsupportedKind(f"network {network.name}: mtu {network.mtu} is not in 68..65535")
        if network.kind is NetworkKind.UPLINK:
            self._check_uplink(network, others)
        elif network.kind is NetworkKind.OVERLAY:
            self._check_overlay(network, others)

    def _check_uplink(self, network: Network, others: list[Network]) -> None:
        if not 0 <= network.vlan <= 4094:
            raise UnsupportedKind(f"network {network.name}: VLAN {network.vlan} is not in 0..4094")
        self._uplinks.check(network.uplink)
        for other in others:
            if other.kind is NetworkKind.UPLINK and (other.uplink, other.vlan) == (network.uplink, network.vlan):
                raise UnsupportedKind(
                    f"network {network.name}: VLAN {network.vlan} of {network.uplink} is network {other.name}",
                    hint="one network a VLAN of an uplink",
                )

    def _check_overlay(self, network: Network, others: list[Network]) -> None:
        if not 1 <= network.vni <= VNI_MAX:
            raise UnsupportedKind(f"network {network.name}: VNI {network.vni} is not in 1..{VNI_MAX}")
        for other in others:
            if other.kind is NetworkKind.OVERLAY and other.vni == network.vni:
                raise UnsupportedKind(f"network {network.name}: VNI {network.vni} is network {other.name}")
        room = self._room()
        if network.mtu > room:
            raise UnsupportedKind(
                f"network {network.name}: mtu {network.mtu}, the underlay carries {room}",
                hint=f"set the network's mtu to {room}, or raise the underlay's",
            )

    # ---- maps ----

    def _program(self, index: int, network: Network) -> None:
        kinds = {
            NetworkKind.LOCAL: C.NETWORK_LOCAL,
            NetworkKind.UPLINK: C.NETWORK_UPLINK,
            NetworkKind.OVERLAY: C.NETWORK_OVERLAY,
        }
        uplink = self._uplinks.attach(network.uplink) if network.kind is NetworkKind.UPLINK else 0
        before = self._kernel.networks.get(index)
        drops = 0 if before is None else before["drops"]
        self._kernel.networks.set(index, (kinds[network.kind], uplink, network.vni, network.vlan, network.mtu, drops))
        self._floods.add((index, member) for member in self._members(network, uplink))
        if network.kind is NetworkKind.UPLINK:
            if network.vlan == 0:
                self._host_place(index, network.uplink, uplink)
            self._kernel.uplinks.set((uplink, network.vlan, 0), index)
        elif network.kind is NetworkKind.OVERLAY:
            self._kernel.vnis.set(network.vni, index)

    def _members(self, network: Network, uplink: int) -> list[Member]:
        if network.kind is NetworkKind.OVERLAY:
            return [(C.L2_TUNNEL, 0, peer) for peer in self._peers()]
        if network.kind is NetworkKind.LOCAL:
            return []
        host = [(C.L2_HOST, 0, uplink)] if network.vlan == 0 else []
        return [(C.L2_UPLINK, 0, uplink), *host]

    def _host_place(self, index: int, uplink: str, ifindex: int) -> None:
        """The host is on an untagged network too: frames for the uplink's own MAC go up its stack."""
        mac = np.frombuffer(self._uplinks.mac(uplink), np.uint8)
        self._kernel.l2.set((index, mac, 0), (C.L2_HOST, C.L2_F_STATIC, 0, ifindex, 0, 0, 0))

    def _clear_keys(self, before: Network, after: Network | None) -> None:
        """Take out tags and tunnel ids that lead to a network no more."""
        if before.kind is NetworkKind.UPLINK and not _same_tag(before, after):
            self._kernel.uplinks.delete((self._uplinks.ifindex(before.uplink), before.vlan, 0))
        if before.kind is NetworkKind.OVERLAY and (after is None or after.vni != before.vni):
            self._kernel.vnis.delete(before.vni)


def _but_uplinks_of(index: int) -> Callable[[int, Member], bool]:
    return lambda i, member: i != index or member[0] not in (C.L2_UPLINK, C.L2_HOST)


def _same_way(one: Network, other: Network) -> bool:
    return (one.kind, one.uplink, one.vlan) == (other.kind, other.uplink, other.vlan)


def _same_tag(before: Network, after: Network | None) -> bool:
    return after is not None and _same_way(before, after)


def require_empty(name: str, users: Sequence[str]) -> None:
    """Raise NotReady while ports are on the network."""
    if users:
        raise NotReady(f"network {name} has ports: {', '.join(users[:5])}", hint="purge or move them first")
