"""What a port instance is now, put together from the kernel's words, counters and the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from datapath.drivers.ebpf.instances import Instance
from datapath.errors import NotReady
from datapath.provider import PortStatus

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running


def ports(parts: Running, instances: Iterable[Instance]) -> list[PortStatus]:
    """In the same order; an instance that is just being made or purged may be missing."""
    found = []
    for instance in instances:
        with contextlib.suppress(NotReady):
            found.append(port(parts, instance))
    return found


def port(parts: Running, instance: Instance) -> PortStatus:
    """One instance. Words are read one after the other: a port that changes meanwhile may show half of it."""
    slot, ports = instance.slot, parts.kernel.ports
    counters, drops = parts.counters.split(parts.counters.total(instance))
    return PortStatus(
        ref=instance.ref,
        state=parts.words.state(slot),
        committed=ports.load(slot, "commit") == instance.ref.epoch,
        device=instance.entry.device if ports.view["ifindex"][slot] else "",
        ifindex=int(ports.view["ifindex"][slot]),
        record=dict(instance.entry.record),
        gate=parts.words.gate_text(slot),
        held_to=max(0, int(ports.view["held_to"][slot])),
        held_from=max(0, int(ports.view["held_from"][slot])),
        connections=instance.connections,
        counters=counters,
        drops=drops,
    )
