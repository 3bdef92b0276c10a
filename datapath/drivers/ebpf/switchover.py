"""The steps of a switchover, on words, gates and hold taps only: nothing here waits for RCU or for a disk.

    source       hold, quiesce, redirect; or resume
    destination  commit, open

PROTOCOL.md says why in this order. A step that was interrupted by a crash of the agent is simply called again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from datapath.drivers.ebpf.clock import barrier, ktime_ns
from datapath.drivers.ebpf.conntrack import ORIGIN_NS
from datapath.drivers.ebpf.fdb import Fdb
from datapath.drivers.ebpf.holding import Holds
from datapath.drivers.ebpf.hosts import Hosts
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.ledger import Ledger
from datapath.drivers.ebpf.places import Places
from datapath.drivers.ebpf.words import Words
from datapath.errors import NotReady
from datapath.provider import Pumped

_log = logging.getLogger(__name__)

CHANNEL_MAX = (1 << 24) - 1
ASIDE_S = 1.0
FLOOD_LOOK_S = 0.01
FLOOD_FPS = 50_000
"""What a hold gives back in a second, where other work is to be done, too."""
SOURCE_FIRST_S = 1.5
"""Frames that come by themselves wait so long for what the source held when nobody lets them go (`source_done`). Longer
than whoever calls waits: what passes by the lease overtakes what it finds waiting."""


class Switchover:
    """Whoever calls sees to it that one port has one caller; different ports may move side by side."""

    def __init__(
        self, kernel: Kernel, words: Words, fdb: Fdb, places: Places, hosts: Hosts, holds: Holds, ledger: Ledger
    ) -> None:
        self._kernel, self._words, self._fdb, self._places = kernel, words, fdb, places
        self._hosts, self._holds, self._ledger = hosts, holds, ledger

    # ---- destination ----

    def commit(self, instance: Instance) -> None:
        """From here the guest's first frame may open the port, so its clock runs from where the source's stood."""
        word = self._words.word(instance.slot)
        if word.state == C.PORT_ACTIVE:
            return
        _require(instance, word.state == C.PORT_STAGED, "commit needs a staged port")
        self._words.set_clock(instance.slot, max(self._words.clock(instance.slot), ORIGIN_NS))
        self._kernel.ports.store(instance.slot, "commit", instance.ref.epoch)
        self._save(instance, committed=True)

    def open(self, instance: Instance, *, broadcast: bool) -> Pumped:
        """The guest runs here. A port that is active already, by its first frame or by a call, gets what is missing."""
        slot = instance.slot
        staged = self._words.word(slot).state == C.PORT_STAGED
        _require(instance, staged or self._words.running(slot), "open needs a staged or active port")
        awaits = not broadcast and self._words.has(slot, C.PORT_F_AWAITS_SOURCE)
        if staged:
            self._activate(instance, broadcast=broadcast, awaits=awaits)
        else:
            self._fdb.take_all(instance)
        self._kernel.ports.store(slot, "lease", ktime_ns() + int(SOURCE_FIRST_S * 1e9) if awaits else 0)
        if broadcast:
            self.source_done(instance)
        passed = self._holds.pump_from(instance)
        if not self._words.gate(slot)[1]:
            self._holds.pump_to(instance)
        self._save(instance, state="active")
        return passed

    def _activate(self, instance: Instance, *, broadcast: bool, awaits: bool) -> None:
        """Places and gate first: the guest may run, and what answers the first frame that it sends comes at once."""
        slot = instance.slot
        self._words.set_clock(slot, max(self._words.clock(slot), ORIGIN_NS))
        self._words.set_gate(slot, C.GATE_LOCAL, shut=awaits)
        self._fdb.take_all(instance)
        flags = 0 if broadcast else C.PORT_F_NO_BROADCAST
        sources = (C.PORT_STAGED, C.PORT_ACTIVE)  # its first frame may be quicker
        self._words.change(slot, instance.ref.epoch, sources, C.PORT_ACTIVE, add=flags)

    def source_done(self, instance: Instance) -> Pumped:
        """Nothing that was held at the source comes any more: what waited behind it goes, then native broadcast."""
        slot = instance.slot
        before = self._words.flag(slot, drop=C.PORT_F_AWAITS_SOURCE | C.PORT_F_NO_BROADCAST)
        waits = before.flags & C.PORT_F_AWAITS_SOURCE or self._cut_off(instance)
        if waits and before.state == C.PORT_ACTIVE:
            barrier()  # what came by the redirect and is counted has reached the guest's device
            self._kernel.ports.store(slot, "lease", 0)
            self._words.set_gate(slot, C.GATE_LOCAL)  # frames that come now queue behind those that wait
            return self._holds.pump_to(instance)
        return Pumped(0, self._holds.overflowed(instance) - instance.hold_began)

    def _cut_off(self, instance: Instance) -> bool:
        """An earlier agent died in `source_done` between flags and gate, which nobody else would open any more."""
        shut = self._words.gate(instance.slot) == (C.GATE_LOCAL, True)
        return shut and not instance.held and self._words.has(instance.slot, C.PORT_F_UNSETTLED)

    # ---- source ----

    def hold(self, instance: Instance) -> None:
        """Returns when no program can still deliver past the hold."""
        target, _ = self._words.gate(instance.slot)
        _require(instance, target == C.GATE_LOCAL, "hold needs a port whose frames come here")
        instance.hold_began = self._holds.overflowed(instance)
        instance.held = True
        self._words.flag(instance.slot, drop=C.PORT_F_AWAITS_SOURCE)  # of an earlier move: all wait from now on
        self._kernel.ports.store(instance.slot, "lease", 0)
        self._words.set_gate(instance.slot, C.GATE_LOCAL, shut=True)
        barrier()

    def aside(self, instance: Instance, change: Callable[[], None]) -> None:
        """Make a change to an open port's device that would cost frames: they wait meanwhile, a few milliseconds."""
        slot = instance.slot
        if self._words.gate(slot) != (C.GATE_LOCAL, False) or self._flooded(slot):
            return change()
        self._kernel.ports.store(slot, "lease", ktime_ns() + int(ASIDE_S * 1e9))  # if the agent dies here
        self._words.set_gate(slot, C.GATE_LOCAL, shut=True)
        barrier()
        try:
            change()
        finally:
            self._words.set_gate(slot, C.GATE_LOCAL)
            self._kernel.ports.store(slot, "lease", 0)
            self._give_back(instance)
        return None

    def _give_back(self, instance: Instance) -> None:
        try:
            self._holds.pump_to(instance, ASIDE_S)
        except NotReady as error:  # the change is made; what waits has the sweeper
            _log.warning("port %s: %s", instance.ref.mac, error)

    def _flooded(self, slot: int) -> bool:
        """So much comes to the port that a hold would fill sooner than it is given back: the change costs less."""
        before = self._came(slot)
        time.sleep(FLOOD_LOOK_S)
        return self._came(slot) - before > FLOOD_FPS * FLOOD_LOOK_S

    def _came(self, slot: int) -> int:
        """Frames that have come to the port, passed or not."""
        counted = self._kernel.counters.get(slot)
        return int(counted["packets"][:, 1].sum() + counted["drops"].sum()) if counted is not None else 0

    def quiesce(self, instance: Instance) -> None:
        slot = instance.slot
        if self._words.word(slot).state == C.PORT_QUIESCED:
            return
        self._words.freeze_clock(slot)  # for a crash before the next line but one
        self._words.change(slot, instance.ref.epoch, (C.PORT_ACTIVE,), C.PORT_QUIESCED)
        barrier()
        self._words.freeze_clock(slot)
        self._save(instance, state="quiesced")

    def resume(self, instance: Instance) -> Pumped:
        slot = instance.slot
        word = self._words.word(slot)
        if word.state == C.PORT_QUIESCED:
            self._words.set_clock(slot, self._words.clock(slot))
            self._words.change(slot, instance.ref.epoch, (C.PORT_QUIESCED,), C.PORT_ACTIVE)
        _require(instance, self._words.running(slot), "resume needs a held or quiesced port")
        self._kernel.ports.store(slot, "lease", 0)
        self._places.take(*self._fdb.own_places(instance))
        self._words.set_gate(slot, C.GATE_LOCAL)  # frames that come now queue behind those that are held
        passed = self._holds.pump_to(instance)
        self._holds.pump_from(instance)  # the guest ran before it was known here
        self._save(instance, state="active")
        return passed

    def redirect(self, instance: Instance, channel: int, host: str, judged: Sequence[bytes]) -> Pumped:
        """In order: `judged`, what is held, what comes."""
        slot = instance.slot
        state = self._words.word(slot).state
        _require(instance, state in (C.PORT_QUIESCED, C.PORT_STUB), "redirect needs a quiesced port")
        _require(instance, 0 < channel <= CHANNEL_MAX, f"channel {channel} is not in 1..{CHANNEL_MAX}")
        remote = self._hosts.index(host)
        target, shut = self._words.gate(slot)
        if not shut:  # pointing to another host: nothing may meet one half of the new target
            self._words.set_gate(slot, target, shut=True)
            barrier()
        view = self._kernel.ports.view
        view["channel"][slot], view["remote"][slot] = channel, remote
        self._kernel.ports.store(slot, "redirected", ktime_ns())
        self._words.set_gate(slot, C.GATE_REDIRECT, shut=True)
        if judged:
            self._holds.send_judged(instance, judged)
        self._words.set_gate(slot, C.GATE_REDIRECT)
        return self._holds.pump_to(instance)

    def redirect_idle_s(self, instance: Instance) -> float:
        target, _ = self._words.gate(instance.slot)
        _require(instance, target == C.GATE_REDIRECT, "the port does not redirect")
        return max(0, ktime_ns() - self._kernel.ports.load(instance.slot, "redirected")) / 1e9

    def set_lease(self, instance: Instance, seconds: float | None) -> None:
        deadline = 0 if seconds is None else ktime_ns() + int(seconds * 1e9)
        self._kernel.ports.store(instance.slot, "lease", deadline)

    def _save(self, instance: Instance, **changes: object) -> None:
        """Put off: the maps are the truth, the ledger is for the day after a reboot."""
        instance.entry = replace(instance.entry, **changes)  # type: ignore[arg-type]
        self._ledger.save_port_later(instance.entry)


def _require(instance: Instance, good: bool, what: str) -> None:
    if not good:
        raise NotReady(
            f"port {instance.ref.mac} of VM {instance.ref.vm}, epoch {instance.ref.epoch}: {what}",
            hint="ask for the port's state and take the step that fits it",
        )
