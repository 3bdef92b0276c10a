"""What an entry of a connection table says of its TCP windows (datapath/bpf/lib/types.h, WINDOW_*), as columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.state.kind import Columns

Entries = NDArray[Any]

_NUMBERS = ("end", "limit", "acked", "offered")
_SIDES = ("from", "to")
_PARTS: dict[str, tuple[int, int]] = {
    # column -> lowest bit and mask in ct_entry.window
    "window_scale_from": (0, 0xF),
    "window_scale_to": (4, 0xF),
    "window_ignored_scale": (8, 0xF),
    "window_flags": (12, 0x1F),
    "window_ignored_next": (17, 0x7FFF),
}


def columns(entries: Entries) -> Columns:
    """Columns of kind `conntrack`; none where no window is known: readers take them as such."""
    word = entries["window"]
    if not word.any():
        return {}
    made: Columns = {
        name: (word >> np.uint32(shift) & np.uint32(mask)).astype("<u2" if mask > 0xFF else "u1")
        for name, (shift, mask) in _PARTS.items()
    }
    for number in _NUMBERS:
        for side, name in enumerate(_SIDES):
            made[f"window_{number}_{name}"] = np.ascontiguousarray(entries[f"window_{number}"][:, side])
    return made


def fill(entries: Entries, given: Columns) -> None:
    """The fields of kernel entries that `columns` gives; `given` has all columns, checked."""
    for name, (shift, mask) in _PARTS.items():
        entries["window"] |= (given[name].astype(np.uint32) & np.uint32(mask)) << np.uint32(shift)
    for number in _NUMBERS:
        for side, name in enumerate(_SIDES):
            entries[f"window_{number}"][:, side] = given[f"window_{number}_{name}"]
