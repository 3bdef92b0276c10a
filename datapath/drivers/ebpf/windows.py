"""Kind `window` in the kernel: a bit of the port, and what was outside (datapath/bpf/lib/window.h)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datapath.drivers.ebpf.clock import barrier
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kindtable import KindTable
from datapath.drivers.ebpf.layout import C
from datapath.state.kind import Record
from datapath.state.window import PROTOCOL, WINDOW


class WindowTable(KindTable):
    kind = WINDOW

    def apply(self, instance: Instance, records: Sequence[Record], before: Sequence[Record]) -> None:  # noqa: ARG002
        slot, words = instance.slot, self._parts.words
        if not records:
            self.clear(slot)
            return
        self._parts.kernel.windows.view["count_only"][slot] = records[0]["check"] == "count"
        if not int(self._parts.kernel.ports.view["features"][slot]) & C.FEATURE_WINDOW:
            self._forget(slot)
            words.feature(slot, add=C.FEATURE_WINDOW)

    def _forget(self, slot: int) -> None:
        """What passed while nobody looked was not followed: those connections are not checked any more."""
        barrier()  # a program may still follow one, if it was looked at a moment ago
        if self._parts.kernel.conntracks.get(slot) is not None:
            self._parts.kernel.run("ct_forget_windows", self._parts.kernel.context("ct_batch", slot=slot))

    def clear(self, slot: int) -> None:
        windows = self._parts.kernel.windows
        self._parts.words.feature(slot, drop=C.FEATURE_WINDOW)
        windows.view[slot] = np.zeros((), windows.value)

    def dump(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        return [{**record, **self._outside(instance)} for record in records]

    def _outside(self, instance: Instance) -> dict[str, int]:
        here, before = self._parts.kernel.windows.view["outside"][instance.slot], self._carried(instance)
        return {name: int(own) + before.get(name, 0) for name, own in zip(WINDOW.accounting, here, strict=True)}

    def _carried(self, instance: Instance) -> dict[str, int]:
        return dict(instance.entry.carried.get(WINDOW.name, {}))

    def account(self, instance: Instance, records: Sequence[Record]) -> None:
        for record in records:
            given = {name: record[name] for name in WINDOW.accounting if name in record}
            carried = {**self._carried(instance), **given}
            if carried != self._carried(instance):
                instance.entry = instance.entry.with_carried(WINDOW.name, carried)
                self._parts.ledger.save_carried(instance.entry)

    def counted(self, instance: Instance, records: Sequence[Record]) -> list[Record]:  # noqa: ARG002
        return [{"protocol": PROTOCOL, **self._outside(instance)}]
