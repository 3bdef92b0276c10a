"""The hold taps of all ports, and the one tap by which judged frames go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.attach import Attachments, Direction
from datapath.drivers.ebpf.clock import barrier
from datapath.drivers.ebpf.holds import PUMP_MOST_S, HoldTap
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.keeper import Keeper
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.errors import NotReady
from datapath.provider import Pumped

PUMP_S = 5.0
"""Without any progress."""
REST_S = 0.5


class Holds:
    """Devices PREFIX<slot>t and PREFIX<slot>f hold frames towards and from the guest, PREFIXj passes judged ones on."""

    def __init__(self, kernel: Kernel, attachments: Attachments, prefix: str, keeper: Keeper | None) -> None:
        self._kernel, self._attachments, self._prefix, self._keeper = kernel, attachments, prefix, keeper
        self._judged = self._open("j", 0, C.DEVICE_JUDGED)
        self._judged_lock = threading.Lock()

    def make(self, slot: int) -> tuple[HoldTap, HoldTap]:
        """(towards the guest, from the guest), made or taken over with the frames in them."""
        return self._open(f"{slot}t", slot, C.DEVICE_HOLD_TO), self._open(f"{slot}f", slot, C.DEVICE_HOLD_FROM)

    def take_over(self, slot: int) -> tuple[HoldTap, HoldTap]:
        """Taps of an earlier run. Frames that waited are lost unless a keeper had them, and then count no more."""
        taps = self.make(slot)
        for tap, held in zip(taps, ("held_to", "held_from"), strict=True):
            if not tap.kept:
                self._forget_held(slot, tap, held)
        return taps

    def _forget_held(self, slot: int, tap: HoldTap, held: str) -> None:
        """Set a counter of held frames to 0; what comes at this very instant is dropped."""
        if not self._kernel.ports.view[held][slot]:
            return
        gate = self._kernel.ports.load(slot, "gate")
        self._kernel.ports.store(slot, "gate", C.GATE_NONE)
        barrier()
        tap.drain()
        self._kernel.ports.view[held][slot] = 0
        self._kernel.ports.store(slot, "gate", gate)

    def _open(self, name: str, slot: int, role: int) -> HoldTap:
        tap = HoldTap(self._prefix + name, self._keeper)
        self._kernel.devices.set(tap.ifindex, (slot, role))
        self._attachments.attach(tap.ifindex, Direction.INGRESS, self._kernel.switch.program("from_hold"))
        return tap

    def close(self) -> None:
        """Let go of the judged tap; those of ports are closed with their instances."""
        self._judged.close()

    def drop(self, instance: Instance) -> None:
        """Delete an instance's taps and what waits in them."""
        for tap in (instance.hold_to, instance.hold_from):
            self._forget(tap.ifindex)
            tap.destroy()

    def remove(self, slot: int) -> None:
        """Delete taps of a slot that no instance holds."""
        for name in (f"{self._prefix}{slot}t", f"{self._prefix}{slot}f"):
            link = devices.link(name)
            if link is not None:
                self._forget(link.ifindex)
                if self._keeper is not None:
                    self._keeper.drop(name)
                devices.remove(name)

    def destroy(self) -> None:
        """Delete the judged tap, and the keeper when nothing is kept any more."""
        self._forget(self._judged.ifindex)
        self._judged.destroy()
        if self._keeper is not None:
            self._keeper.end()

    def _forget(self, ifindex: int) -> None:
        self._attachments.detach(ifindex, Direction.INGRESS)
        self._kernel.devices.delete(ifindex)

    # ---- frames ----

    def pump_to(self, instance: Instance, most_s: float = PUMP_MOST_S) -> Pumped:
        """Frames towards the guest go where the gate says, in order, until none waits. Raises NotReady, see `pump`."""
        return self._pump(instance, instance.hold_to, "held_to", instance.hold_began, most_s)

    def pump_from(self, instance: Instance) -> Pumped:
        """Frames from the guest are judged and go, in order, until none waits."""
        return self._pump(instance, instance.hold_from, "held_from", 0)

    def _pump(self, instance: Instance, tap: HoldTap, held: str, before: int, most_s: float = PUMP_MOST_S) -> Pumped:
        """What found the hold full is counted behind it, less `before`: a hold may be full while it is given back."""
        if not self._held(instance, held)():
            return Pumped(0, self.overflowed(instance) - before)
        done = tap.pump(self._held(instance, held), PUMP_S, most_s)
        if done.left:
            instance.unpumped = True
            raise NotReady(
                f"{done.left} frames of port {instance.ref.mac} wait in {tap.name}: they get no fewer",
                hint="they are kept, and go on by themselves when fewer come, or when the device takes frames: "
                f"ip -s link show {tap.name}",
            )
        return Pumped(done.passed, self.overflowed(instance) - before)

    def pass_on_rest(self, instance: Instance, *, gate_open: bool, running: bool) -> None:
        """What a pump has given up goes on, as far as it goes now, also in a flood. Called now and then."""
        if not instance.unpumped:
            return
        to, from_ = self._held(instance, "held_to"), self._held(instance, "held_from")
        if gate_open and to():
            instance.hold_to.pump(to, 0.0, REST_S)
        if running and from_():
            instance.hold_from.pump(from_, 0.0, REST_S)
        instance.unpumped = bool(to() or from_())

    def _held(self, instance: Instance, name: str) -> Callable[[], int]:
        signed = self._kernel.ports.view[name]
        slot = instance.slot
        return lambda: max(0, int(signed[slot]))

    def overflowed(self, instance: Instance) -> int:
        """Frames that found the hold full, since the port was staged here."""
        counted = self._kernel.counters.get(instance.slot)
        return 0 if counted is None else int(counted["drops"][:, C.DROP_HOLD_FULL].sum())

    def send_as_guest(self, instance: Instance, frames: Sequence[bytes]) -> int:
        """Frames as if the guest had sent them now: judged, and behind what is held."""
        with self._judged_lock:
            self._kernel.devices.set(self._judged.ifindex, (instance.slot, C.DEVICE_INJECT))
            try:
                return self._judged.write(frames)
            finally:
                self._kernel.devices.set(self._judged.ifindex, (0, C.DEVICE_JUDGED))

    def send_judged(self, instance: Instance, frames: Sequence[bytes]) -> int:
        """Frames that were judged and counted here go where the gate says, past the hold and past the far policy."""
        with self._judged_lock:
            self._kernel.devices.set(self._judged.ifindex, (instance.slot, C.DEVICE_JUDGED))
            try:
                return self._judged.write(frames)
            finally:
                self._kernel.devices.set(self._judged.ifindex, (0, C.DEVICE_JUDGED))
