"""Which instances of this host a copy is for: the map `mirror_ports`, of ports that say that they take copies.

They say so because copies pass the policy: whoever can send as a host of the cluster could pass that of any port else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from datapath.drivers.ebpf.instances import Instance, Instances
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Table
from datapath.provider import PortRef
from datapath.state.mirror import copy_name

_log = logging.getLogger(__name__)
Key = tuple[int, int]
"""Tunnel id, group policy mark."""


def copy_key(vm: str, mac: str) -> Key:
    number, port = copy_name(vm, mac)
    return number, C.MARK_COPY | port


class CopyNames:
    """Follows the instances that are here; `accepts` says which of them take copies."""

    def __init__(self, table: Table, instances: Instances, accepts: Callable[[Instance], bool]) -> None:
        self._table, self._instances, self._accepts = table, instances, accepts
        instances.follow(self.update)

    def update(self, ref: PortRef) -> None:
        """An instance of this port came or went, or takes copies from now on, or none any more."""
        key = copy_key(ref.vm, ref.mac)
        here = self._named(key)
        if len({(one.ref.vm, one.ref.mac) for one in here}) > 1:
            macs = ", ".join(sorted({one.ref.mac for one in here}))
            _log.error("ports %s have one name for mirrors: copies from other hosts reach none of them", macs)
            here = []
        if here:
            slots = [one.slot for one in here[:2]]
            self._table.set(key, (slots[0], slots[1] if len(slots) > 1 else 0))
        else:
            self._table.delete(key)

    def restore(self) -> None:
        """What an earlier run left is what is here now."""
        known = {copy_key(one.ref.vm, one.ref.mac) for one in self._instances if self._accepts(one)}
        for key in self._table.keys().tolist():
            if tuple(key) not in known:
                self._table.delete(key)

    def _named(self, key: Key) -> list[Instance]:
        """The newest first."""
        found = [one for one in self._instances if self._accepts(one) and copy_key(one.ref.vm, one.ref.mac) == key]
        return sorted(found, key=lambda one: one.ref.epoch, reverse=True)
