"""What programs saw, told to the agent: records of the ring `events` as Events of the driver's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from datapath.drivers.ebpf.instances import Instance, Instances
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.pathprobe import PathProbe
from datapath.provider import Event
from datapath.state import drops

_DIRECTIONS = ("from", "to")


class Reports:
    """Called from the reader's thread, so `tell` is too."""

    def __init__(self, instances: Instances, probe: PathProbe, tell: Callable[[Event], None]) -> None:
        self._instances, self._probe, self._tell = instances, probe, tell
        self._kinds: dict[int, Callable[[Instance, Any], None]] = {
            C.EVENT_TRACE: lambda instance, event: self._frame("trace", instance, event),
            C.EVENT_LOG: lambda instance, event: self._frame("log", instance, event),
            C.EVENT_OPENED: lambda instance, _: self._tell(Event("opened", instance.ref)),
            C.EVENT_FULL: self._full,
        }

    def deliver(self, events: np.ndarray[Any, np.dtype[Any]]) -> None:
        """A batch of struct event. What concerns an instance that is gone is dropped."""
        for event in events:
            kind = int(event["type"])
            if kind == C.EVENT_PROBE:
                self._probe.received(_captured(event), int(event["length"]), int(event["rule"]))
                continue
            instance = self._instances.at(int(event["slot"]))
            if instance is not None and instance.ref.epoch == int(event["epoch"]) and kind in self._kinds:
                self._kinds[kind](instance, event)

    def _frame(self, what: str, instance: Instance, event: Any) -> None:
        reason = int(event["reason"])
        data = {
            "time_ns": int(event["time"]),
            "direction": _DIRECTIONS[int(event["direction"]) & 1],
            "verdict": "drop" if reason else "pass",
            "reason": drops.name(reason) if reason else "",
            "rule": int(event["rule"]),
            "length": int(event["length"]),
            "frame": _captured(event),
        }
        self._tell(Event(what, instance.ref, data))

    def _full(self, instance: Instance, _event: Any) -> None:
        self._tell(Event("full", instance.ref, {"connections_max": instance.table.entries}))


def _captured(event: Any) -> bytes:
    return bytes(event["data"][: int(event["captured"])])
