"""Kind `sampling` in the kernel: which ports are sampled, and the thread that tells collectors of them by sFlow.

Samples are told within BATCH_S, whichever port's they are; a port that stops has its own told at once, so that all its
numbers are final when they go to the next host.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from datapath.drivers.ebpf.clock import ktime_ns
from datapath.drivers.ebpf.collectors import Collectors, unreachable
from datapath.drivers.ebpf.events import Ring
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kindtable import KindTable
from datapath.drivers.ebpf.layout import SAMPLE, C
from datapath.drivers.ebpf.maps import Records
from datapath.drivers.ebpf.subagents import SubAgent, age_ns
from datapath.errors import LoadRejected
from datapath.provider import NetworkKind
from datapath.state.kind import Record
from datapath.state.sampling import SAMPLING, fault

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

_log = logging.getLogger(__name__)

BATCH_S = 0.05
"""The specification allows a second before a sample is told."""
_AT_ONCE = 256  # samples that are told while a port that stops waits
_LOOK_AGAIN_S = 0.5
_WRITTEN_S = 0.05  # a program that writes to the ring takes microseconds
_LIVE = ("pool", "next", "drops", "datagrams", "unsent", "flow_samples", "counter_samples")


class SamplingTable(KindTable):
    """`_lock` guards the ring's read side, `_waiting` and all sub-agents."""

    kind = SAMPLING

    def __init__(self, parts: Running) -> None:
        super().__init__(parts)
        self._numbers = parts.kernel.samplings
        self._ring_fd = parts.kernel.switch.map_fd("samples")
        self._ring = Ring(self._ring_fd, SAMPLE)
        self._waiting: list[Records] = []  # read, and not told yet
        self._agents: dict[int, SubAgent] = {}
        self._collectors = Collectors()
        self._lock = threading.Lock()
        self._wake = os.eventfd(0)
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)

    # ---- configuration ----

    def apply(self, instance: Instance, records: Sequence[Record], before: Sequence[Record]) -> None:  # noqa: ARG002
        if len(records) > 1:
            raise LoadRejected("sampling: a port is one sub-agent", hint="delete its record before another is loaded")
        for record in records:
            if problem := fault(record):
                raise LoadRejected(f"sampling: {problem}", hint="docs/sflow.md has what may be configured")
        if not records:
            self.clear(instance.slot)
            return
        with self._lock:
            self._check_number(instance, records[0])
            self._begin(instance, records[0])

    def _check_number(self, instance: Instance, record: Record) -> None:
        """Two ports that tell as one would be a source whose numbers jump."""
        ours = (instance.ref.vm, instance.ref.mac)
        for other in self._agents.values():
            ref = other.instance.ref
            same = all(other.record[name] == record[name] for name in ("agent", "sub_agent"))
            if same and (ref.vm, ref.mac) != ours:
                raise LoadRejected(
                    f"sampling: sub-agent {record['sub_agent']} of {record['agent']} is port {ref.mac} of VM {ref.vm}",
                    hint="give each port a number of its own",
                )

    def _begin(self, instance: Instance, record: Record) -> None:
        """Numbers that are in the map go on: another sub-agent is another record, and this one is cleared before."""
        slot, view = instance.slot, self._numbers.view
        known, begins = self._agents.get(slot), not view["began"][slot]
        if known is not None or begins:  # else an agent before this one sampled so: what it left in the ring is told
            self._flush(slot)  # as it was configured until now; of a port that was in the slot before, nothing is told
        if begins:
            view[slot] = np.zeros((), self._numbers.value)
            view["began"][slot] = ktime_ns()
        if view["rate"][slot] != record["rate"]:
            self._numbers.store(slot, "next", 0)
        view["header_bytes"][slot], view["rate"][slot] = record["header_bytes"], record["rate"]
        made = SubAgent(instance, record, self._numbers, self._collectors, self._network_vlan)
        if known is not None:
            made.before = known.before
        self._agents[slot] = made
        self._parts.words.feature(slot, add=C.FEATURE_SAMPLE)

    def clear(self, slot: int) -> None:
        with self._lock:
            self._parts.words.feature(slot, drop=C.FEATURE_SAMPLE)
            self._agents.pop(slot, None)
            self._numbers.view[slot] = np.zeros((), self._numbers.value)

    def obstacles(self, records: Sequence[Record]) -> list[str]:
        asked = {(address, port) for record in records for address, port in record["collectors"]}
        found = {endpoint: unreachable(*endpoint) for endpoint in sorted(asked)}
        return [
            f"Collector {address} (UDP port {port}) of sFlow cannot be reached from this host: {why}."
            for (address, port), why in found.items()
            if why
        ]

    def _network_vlan(self, instance: Instance, vid: int) -> int:
        """Tag that a frame has in the network, whose tag at the guest is `vid`; 0 none."""
        record = instance.entry.record
        name = record["trunk"].get(str(vid), "") if vid else record["network"]
        network = next((one for one in self._parts.networks.all() if one.name == name), None)
        return network.vlan if network is not None and network.kind is NetworkKind.UPLINK else 0

    # ---- what is live ----

    def dump(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        """What was sampled until now has been told then."""
        slot, view = instance.slot, self._numbers.view
        with self._lock:
            self._flush(slot)
        live = {name: int(view[name][slot]) for name in _LIVE}
        live["age_ns"] = age_ns(int(view["began"][slot]))
        own = self._parts.counters.own(slot)
        with self._lock:
            counters = self._agents[slot].totals(own)
        return [{**record, **live, "counters": counters} for record in records]

    def restore(self, instance: Instance, records: Sequence[Record]) -> None:
        slot = instance.slot
        with self._lock:
            for record in records:
                for name in (name for name in _LIVE if name in record):
                    self._numbers.store(slot, name, record[name])
                if "age_ns" in record:  # may be older than this host
                    self._numbers.store(slot, "began", (ktime_ns() - record["age_ns"]) % (1 << 64))
                self._agents[slot].before = record.get("counters", {})

    def opened(self, instance: Instance) -> None:
        with self._lock:
            if instance.slot in self._agents:
                self._agents[instance.slot].due_ns = ktime_ns()
        os.eventfd_write(self._wake, 1)

    def quiesced(self, instance: Instance) -> None:
        """No program puts anything into the ring for the port any more."""
        with self._lock:
            self._flush(instance.slot)

    # ---- the thread ----

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when what was in the ring has been told."""
        self._ending = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake)
        self._collectors.close()

    def _run(self) -> None:
        with select.epoll() as any_of, select.epoll() as wake:
            any_of.register(self._ring_fd, select.EPOLLIN)
            for poll in (any_of, wake):
                poll.register(self._wake, select.EPOLLIN)
            while not self._ending:
                ready = {fd for fd, _ in any_of.poll(_LOOK_AGAIN_S)}
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._work()
                if self._ring_fd in ready:
                    wake.poll(BATCH_S)
            self._work()

    def _work(self) -> None:
        try:
            with self._lock:
                self._pull()
            while self._waiting:
                with self._lock:  # in parts, for whoever waits for it
                    self._tell()
            self._poll_counters()
        except Exception:
            _log.exception("samples were not told to their collectors")

    def _flush(self, slot: int) -> None:
        """Tell what one port has in the ring."""
        self._pull()
        self._tell(slot)

    def _pull(self) -> None:
        """What is in the ring now, also what a program is still writing there."""
        end, deadline = self._ring.written(), time.monotonic() + _WRITTEN_S
        while self._ring.read_to() < end and time.monotonic() < deadline:
            samples = self._ring.read()
            if len(samples):
                self._waiting.append(samples)

    def _tell(self, slot: int | None = None) -> None:
        """The next ones that wait; with `slot` all of that port and no others."""
        if slot is None:
            first = self._waiting[0] if self._waiting else np.zeros(0, SAMPLE)
            batch, rest = first[:_AT_ONCE], first[_AT_ONCE:]
            self._waiting[:1] = [rest] if len(rest) else []
        else:
            whole = np.concatenate(self._waiting) if self._waiting else np.zeros(0, SAMPLE)
            batch, rest = whole[whole["slot"] == slot], whole[whole["slot"] != slot]
            self._waiting = [rest] if len(rest) else []
        for found in np.unique(batch["slot"]).tolist():
            agent = self._agents.get(found)
            if agent is not None:
                mine = (batch["slot"] == found) & (batch["epoch"] == agent.instance.ref.epoch)
                agent.tell(batch[mine])

    def _poll_counters(self) -> None:
        """A port that does not run tells nothing: at its next host it tells at once."""
        now = ktime_ns()
        with self._lock:
            for slot, agent in self._agents.items():
                polling_ns = agent.record["polling_s"] * 1_000_000_000
                if polling_ns and agent.due_ns <= now and self._parts.words.running(slot):
                    agent.due_ns = now + polling_ns
                    up = bool(self._parts.kernel.ports.view["ifindex"][slot])
                    agent.tell_counters(self._parts.counters.own(slot), up=up)
