"""What is done now and then: connections age by a program in the kernel, L2 entries from here, the ledger is kept."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from datapath.drivers.ebpf.clock import ktime_ns
from datapath.drivers.ebpf.holding import Holds
from datapath.drivers.ebpf.instances import Instance, Instances
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.ledger import Ledger
from datapath.drivers.ebpf.networks import Networks
from datapath.drivers.ebpf.noting import l2_dirty_keys
from datapath.drivers.ebpf.words import Words
from datapath.errors import DatapathError, KernelError
from datapath.provider import Event
from datapath.state.conntrack import ALARM_PERCENT

INTERVAL_S = 5.0
INTERVAL_MIN_S = 0.2
LEARNED_OUTSIDE, LEARNED_OF_NETWORK = 2, 4
"""MACs that are learned behind uplinks and hosts: this part of the L2 table, all together and of one network."""
ALL_NETWORKS = 0
ALARM = ALARM_PERCENT / 100
_ALARM_ENDS = 0.7
_log = logging.getLogger(__name__)


class Sweeper:
    """`interval_s`: between two sweeps of a port at most; a port with short timeouts is swept more often."""

    def __init__(
        self,
        kernel: Kernel,
        words: Words,
        ledger: Ledger,
        instances: Instances,
        networks: Networks,
        holds: Holds,
        tell: Callable[[Event], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._kernel, self._words, self._ledger = kernel, words, ledger
        self._instances, self._networks, self._holds = instances, networks, holds
        self._tell, self._interval_s = tell, interval_s
        self._due: dict[int, int] = {}
        self._alarmed: set[int] = set()
        self._stop = threading.Event()
        self._unwritten = False
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        Path("/proc/thread-self/comm").write_text("sweeper")  # for whoever looks at the agent's threads
        due_l2 = 0
        while not self._stop.wait(min(INTERVAL_MIN_S, self._interval_s)):
            self._flush()
            try:
                self._pass_on_rest()
                self._sweep_due()
                if ktime_ns() >= due_l2:
                    self.age_l2()
                    due_l2 = ktime_ns() + int(self._interval_s * 1e9)
            except DatapathError:
                _log.exception("a sweep failed; the next one goes on")

    def _flush(self) -> None:
        """A disk that is full keeps nothing from its end, and is told of once."""
        try:
            self._ledger.flush()
        except DatapathError as error:
            if not self._unwritten:
                _log.warning("tried again until it is written: %s", error)
            self._unwritten = True
        else:
            self._unwritten = False

    def _pass_on_rest(self) -> None:
        for instance in self._instances:
            target, shut = self._words.gate(instance.slot)
            gate_open = target != C.GATE_NONE and not shut
            self._holds.pass_on_rest(instance, gate_open=gate_open, running=self._words.running(instance.slot))

    def _sweep_due(self) -> None:
        now = ktime_ns()
        for instance in self._instances:
            if self._due.get(instance.slot, 0) <= now and self._words.running(instance.slot):
                self.sweep(instance)
                self._due[instance.slot] = ktime_ns() + int(self._pause_s(instance) * 1e9)

    def _pause_s(self, instance: Instance) -> float:
        timeouts = self._kernel.ports.view["timeouts"][instance.slot]
        shortest = int(timeouts[timeouts > 0].min(initial=1 << 31)) / 1000
        return max(INTERVAL_MIN_S, min(self._interval_s, shortest / 4))

    def sweep(self, instance: Instance) -> None:
        """Expire what is old, and make room before the table is full."""
        counts = self._control("ct_expire", instance)
        if counts is None:
            return
        instance.connections = int(counts["live"][0])
        self._alarm(instance)

    def _alarm(self, instance: Instance) -> None:
        room = instance.table.entries
        used = instance.connections / room
        if used >= ALARM:
            if instance.slot not in self._alarmed:
                self._alarmed.add(instance.slot)
                data = {"connections": instance.connections, "connections_max": room}
                self._tell(Event("alarm", instance.ref, data))
            self._control("ct_early_drop", instance, limit=max(1, instance.connections - int(room * ALARM)))
        elif used < _ALARM_ENDS:
            self._alarmed.discard(instance.slot)

    def _control(self, program: str, instance: Instance, limit: int = 0) -> np.ndarray | None:
        context = self._kernel.context("ct_sweep", slot=instance.slot, limit=limit)
        try:
            self._kernel.run(program, context)
        except KernelError as error:
            if error.errno in (errno.EBUSY, errno.ENOENT):  # quiesced or purged since
                return None
            raise
        return context

    # ---- L2 ----

    def age_l2(self) -> None:
        """Delete learned entries that are older than their network allows; count what each port and network has."""
        keys, entries = self._kernel.l2.read()
        learned = (entries["flags"] & (C.L2_F_STATIC | C.L2_F_LOCATION)) == 0
        old = learned & (self._ages(entries) > self._limits(keys))
        self._kernel.l2.delete_many(keys[old])
        ours = entries["kind"] == C.L2_PORT
        for key, slot in zip(keys[old & ours], entries["target"][old & ours].tolist(), strict=True):
            self._note(slot, key)
        self._correct(entries["target"][learned & ~old & ours])
        self._make_room(keys["network"][learned & ~old & ~ours])

    def _ages(self, entries: np.ndarray) -> np.ndarray:
        now = np.uint64(ktime_ns())
        ages: np.ndarray = now - np.minimum(entries["seen"], now)
        return ages

    def _limits(self, keys: np.ndarray) -> np.ndarray:
        limits = np.full(self._kernel.networks.entries, np.iinfo(np.uint64).max, np.uint64)
        for index, network in self._networks.known().items():
            limits[index] = int(network.ageing_s * 1e9)
        found: np.ndarray = limits[np.minimum(keys["network"], len(limits) - 1)]
        return found

    def _note(self, slot: int, key: np.ndarray) -> None:
        """The entry of a port that is being carried is gone: its migration wants to know."""
        instance = self._instances.at(slot)
        if instance is None or instance.dirty is None:
            return
        instance.dirty.set(l2_dirty_keys(key.reshape(1))[0], 1)

    def _correct(self, slots: np.ndarray) -> None:
        counts = np.bincount(slots, minlength=self._kernel.slots)
        for instance in self._instances:
            self._kernel.ports.view["learned"][instance.slot] = counts[instance.slot]

    def _make_room(self, networks: np.ndarray) -> None:
        """How many MACs networks have learned from outside, and how many they may.

        Half of the table is kept for what has to find room: places of VMs and what ports learn.
        """
        room = self._kernel.learning
        records = np.zeros(room.entries, room.value)
        records["count"] = np.bincount(networks, minlength=room.entries)[: room.entries]
        records["count"][ALL_NETWORKS] = len(networks)
        records["max"] = max(1, self._kernel.l2.entries // LEARNED_OF_NETWORK)
        records["max"][ALL_NETWORKS] = max(1, self._kernel.l2.entries // LEARNED_OUTSIDE)
        room.load(np.arange(room.entries, dtype=room.key), records)
