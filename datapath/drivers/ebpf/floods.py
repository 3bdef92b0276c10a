"""Flood lists: to whom broadcast, multicast and unknown unicast of a network go.

A list is an array of its own that is replaced as a whole, so that a frame that is being flooded meets the old or the
new members, each once. That waits for RCU: lists change when ports are staged and purged, never within a switchover.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np

from datapath.drivers.ebpf import layout
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import U32, Outer, Table
from datapath.errors import KernelError, UnsupportedKind

Member = tuple[int, int, int]
"""kind (enum l2_kind), tag towards a trunk port, target."""


class Floods:
    """Lists of all networks, by network index."""

    def __init__(self, outer: Outer) -> None:
        self._outer = outer
        self._lists: dict[int, list[Member]] = {}
        self._lock = threading.Lock()

    def restore(self, index: int) -> None:
        """Read a list that an earlier run made; an empty one is made where there is none."""
        table = self._outer.inner(index)
        if table is None:
            self._put({index: []})
            return
        with table:
            _, values = table.read()
        filled = values[values["kind"] != 0]
        self._lists[index] = [(int(v["kind"]), int(v["vlan"]), int(v["target"])) for v in filled]

    def members(self, index: int) -> list[Member]:
        return list(self._lists.get(index, ()))

    def create(self, index: int) -> None:
        with self._lock:
            self._put({index: []})

    def remove(self, index: int) -> None:
        with self._lock:
            self._outer.remove(index)
            self._lists.pop(index, None)

    def add(self, wanted: Iterable[tuple[int, Member]]) -> None:
        """Add (network index, member) pairs, waiting once. Raises UnsupportedKind when a network is full."""
        pairs = list(wanted)
        self._change({index for index, _ in pairs}, lambda index, old: _with(old, [m for i, m in pairs if i == index]))

    def discard(self, keep: Callable[[int, Member], bool]) -> None:
        """Take out every member, of any network, that is not to be kept."""
        self._change(set(self._lists), lambda index, old: [m for m in old if keep(index, m)])

    def _change(self, indexes: set[int], change: Callable[[int, list[Member]], list[Member]]) -> None:
        with self._lock:
            after = {index: change(index, self._lists.get(index, [])) for index in indexes}
            self._put({index: members for index, members in after.items() if members != self._lists.get(index)})

    def _put(self, lists: dict[int, list[Member]]) -> None:
        if not lists:
            return
        for index, members in lists.items():
            if len(members) > C.FLOOD_MEMBERS:
                raise UnsupportedKind(
                    f"network {index} would have {len(members)} members on this host, the switch floods to "
                    f"{C.FLOOD_MEMBERS}",
                    hint="spread its VMs over more hosts",
                )
        tables = [self._filled(members) for members in lists.values()]
        keys = np.array(list(lists), U32)
        done = self._outer.load(keys, np.array([table.fd for table in tables], U32))
        for table in tables:
            table.close()
        if done.refused:
            raise KernelError("replace flood lists", done.refused[0].errno)
        self._lists.update(lists)

    def _filled(self, members: list[Member]) -> Table:
        table = self._outer.new()
        values = np.zeros(len(members), layout.MEMBER)
        for row, (kind, vlan, target) in enumerate(members):
            values[row] = (kind, 0, vlan, target)
        table.load(np.arange(len(members), dtype=U32), values)
        return table


def _with(old: list[Member], new: list[Member]) -> list[Member]:
    return old + [member for member in dict.fromkeys(new) if member not in old]
