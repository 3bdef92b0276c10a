"""Port instances that are here: what the agent's process knows of each beside the kernel's maps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from datapath.drivers.ebpf.holds import HoldTap
from datapath.drivers.ebpf.ledger import PortEntry
from datapath.drivers.ebpf.maps import Table
from datapath.drivers.ebpf.taps import GuestTap
from datapath.errors import NotReady, PortNotFound, StaleEpoch
from datapath.provider import PortRef


@dataclass
class Instance:
    """One port instance. `connections`: at the last sweep."""

    entry: PortEntry
    table: Table
    hold_to: HoldTap
    hold_from: HoldTap
    dirty: Table | None = None
    connections: int = 0
    hold_began: int = 0  # frames that the hold had refused when it began
    held: bool = False  # since this agent runs, for a move from here
    guest: GuestTap | None = None  # while a switchover looks into the guest's queue
    unpumped: bool = False  # a pump gave up: frames wait in an open hold
    windows: set[bytes] = field(default_factory=set)  # keys of connections whose window alone changed, as tracked
    queue_before: int = 0  # length of the device's queue while a move has made it longer

    @property
    def slot(self) -> int:
        return self.entry.slot

    @property
    def ref(self) -> PortRef:
        return self.entry.ref

    def forget_guest(self) -> None:
        """Let go of the guest's tap: a copy of its descriptor keeps the tap alive."""
        if self.guest is not None:
            # Whoever closes a tap last deletes the device, which takes the kernel 50 ms: nobody shall wait for that.
            threading.Thread(target=self.guest.close, name="close-tap").start()
            self.guest = None


class Instances:
    """By reference and by slot. Every method may be called from any thread."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._by_ref: dict[PortRef, Instance] = {}
        self._by_slot: dict[int, Instance] = {}
        self._by_vm: dict[str, set[int]] = {}  # slots
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._followers: list[Callable[[PortRef], None]] = []

    def follow(self, tell: Callable[[PortRef], None]) -> None:
        """`tell` is called when an instance has come or gone."""
        self._followers.append(tell)

    def __iter__(self) -> Iterator[Instance]:
        with self._lock:
            return iter([self._by_slot[slot] for slot in sorted(self._by_slot)])

    def of(self, vm: str) -> list[Instance]:
        """A VM's, by slot."""
        with self._lock:
            return [self._by_slot[slot] for slot in sorted(self._by_vm.get(vm, ()))]

    def find(self, ref: PortRef) -> Instance:
        """Raises StaleEpoch when a newer instance of the port is here instead, PortNotFound when none is."""
        with self._lock:
            found = self._by_ref.get(ref)
            if found is not None:
                return found
            newest = self._newest(ref)
        if newest > ref.epoch:
            raise StaleEpoch(
                f"port {ref.mac} of VM {ref.vm}: epoch {ref.epoch} is over, {newest} is here",
                hint="a newer migration of the VM has begun; nothing is to be done for the old one",
            )
        raise PortNotFound(f"port {ref.mac} of VM {ref.vm}, epoch {ref.epoch}", hint="stage it first")

    def get(self, ref: PortRef) -> Instance | None:
        with self._lock:
            return self._by_ref.get(ref)

    def at(self, slot: int) -> Instance | None:
        """The instance in a slot."""
        with self._lock:
            return self._by_slot.get(slot)

    def on(self, device: str) -> Instance | None:
        """Whoever owns a device: of several instances the newest."""
        with self._lock:
            owners = [one for one in self._by_ref.values() if one.entry.device == device]
        return max(owners, key=lambda one: one.ref.epoch, default=None)

    def reserve(self, ref: PortRef) -> int:
        """A free slot for a new instance. Raises NotReady (it is here, or no slot is free), StaleEpoch."""
        with self._lock:
            if ref in self._by_ref:
                raise NotReady(f"port {ref.mac} of VM {ref.vm}, epoch {ref.epoch} is here", hint="purge it first")
            newest = self._newest(ref)
            if newest > ref.epoch:
                raise StaleEpoch(f"port {ref.mac} of VM {ref.vm}: epoch {newest} is here, {ref.epoch} was asked")
            free = next((slot for slot in range(1, self._slots) if slot not in self._taken), None)
            if free is None:
                raise NotReady(f"all {self._slots - 1} slots are taken", hint="raise the driver's option `slots`")
            self._taken.add(free)
            return free

    def claim(self, slot: int) -> None:
        """Take a known slot: an instance of an earlier run."""
        with self._lock:
            self._taken.add(slot)

    def add(self, instance: Instance) -> None:
        with self._lock:
            self._taken.add(instance.slot)
            self._by_ref[instance.ref] = self._by_slot[instance.slot] = instance
            self._by_vm.setdefault(instance.ref.vm, set()).add(instance.slot)
        self._tell(instance.ref)

    def release(self, slot: int) -> None:
        """The slot is free again, and its instance forgotten."""
        with self._lock:
            self._taken.discard(slot)
            gone = self._by_slot.pop(slot, None)
            if gone is not None:
                del self._by_ref[gone.ref]
                self._by_vm[gone.ref.vm].discard(slot)
                if not self._by_vm[gone.ref.vm]:
                    del self._by_vm[gone.ref.vm]
        if gone is not None:
            self._tell(gone.ref)

    def _tell(self, ref: PortRef) -> None:
        for tell in self._followers:
            tell(ref)

    def free(self) -> int:
        with self._lock:
            return self._slots - 1 - len(self._taken)

    def _newest(self, ref: PortRef) -> int:
        return max((one.epoch for one in self._by_ref if (one.vm, one.mac) == (ref.vm, ref.mac)), default=-1)
