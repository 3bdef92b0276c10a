"""From the layouts of one version of the switch to those of another: fields by their names, values unchanged.

What a version adds is 0 in records of one that does not have it; so 0 of a new field must mean "as before". A field
that is no more is left out, and `lost` names it. What a name of an enumeration stands for never changes (`meanings`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf.btf import Btf
from datapath.errors import UnsupportedKind

_LIMITS = (
    *("ABI_SLOTS_DEFAULT", "ABI_NETWORKS_DEFAULT", "ABI_HOSTS_DEFAULT", "ABI_FLOOD_MEMBERS"),
    "ABI_REVISION",  # the layouts are read by name all the same
    *("ABI_HOLD_FRAMES", "ABI_EXCHANGE_LENGTH", "ABI_EVENT_BYTES", "DROP_REASONS", "TIMEOUT_MAX"),
)
"""Enumerators that say how much, and not what: they may differ."""

Records = NDArray[Any]


def by_name(records: Records, wanted: np.dtype[Any]) -> Records:
    """The same records in another layout, a copy unless it is the same one.

    Raises UnsupportedKind when a value does not fit: no record is cut.
    """
    if records.dtype == wanted:
        return records
    made = np.zeros(records.shape, wanted)
    if wanted.names is None:
        _fill(made, records, "value")
        return made
    for name in wanted.names:
        if name in (records.dtype.names or ()):
            _field(made, records, name)
    return made


def _field(made: Records, records: Records, name: str) -> None:
    if made.dtype[name].names is not None:
        made[name] = by_name(records[name], made.dtype[name])
    else:
        _fill(made[name], records[name], name)


def _fill(made: Records, values: Records, name: str) -> None:
    """Copy numbers, of arrays as many elements as both have; what is left over must be nothing."""
    if made.ndim != values.ndim:
        raise UnsupportedKind(f"field {name} is an array in one version only")
    if made.ndim and made.shape[-1] != values.shape[-1]:
        common = min(made.shape[-1], values.shape[-1])
        if values[..., common:].any():
            raise UnsupportedKind(f"field {name} has {values.shape[-1]} elements, {common} are known here")
        made, values = made[..., :common], values[..., :common]
    limits = np.iinfo(made.dtype.base)
    if values.size and (int(values.max()) > limits.max or int(values.min()) < limits.min):
        raise UnsupportedKind(f"field {name} holds {int(values.max())}, this version has {made.dtype} for it")
    made[...] = values


def lost(old: np.dtype[Any] | None, new: np.dtype[Any] | None) -> list[str]:
    """Fields of the old layout that the new one does not have. What was there to fill a gap may have become a field."""
    known = set(new.names or ()) if new is not None else set()
    return [
        name
        for name in (old.names or () if old is not None else ())
        if name not in known and not name.startswith("pad")
    ]


def meanings(old: Btf, new: Btf) -> list[str]:
    """Enumerators that both have with different values, a phrase each: such versions cannot read each other's words."""
    mine, other = new.constants, old.constants
    common = sorted(name for name in mine if name in other and name not in _LIMITS)
    return [f"{name} is {other[name]} there and {mine[name]} here" for name in common if mine[name] != other[name]]


def digest(structures: Mapping[str, np.dtype[Any]]) -> str:
    """Eight hexadecimal digits that stand for these layouts: names, places and formats of all fields."""
    lines = [
        f"{name}.{field} {at[1]} {at[0].base.str} {at[0].shape}"
        for name, layout in sorted(structures.items())
        for field, at in sorted((layout.fields or {}).items())
    ]
    lines += [f"{name} {layout.itemsize}" for name, layout in sorted(structures.items())]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=4).hexdigest()
