"""Kind `qos` in the kernel: buckets and marks in the map `qos`, classes of HTB where a port shapes.

To the guest HTB is the root of the port's own device, from the guest the host's shaper. While a VM moves, classes are
open from the hold on: what waits leaves, to the guest or to the network, before the VM stands elsewhere. The bucket has
been charged for it and keeps the rate.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datapath.drivers.ebpf import htb
from datapath.drivers.ebpf.clock import barrier, ktime_ns
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kindtable import KindTable
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.shaper import Shaper
from datapath.errors import Error, FeatureMissing, KernelError, LoadRejected
from datapath.state.kind import Record
from datapath.state.qos import KEEP, QOS, fault

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

_log = logging.getLogger(__name__)
_DIRECTIONS: Mapping[str, int] = {"from": 0, "to": 1}
_CLASS = 1  # of a port's own device
_BYTE_NS = 8_000_000_000
_FASTER = 1_000_002  # millionths: the bucket's rate by HTB's, or a queue would shrink that is never empty
_EMPTY_S, _LOOK_AGAIN_S = 1.0, 0.0002


_Class = tuple[int, int, Record]  # device, number, what it is for


class Qos(KindTable):
    kind = QOS

    def __init__(self, parts: Running) -> None:
        super().__init__(parts)
        self._map = parts.kernel.qos
        self._shaper = Shaper(parts.kernel, parts.attachments, parts.options.tap_prefix)
        self._devices: dict[int, int] = {}  # slot -> ifindex with HTB on it
        self._open: set[int] = set()  # slots whose classes hold nothing back
        self._lock = threading.Lock()  # of the two

    # ---- configuration ----

    def apply(self, instance: Instance, records: Sequence[Record], before: Sequence[Record]) -> None:  # noqa: ARG002
        for record in records:
            if wrong := fault(record):
                raise LoadRejected(f"qos {record['direction']} port {instance.ref.mac}: {wrong}")
        slot, ways = instance.slot, _by_direction(records)
        with self._lock:
            self._open.discard(slot)
        try:
            with contextlib.ExitStack() as undo:
                self._begin_queues(instance, ways, undo)
                undo.pop_all()
        except (FeatureMissing, KernelError) as error:
            raise LoadRejected(f"port {instance.ref.mac} cannot be shaped: {error.message}", hint=error.hint) from error
        shapes = _shapes(ways.get("from"))
        for name, direction in _DIRECTIONS.items():
            shaper = self._shaper.ifindex if name == "from" and shapes else 0
            self._set_way(slot * 2 + direction, ways.get(name), shaper)
        self._set_features(slot, ways, shapes)
        self._end_queues(instance, ways)

    def _begin_queues(self, instance: Instance, ways: Mapping[str, Record], undo: contextlib.ExitStack) -> None:
        """All that can fail. `undo` gets what brings back the queues that were there."""
        ifindex = int(self._parts.kernel.ports.view["ifindex"][instance.slot])
        if ifindex and _shapes(ways.get("to")):
            self._shape_device(instance, ifindex, ways["to"], undo)
        if _shapes(ways.get("from")):
            self._shape_host(instance.slot, ways["from"], _by_direction(_records(instance)).get("from"), undo)

    def _end_queues(self, instance: Instance, ways: Mapping[str, Record]) -> None:
        """Of directions that shape no more: what waits leaves first. The port is as configured whatever comes of it."""
        ended = [one for one in self._classes(instance) if not _shapes(ways.get(one[2]["direction"]))]
        try:
            self._open_classes(ended)
            self._wait_empty(instance, ended)
            if not _shapes(ways.get("to")):
                self._leave_device(instance.slot)
            if not _shapes(ways.get("from")):
                self._shaper.leave(instance.slot)
        except KernelError as error:
            _log.warning("port %s: a queue that it needs no more is left: %s", instance.ref.mac, error)

    def _shape_host(self, slot: int, way: Record, known: Record | None, undo: contextlib.ExitStack) -> None:
        shaper = self._shaper.use(slot)
        if known is not None and _shapes(known):
            undo.callback(_change_class, shaper, slot, known)
        else:
            undo.callback(self._shaper.leave, slot)
        self._set_class(shaper, slot, way)

    def _shape_device(self, instance: Instance, ifindex: int, way: Record, undo: contextlib.ExitStack) -> None:
        kind = htb.foreign(ifindex)
        if kind:
            raise LoadRejected(
                f"device {instance.entry.device} of port {instance.ref.mac} has another's qdisc {kind}",
                hint="take it off (libvirt's <bandwidth>, or tc qdisc), or police instead of shape",
            )
        known = _by_direction(_records(instance)).get("to")
        if known is not None and _shapes(known):
            undo.callback(_change_class, ifindex, _CLASS, known)
        else:
            undo.callback(self._leave_device, instance.slot)
        with self._lock:
            self._devices = {slot: one for slot, one in self._devices.items() if one != ifindex}
            self._devices[instance.slot] = ifindex
        htb.set_root(ifindex)
        self._set_class(ifindex, _CLASS, way)

    def _leave_device(self, slot: int) -> None:
        with self._lock:
            ifindex = self._devices.pop(slot, 0)
        if ifindex:
            htb.remove_root(ifindex)

    def _set_class(self, ifindex: int, number: int, way: Record) -> None:
        htb.set_class(ifindex, number, way["rate_bps"] // 8, way["burst_bytes"] // 2, way["priority"])

    def _set_way(self, index: int, way: Record | None, shaper: int) -> None:
        """Field by field: `due` and what was dropped stay."""
        element = self._map.view[index : index + 1]
        if way is None:
            element[:] = np.zeros(1, self._map.value)
            return
        limited, marked = way["mode"] != "none", way["dscp"] != KEEP
        byte_ns = _BYTE_NS / way["rate_bps"] if limited else 0.0
        element["interval"] = int(byte_ns * (1 << C.QOS_SHIFT) / _FASTER * 1_000_000)
        element["burst"] = int(byte_ns * way["burst_bytes"])
        element["dscp"] = way["dscp"] if marked else 0
        element["priority"] = way["priority"]
        element["shaper"] = shaper
        flags = (C.QOS_F_LIMIT if limited else 0) | (C.QOS_F_MARK if marked else 0)
        element["flags"] = flags | (C.QOS_F_SHAPE if way["mode"] == "shape" else 0)

    def _set_features(self, slot: int, ways: Mapping[str, Record], shapes: bool) -> None:
        wanted = C.FEATURE_POLICE_FROM if "from" in ways else 0
        wanted |= C.FEATURE_POLICE_TO if "to" in ways else 0
        wanted |= C.FEATURE_SHAPE if shapes else 0
        known = C.FEATURE_POLICE_FROM | C.FEATURE_POLICE_TO | C.FEATURE_SHAPE
        self._parts.words.feature(slot, add=wanted, drop=known)

    def clear(self, slot: int) -> None:
        self._set_features(slot, {}, False)
        self._map.view[slot * 2 : slot * 2 + 2] = np.zeros(2, self._map.value)
        self._leave_device(slot)
        self._shaper.leave(slot)
        with self._lock:
            self._open.discard(slot)

    def plugged(self, instance: Instance) -> None:
        ifindex = int(self._parts.kernel.ports.view["ifindex"][instance.slot])
        for way in _records(instance):
            if way["direction"] == "to" and _shapes(way) and ifindex:
                with contextlib.ExitStack() as undo:
                    self._shape_device(instance, ifindex, way, undo)
                    undo.pop_all()

    def obstacles(self, records: Sequence[Record]) -> list[str]:
        found = [f"Port's qos: {wrong}." for record in records if (wrong := fault(record))]
        if any(_shapes(record) for record in records):
            try:
                self._shaper.check()
            except Error as error:
                found.append(f"This host cannot shape: {error}.")
        return found

    # ---- what is live and counted ----

    def dump(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        now = ktime_ns()
        return [
            {**record, **self._level(instance, record, now), **self._dropped(instance, record)} for record in records
        ]

    def _level(self, instance: Instance, record: Record, now: int) -> Record:
        return {"debt_ns": max(0, int(self._element(instance, record)["due"]) - now)}

    def _dropped(self, instance: Instance, record: Record) -> Record:
        element, carried = self._element(instance, record), instance.entry.carried.get(QOS.name, {})
        before = carried.get(record["direction"], [0, 0])
        counted = (int(element["dropped_packets"]), int(element["dropped_bytes"]))
        return dict(zip(QOS.accounting, (one + here for one, here in zip(before, counted, strict=True)), strict=True))

    def _element(self, instance: Instance, record: Record) -> Any:
        return self._map.view[instance.slot * 2 + _DIRECTIONS[record["direction"]]]

    def restore(self, instance: Instance, records: Sequence[Record]) -> None:
        for record in records:
            self._element(instance, record)["due"] = ktime_ns() + record["debt_ns"]

    def account(self, instance: Instance, records: Sequence[Record]) -> None:
        known = instance.entry.carried.get(QOS.name, {})
        given = {one["direction"]: [one.get(name, 0) for name in QOS.accounting] for one in records}
        if {**known, **given} != known:
            instance.entry = instance.entry.with_carried(QOS.name, {**known, **given})
            self._parts.ledger.save_carried(instance.entry)

    def counted(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        return [{"direction": one["direction"], **self._dropped(instance, one)} for one in records]

    # ---- a move ----

    def held(self, instance: Instance) -> None:
        self._open_classes(self._classes(instance))
        with self._lock:
            self._open.add(instance.slot)

    def _open_classes(self, classes: Sequence[_Class]) -> None:
        for ifindex, number, way in classes:
            htb.change_class(ifindex, number, htb.OPEN_BYTES_S, way["burst_bytes"] // 2, way["priority"])

    def idle(self, instance: Instance) -> bool:
        return not _waiting(self._classes(instance))

    def quiesced(self, instance: Instance) -> None:
        """The queues of a port that was held are open since; now they are empty, or their last frame still pays."""
        classes = self._classes(instance)
        if instance.slot not in self._open and _waiting(classes):  # an agent that started again closed them
            self.held(instance)
        self._wait_empty(instance, classes)
        if classes:
            barrier()  # what left a queue last has reached the wire

    def _wait_empty(self, instance: Instance, classes: Sequence[_Class]) -> None:
        deadline = time.monotonic() + _EMPTY_S
        while left := _waiting(classes):
            if time.monotonic() > deadline:
                _log.warning("port %s: %d frames did not leave its shaper in time", instance.ref.mac, left)
                return
            time.sleep(_LOOK_AGAIN_S)

    def opened(self, instance: Instance) -> None:
        with self._lock:
            was_open = instance.slot in self._open
            self._open.discard(instance.slot)
        if was_open:
            for ifindex, number, way in self._classes(instance):
                _change_class(ifindex, number, way)

    def _classes(self, instance: Instance) -> list[_Class]:
        """Of each direction that shapes here now."""
        places = {"from": (self._shaper.ifindex, instance.slot), "to": (self._devices.get(instance.slot, 0), _CLASS)}
        return [
            (*places[way["direction"]], way)
            for way in _records(instance)
            if _shapes(way) and places[way["direction"]][0]
        ]

    def destroy(self) -> None:
        self._shaper.remove()


def _waiting(classes: Sequence[_Class]) -> int:
    """Frames."""
    return sum(htb.waiting(ifindex, number) for ifindex, number, _ in classes)


def _change_class(ifindex: int, number: int, way: Record) -> None:
    htb.change_class(ifindex, number, way["rate_bps"] // 8, way["burst_bytes"] // 2, way["priority"])


def _by_direction(records: Sequence[Record]) -> dict[str, Record]:
    return {record["direction"]: record for record in records}


def _records(instance: Instance) -> Sequence[Record]:
    return instance.entry.kinds.get(QOS.name, ())


def _shapes(way: Record | None) -> bool:
    return way is not None and way["mode"] == "shape"
