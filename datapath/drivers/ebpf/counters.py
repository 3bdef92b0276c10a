"""What ports counted: own counters of the kernel, and what hosts before had counted (carried)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import HITS_KEY
from datapath.drivers.ebpf.words import Words
from datapath.state import drops
from datapath.state.kind import Record

_SIDES = ("from", "to")
_DROP = "drop_"


class Counters:
    """Reading never stops a port: sums over CPUs may lag each other by the frames in flight."""

    def __init__(self, kernel: Kernel, words: Words) -> None:
        self._kernel, self._words = kernel, words

    def own(self, slot: int) -> dict[str, int]:
        """Counted here: packets_from, packets_to, bytes_*, held_*, would_drop, redirected, evicted, refused_full, and
        drop_* for each reason."""
        counted = self._kernel.counters.get(slot)
        if counted is None:
            return {}
        sums: dict[str, int] = {}
        for name in ("packets", "bytes", "held"):
            for side, value in zip(_SIDES, counted[name].sum(axis=0, dtype=np.uint64).tolist(), strict=True):
                sums[f"{name}_{side}"] = value
        sums["would_drop"] = int(counted["would_drop"].sum(dtype=np.uint64))
        sums["redirected"] = int(counted["redirected"].sum(dtype=np.uint64))
        sums["evicted"] = int(self._kernel.ports.view["evicted"][slot])
        sums["refused_full"] = int(self._kernel.ports.view["alarm_full"][slot])
        reasons = counted["drops"].sum(axis=0, dtype=np.uint64)
        sums.update({_DROP + drops.name(int(i)): int(reasons[i]) for i in np.flatnonzero(reasons)})
        return sums

    def passed_on(self, slot: int) -> tuple[int, int]:
        """Frames that went on by the port's redirect, and those that came to it by one."""
        counted = self._kernel.counters.get(slot)
        if counted is None:
            return 0, 0
        return int(counted["redirected"].sum(dtype=np.uint64)), int(counted["came"].sum(dtype=np.uint64))

    def total(self, instance: Instance) -> dict[str, int]:
        """Own plus carried, and what connections had counted elsewhere that ended here before it was known."""
        carried = instance.entry.carried
        sums = _added(self.own(instance.slot), carried.get("counters", {}))
        for amounts in carried.get("ended", {}).values():
            names = ("ended_packets_from", "ended_packets_to", "ended_bytes_from", "ended_bytes_to")
            sums = _added(sums, dict(zip(names, amounts, strict=True)))
        return sums

    def split(self, sums: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """(counters, drops by reason) of a sum."""
        counters = {name: value for name, value in sums.items() if not name.startswith(_DROP)}
        dropped = {name.removeprefix(_DROP): value for name, value in sums.items() if name.startswith(_DROP)}
        return counters, dropped

    def clear(self, slot: int) -> None:
        """A slot that another port is to get."""
        zero = np.zeros((), self._kernel.counters.value)
        self._kernel.counters.set(slot, zero)
        self._delete_hits(slot)

    # ---- rules ----

    def hits(self, instance: Instance) -> dict[int, tuple[int, int]]:
        """Rule id -> (packets, bytes), own and carried; 0 is the default drop."""
        return self.hits_of_all([instance])[instance.slot]

    def hits_of_all(self, instances: Sequence[Instance]) -> dict[int, dict[int, tuple[int, int]]]:
        """The same by slot: one walk of the map for all."""
        keys, values = self._kernel.rule_hits.read()
        packets = values["packets"].sum(axis=1, dtype=np.uint64)
        amounts = values["bytes"].sum(axis=1, dtype=np.uint64)
        found: dict[int, dict[int, tuple[int, int]]] = {}
        for instance in instances:
            mine = np.flatnonzero(keys["slot"] == instance.slot)
            own = {int(keys["rule"][i]): (int(packets[i]), int(amounts[i])) for i in mine}
            for rule, (before, before_bytes) in instance.entry.carried.get("hits", {}).items():
                here, here_bytes = own.get(int(rule), (0, 0))
                own[int(rule)] = (here + before, here_bytes + before_bytes)
            found[instance.slot] = own
        return found

    def hit_records(self, instance: Instance) -> list[Record]:
        """Accounting records of kind `acl`."""
        hits = sorted(self.hits(instance).items())
        return [{"id": rule, "hits": packets, "hit_bytes": amount} for rule, (packets, amount) in hits]

    def forget_hits(self, slot: int, rules: Iterable[int]) -> None:
        """Of rules that a port has no more: the map is one for all ports, and must not fill with what nobody reads."""
        keys = self._kernel.rule_hits.keys()
        mine = (keys["slot"] == slot) & np.isin(keys["rule"], list(rules))
        self._kernel.rule_hits.delete_many(np.ascontiguousarray(keys[mine], HITS_KEY))

    def _delete_hits(self, slot: int) -> None:
        keys = self._kernel.rule_hits.keys()
        self._kernel.rule_hits.delete_many(np.ascontiguousarray(keys[keys["slot"] == slot], HITS_KEY))


def _added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(one.get(name, 0)) + int(other.get(name, 0)) for name in {**one, **other}}
