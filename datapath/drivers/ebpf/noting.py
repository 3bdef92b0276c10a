"""What user space writes into the tables of a port that is being carried is noted like what programs change."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import conntrack
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.layout import CT_KEY, C
from datapath.drivers.ebpf.words import Words
from datapath.state.check import checked_columns
from datapath.state.conntrack import CONNTRACK
from datapath.state.kind import Table


def note_connections(words: Words, instance: Instance, table: Table) -> None:
    """Note the keys of a table that was loaded or deleted: after the write, so that a drain reads what it wrote."""
    if instance.dirty is not None:
        _note(words, instance, conntrack.keys(checked_columns(CONNTRACK, table)))


def note_l2(words: Words, instance: Instance, keys: NDArray[np.void]) -> None:
    """Note L2 entries (struct l2_key) that were written or deleted."""
    if instance.dirty is not None:
        _note(words, instance, l2_dirty_keys(keys))


def l2_dirty_keys(keys: NDArray[np.void]) -> NDArray[np.void]:
    """Keys of L2 entries in a dirty set: enum ct_type CT_TYPE_L2."""
    made = np.zeros(len(keys), CT_KEY)
    raw = made.view(np.uint8).reshape(len(keys), CT_KEY.itemsize)
    raw[:, :6] = keys["mac"]
    raw[:, 16:20] = np.ascontiguousarray(keys["network"], "<u4").view(np.uint8).reshape(len(keys), 4)
    made["type"] = C.CT_TYPE_L2
    return made


def _note(words: Words, instance: Instance, keys: NDArray[np.void]) -> None:
    assert instance.dirty is not None
    if instance.dirty.load(keys, np.ones(len(keys), instance.dirty.value)).refused:
        words.flag(instance.slot, add=C.PORT_F_OVERFLOW)
