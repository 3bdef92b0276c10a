"""Places: entries of the L2 table that the agent writes. The kernel's table is the only copy of what is in force.

Two sorts: MACs of a port of this host (kind PORT, the port's gate says the rest), and MACs of VMs elsewhere by word of
the coordinator (set_place). A place that comes while the MAC's own port is here is kept until that is purged: an open
port is never touched, held frames are not overtaken, and peers that do not know the new place yet go through the
redirect. (An entry that led back out of the host would drop them: split horizon.)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf.clock import ktime_ns
from datapath.drivers.ebpf.hosts import Hosts
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.networks import Networks
from datapath.drivers.ebpf.records import mac_bytes
from datapath.errors import UnsupportedKind
from datapath.provider import NetworkKind, Place

Key = tuple[int, bytes]
"""Network index, MAC."""
Target = tuple[int, int]
"""kind (enum l2_kind), target."""

_log = logging.getLogger(__name__)


class Places:
    """`gone(slot)`: no port is in that slot any more."""

    def __init__(
        self, kernel: Kernel, networks: Networks, hosts: Hosts, own_address: str, gone: Callable[[int], bool]
    ) -> None:
        self._l2, self._networks, self._hosts = kernel.l2, networks, hosts
        self._own, self._gone = own_address, gone
        self._waiting: dict[Key, Target] = {}
        self._lock = threading.Lock()

    def set(self, place: Place) -> None:
        """Raises UnsupportedKind (no such network), NotReady (no such host)."""
        key = (self._networks.index(place.network), mac_bytes(place.mac))
        target = self._target(key[0], place)
        with self._lock:
            self._waiting.pop(key, None)
            if target is None:
                return
            entry = self._l2.get(_l2_key(key))
            if entry is not None and entry["kind"] == C.L2_PORT and not self._gone(int(entry["target"])):
                self._waiting[key] = target
            else:
                self._write(key, target)

    def remove(self, network: str, mac: str) -> None:
        """Forget where a MAC is; an entry that leads to a port here stays."""
        if not self._networks.has(network):
            return
        key = (self._networks.index(network), mac_bytes(mac))
        with self._lock:
            self._waiting.pop(key, None)
            entry = self._l2.get(_l2_key(key))
            if entry is not None and entry["kind"] != C.L2_PORT and entry["flags"] & C.L2_F_LOCATION:
                self._l2.delete(_l2_key(key))

    def forget_waiting(self, keys: list[Key]) -> None:
        """The VM's port opened here: what was said before is over."""
        with self._lock:
            for key in keys:
                self._waiting.pop(key, None)

    def host_gone(self, indexes: list[int]) -> None:
        """Delete entries that lead to hosts that are no more."""
        if not indexes:
            return
        keys, entries = self._l2.read()
        wrong = (entries["kind"] == C.L2_TUNNEL) & np.isin(entries["target"], indexes)
        self._l2.delete_many(keys[wrong])

    def network_gone(self, index: int) -> None:
        keys, _ = self._l2.read()
        self._l2.delete_many(keys[keys["network"] == index])

    def _target(self, index: int, place: Place) -> Target | None:
        """None: nothing to write, frames for the MAC find their way without (local network, or it is on this host)."""
        network = self._networks.get(index)
        if network is None or network.kind is NetworkKind.LOCAL:
            return None
        if network.kind is NetworkKind.UPLINK:
            if place.host and self._hosts.address(place.host) == self._own:
                return None
            return C.L2_UPLINK, self._networks.uplink_ifindex(network)
        if not place.host:
            raise UnsupportedKind(f"network {network.name} is an overlay: a place in it needs a host")
        if self._hosts.address(place.host) == self._own:
            return None
        return C.L2_TUNNEL, self._hosts.index(place.host)

    def _write(self, key: Key, target: Target) -> None:
        self._l2.set(_l2_key(key), (target[0], C.L2_F_LOCATION, 0, target[1], ktime_ns(), 0, 0))

    # ---- ports of this host ----

    def entries_of(self, slot: int) -> tuple[NDArray[np.void], NDArray[np.void]]:
        """Keys and entries that lead to the port in `slot`."""
        found_keys, found = [], []
        for keys, entries in self._l2.dump():
            own = (entries["kind"] == C.L2_PORT) & (entries["target"] == slot)
            found_keys.append(keys[own])
            found.append(entries[own])
        if not found:
            return np.empty(0, self._l2.key), np.empty(0, self._l2.value)
        return np.concatenate(found_keys), np.concatenate(found)

    def take(self, keys: NDArray[np.void], entries: NDArray[np.void]) -> None:
        """These MACs are here from now on: one map write each. What finds no room is reached by floods."""
        refused = self._l2.load(keys, entries).refused
        if refused:
            _log.error(
                "the L2 table is full, %d of %d places were not written: raise option l2", len(refused), len(keys)
            )
        self.forget_waiting([(int(k["network"]), bytes(k["mac"])) for k in keys])

    def leave(self, slot: int) -> None:
        """No MAC leads to `slot` any more: to where the coordinator says that it is, or nowhere."""
        with self._lock:
            keys, _ = self.entries_of(slot)
            places = {(int(k["network"]), bytes(k["mac"])): k for k in keys}
            for key in places.keys() & self._waiting.keys():
                self._write(key, self._waiting.pop(key))
                del places[key]
            if places:
                self._l2.delete_many(np.array(list(places.values()), self._l2.key))


def _l2_key(key: Key) -> tuple[int, NDArray[np.uint8], int]:
    return key[0], np.frombuffer(key[1], np.uint8), 0
