# SPDX-License-Identifier: GPL-2.0-only
"""What goes on while the crash matrix moves a VM: what it asks of it, and the numbered streams of a vNIC guest."""

from __future__ import annotations

import contextlib
import itertools
from typing import Protocol

from migrator.lab.machines import Machine
from migrator.lab.processes import Worker, wait_until

from .world import NUMBERS

ROUGH = 5  # ms between the numbers of a stream


class Talk(Protocol):
    def assert_whole(self) -> None:
        """Every connection lives, byte for byte."""


class Counted(Protocol):
    """Numbered datagrams each way, told case by case."""

    def begin(self) -> None: ...

    def end(self) -> dict[str, float]: ...


class Going(Protocol):
    """A move that somebody waits for in a thread."""

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...


class Numbers:
    """A numbered stream each way, with numbers of its own for each case; the workers stay."""

    def __init__(self, vm: Machine, peer: Machine) -> None:
        self.ends = (vm.worker("probe"), peer.worker("probe"))  # at the guest, at the peer
        self.targets = (peer.address, vm.address)
        for end in self.ends:
            end.call("receive", address="0.0.0.0", port=NUMBERS)
        self._flows = itertools.count(1)
        self.flows = (0, 0)  # to the guest, from the guest

    def begin(self) -> None:
        self.flows = (next(self._flows), next(self._flows))
        for flow, sender, target in zip(self.flows, reversed(self.ends), reversed(self.targets), strict=True):
            sender.call("send", flow=flow, address=target, port=NUMBERS, every_ms=ROUGH)
        wait_until("numbers arrive", lambda: all(self.came(n) > 3 for n in (0, 1)))
        for receiver, flow in zip(self.ends, self.flows, strict=True):
            receiver.call("silence", flow=flow)

    def came(self, way: int) -> int:
        """0: to the guest, 1: from it."""
        flows = self.ends[way].call("report")["flows"]
        return int(flows.get(str(self.flows[way]), {}).get("received", 0))

    def end(self) -> dict[str, float]:
        """Stop: what was lost, doubled or overtaken in both directions, and the longest silence in ms."""
        goals = [self.came(way) + 20 for way in (0, 1)]
        wait_until("numbers go on", lambda: all(self.came(w) >= g for w, g in enumerate(goals)))
        found: dict[str, float] = {"lost": 0, "doubled": 0, "overtaken": 0, "silence": 0.0}
        for way, (sender, receiver) in enumerate(zip(reversed(self.ends), self.ends, strict=True)):
            flow = self.flows[way]
            sent = sender.call("stop", flow=flow)["sent"]
            with contextlib.suppress(Exception):  # the last one may be lost like any other
                wait_until("the last number", lambda r=receiver, f=flow, s=sent: _newest(r, f) == s - 1, 3.0)
            report = receiver.call("report")["flows"][str(flow)]
            found["lost"] += report["missing_count"]
            found["doubled"] += report["doubled"]
            found["overtaken"] += report["overtaken"]
            found["silence"] = max(found["silence"], receiver.call("silence", flow=flow)["ms"])
        return found


def _newest(receiver: Worker, flow: int) -> int:
    return int(receiver.call("report")["flows"][str(flow)]["newest"])
