"""Tables of one generation of maps into the next: whatever both have, by the names of their fields."""

from __future__ import annotations

import logging

import numpy as np

from datapath.drivers.ebpf import evolve
from datapath.drivers.ebpf.adopted import MAPS_OF_MAPS, Adopted
from datapath.drivers.ebpf.floods import Floods
from datapath.drivers.ebpf.generation import Generation
from datapath.drivers.ebpf.layout import MEMBER
from datapath.drivers.ebpf.loader import Switch
from datapath.drivers.ebpf.maps import Records, Table
from datapath.drivers.ebpf.uapi import MapType
from datapath.errors import UnsupportedKind

_log = logging.getLogger(__name__)
_PLAIN = (MapType.HASH, MapType.ARRAY)
_OTHERWISE = ("ports", "exchange", "policies", "learning")
"""By takeover.py; scratch; made anew from the rules; set by each sweep of the L2 table."""
HINT = "the programs that were here go on: start the version before again, or move this host's VMs away and reboot it"


def refuse_unknown(old: Adopted, new: Switch) -> None:
    """Raise UnsupportedKind when something of the old maps has no place in the new ones; name what is left out."""
    other = evolve.meanings(old.types, new.types)
    gone = [name for name in old.maps if name not in new.maps and _holds(old, name)]
    if other or gone:
        reasons = [*other, *(f"table {name} is not known to this version" for name in gone)]
        raise UnsupportedKind(f"the switch cannot be taken over: {'; '.join(reasons)}", hint=HINT)
    for name in old.types.structures.keys() & new.types.structures.keys():
        for field in evolve.lost(old.types.structures[name], new.types.structures[name]):
            _log.warning("struct %s: this version has no field %s, it is left out", name, field)


def _holds(switch: Adopted, name: str) -> bool:
    if switch.kind(name) == MapType.RINGBUF:
        return False
    with switch.outer(name) if switch.kind(name) in MAPS_OF_MAPS else switch.table(name) as table:
        keys, values = table.read()
        array = switch.kind(name) in (MapType.ARRAY, MapType.PERCPU_ARRAY)
        return bool(_filled(values).any()) if array else len(keys) > 0


def copy_tables(old: Adopted, new: Switch) -> None:
    """Every plain table. Raises UnsupportedKind when the new one has no room for it."""
    for name in old.maps:
        if name in new.maps and old.kind(name) in _PLAIN and name not in _OTHERWISE:
            with old.table(name) as source, new.table(name) as target:
                keys, values = source.read()
                if old.kind(name) == MapType.ARRAY:
                    used = _filled(values)
                    keys, values = keys[used], values[used]
                _load(target, evolve.by_name(keys, target.key), evolve.by_name(values, target.value))


def copy_changed(old: Adopted, new: Switch, name: str) -> None:
    """A table that was copied, again: only what is different now."""
    with old.table(name) as source, new.table(name) as target:
        keys, values = source.read()
        keys, values = evolve.by_name(keys, target.key), evolve.by_name(values, target.value)
        known_keys, known = target.read()
        if old.kind(name) == MapType.ARRAY:  # all elements are always there, and there may be fewer or more than before
            keys, values = keys[keys < target.entries], values[keys < target.entries]
        else:
            target.delete_many(known_keys[~np.isin(_bytes(known_keys), _bytes(keys))])
        fresh = ~np.isin(_bytes(keys, values), _bytes(known_keys, known))
        _load(target, keys[fresh], values[fresh])


def copy_floods(old: Generation, floods: Floods, networks: list[int]) -> None:
    """Flood lists of these networks."""
    for index in networks:
        inner = old.kernel.floods.inner(index)
        if inner is None:
            continue
        with inner:
            members = evolve.by_name(inner.read()[1], MEMBER)
        filled = members[members["kind"] != 0]
        floods.create(index)
        floods.add((index, (int(one["kind"]), int(one["vlan"]), int(one["target"]))) for one in filled)


def _load(target: Table, keys: Records, values: Records) -> None:
    done = target.load(keys, values)
    if done.refused:
        raise UnsupportedKind(
            f"{len(keys)} entries of table {target.name} do not fit: {len(done.refused)} were refused",
            hint=f"raise the driver's options (slots, networks, hosts, l2); {HINT}",
        )


def _filled(values: Records) -> np.ndarray:
    """Which elements are not all zero."""
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    return np.asarray(raw.any(axis=1))


def _bytes(*columns: Records) -> np.ndarray:
    """Each row as one value that can be compared."""
    raw = [np.ascontiguousarray(one).view(np.uint8).reshape(len(one), one.dtype.itemsize) for one in columns]
    joined = np.ascontiguousarray(np.concatenate(raw, axis=1))
    return joined.view(f"V{joined.shape[1]}").reshape(len(joined))
