"""State word, gate and clock of a port in the kernel: the few stores that a switchover is made of.

types.h (struct port) says who else writes what. Everything here is one store or one PROG_RUN: no call waits for RCU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from datapath.drivers.ebpf.clock import ktime_ns
from datapath.drivers.ebpf.conntrack import ORIGIN_NS
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.maps import Mapped
from datapath.errors import NotReady
from datapath.provider import PortState

_WRAP = 1 << 64


@dataclass(frozen=True)
class Word:
    """struct port.word taken apart."""

    state: int
    flags: int
    epoch: int

    @classmethod
    def of(cls, word: int) -> Word:
        return cls(word & 0xFF, (word >> 8) & 0xFFFFFF, word >> 32)

    @property
    def packed(self) -> int:
        return self.epoch << 32 | self.flags << 8 | self.state


class Words:
    """Of all ports. `compare_and_swap(slot, expected, desired)` returns what was there (program port_cas)."""

    def __init__(self, ports: Mapped, compare_and_swap: Callable[[int, int, int], int]) -> None:
        self.ports = ports
        self._cas = compare_and_swap
        self._features = threading.Lock()
        self.names = {
            C.PORT_STAGED: PortState.STAGED,
            C.PORT_ACTIVE: PortState.ACTIVE,
            C.PORT_QUIESCED: PortState.QUIESCED,
            C.PORT_STUB: PortState.STUB,
        }

    # ---- state ----

    def word(self, slot: int) -> Word:
        return Word.of(self.ports.load(slot, "word"))

    def state(self, slot: int) -> PortState:
        """Raises NotReady for a slot that holds no port."""
        state = self.names.get(self.word(slot).state)
        if state is None:
            raise NotReady(f"slot {slot} holds no port", hint="the switch was destroyed under the agent: restart it")
        return state

    def change(
        self, slot: int, epoch: int, sources: Collection[int], target: int, *, add: int = 0, drop: int = 0
    ) -> Word:
        """Move a port to state `target`, with flags added and dropped. Returns the word that was there.

        Raises NotReady when the port is in none of `sources`.
        """
        while True:
            before = self.word(slot)
            if before.state not in sources or before.epoch != epoch:
                wanted = ", ".join(str(self.names.get(state, "free")) for state in sources)
                raise NotReady(
                    f"port in slot {slot} is {self.names.get(before.state, 'free')}, not {wanted}",
                    hint="ask for the port's state and take the step that fits it",
                )
            after = Word(target, (before.flags | add) & ~drop, before.epoch)
            if self._cas(slot, before.packed, after.packed) == before.packed:
                return before

    def flag(self, slot: int, *, add: int = 0, drop: int = 0) -> Word:
        """Change flags in whatever state the port is. Returns the word that was there."""
        while True:
            before = self.word(slot)
            after = Word(before.state, (before.flags | add) & ~drop, before.epoch)
            if self._cas(slot, before.packed, after.packed) == before.packed:
                return before

    def feature(self, slot: int, *, add: int = 0, drop: int = 0) -> None:
        """Change enum port_feature of a port: several kinds keep bits there, and some change theirs at any time."""
        with self._features:
            features = self.ports.view["features"]
            features[slot] = int(features[slot]) & ~drop | add

    def has(self, slot: int, flag: int) -> bool:
        return bool(self.word(slot).flags & flag)

    # ---- gate ----

    def gate(self, slot: int) -> tuple[int, bool]:
        """(target, shut)."""
        gate = self.ports.load(slot, "gate")
        return gate & 0xFF, bool(gate >> 8 & 1)

    def set_gate(self, slot: int, target: int, *, shut: bool = False) -> None:
        self.ports.store(slot, "gate", target | int(shut) << 8)

    def gate_text(self, slot: int) -> str:
        target, shut = self.gate(slot)
        name = {C.GATE_NONE: "none", C.GATE_LOCAL: "local", C.GATE_REDIRECT: "redirect"}[target]
        return name + (" shut" if shut else "")

    # ---- clock ----

    def running(self, slot: int) -> bool:
        return self.word(slot).state == C.PORT_ACTIVE

    def clock(self, slot: int) -> int:
        """The port's clock as in its entries: running while it is active, else where it stood."""
        if self.running(slot):
            return (ktime_ns() - self.ports.load(slot, "time_base")) % _WRAP
        return self.ports.load(slot, "time_floor")

    def set_clock(self, slot: int, clock: int) -> None:
        """From now on the clock runs from `clock`; every entry is taken as seen just then at the earliest."""
        self.ports.store(slot, "time_base", (ktime_ns() - clock) % _WRAP)
        self.ports.store(slot, "time_floor", clock)

    def freeze_clock(self, slot: int) -> None:
        """Keep the time at which a port stopped, where `clock` finds it."""
        base = self.ports.load(slot, "time_base")
        self.ports.store(slot, "time_floor", (ktime_ns() - base) % _WRAP)

    def advance_clock(self, slot: int, clock: int) -> None:
        """A port that stands: its clock is at least `clock`."""
        self.ports.store(slot, "time_floor", max(clock, self.ports.load(slot, "time_floor"), ORIGIN_NS))
