"""Kind `mirror` in the kernel: a port's mirrors as elements of the map `mirrors` (datapath/bpf/lib/mirror.h)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.copy_names import CopyNames
from datapath.drivers.ebpf.cutter import Cutter
from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.kindtable import KindTable
from datapath.drivers.ebpf.layout import MIRROR as ENTRY
from datapath.drivers.ebpf.layout import MIRROR_COUNT, C
from datapath.drivers.ebpf.ledger import PortEntry
from datapath.drivers.ebpf.maps import Table
from datapath.drivers.ebpf.mirror_outputs import NOWHERE, Links, Output, Outputs
from datapath.errors import LoadRejected
from datapath.provider import Place
from datapath.state.kind import Record
from datapath.state.mirror import ACCEPT, MIRROR, MIRRORS_MAX, output_text

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

Entry = np.ndarray[Any, np.dtype[Any]]
Counts = dict[str, list[int]]
"""Name of a mirror -> packets, bytes, dropped."""

_DIRECTIONS = {"from": 1, "to": 2, "both": 3}
_HINT = "correct the port's mirrors; nothing was changed"


def mirror_totals(mirrors: Table, counts: Table, entry: PortEntry) -> Counts:
    """What a port's mirrors have counted, in these maps and before."""
    carried: Mapping[str, Sequence[int]] = entry.carried.get(MIRROR.name, {})
    numbers = _numbers(mirrors, entry.slot)
    totals: Counts = {}
    for record in entry.kinds.get(MIRROR.name, ()):
        name, number = record["name"], numbers.get(_digest(record["name"]))
        found = None if number is None else counts.get(entry.slot * MIRRORS_MAX + number)
        own = [0, 0, 0] if found is None else [int(found[field].sum(dtype=np.uint64)) for field in MIRROR.accounting]
        totals[name] = [one + before for one, before in zip(own, carried.get(name, (0, 0, 0)), strict=True)]
    return totals


def begin_counting(kernel: Kernel) -> None:
    """Mirrors that came with the maps of another version count from the first frame on."""
    for key in kernel.mirrors.keys().tolist():
        kernel.mirror_counts.set(key, np.zeros((), MIRROR_COUNT))


def _numbers(mirrors: Table, slot: int) -> dict[int, int]:
    """Digest of a mirror's name -> its number in the slot."""
    found = ((number, mirrors.get(slot * MIRRORS_MAX + number)) for number in range(MIRRORS_MAX))
    return {int(entry["name"]): number for number, entry in found if entry is not None and entry["output"]}


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class MirrorTable(KindTable):
    """A mirror keeps its number while it is there, and so its counters. `_lock` guards what is programmed: outputs come
    and go in other threads than ports do."""

    kind = MIRROR

    def __init__(self, parts: Running) -> None:
        super().__init__(parts)
        kernel = parts.kernel
        self._mirrors, self._counts = kernel.mirrors, kernel.mirror_counts
        self._outputs = Outputs(parts)
        self._names = CopyNames(kernel.mirror_ports, parts.instances, self._accepts)
        self._cutter = Cutter(kernel, parts.attachments, f"{parts.options.tap_prefix}c")
        self._known: dict[int, Sequence[Record]] = {}
        self._lock = threading.RLock()

    # ---- make ----

    def apply(self, instance: Instance, records: Sequence[Record], before: Sequence[Record]) -> None:  # noqa: ARG002
        fresh = [record for record in records if record not in instance.entry.kinds.get(MIRROR.name, ())]
        problems = [why for record in fresh if (why := self._refused(instance.entry, record))]
        if len(_mirrors(records)) > MIRRORS_MAX:
            problems.append(f"{len(_mirrors(records))} of one port, {MIRRORS_MAX} are the most")
        if problems:
            raise LoadRejected(f"mirror: {'; '.join(problems[:5])}", hint=_HINT)
        with self._lock:
            self._known[instance.slot] = tuple(records)
            self._program(instance.slot)
            self._names.update(instance.ref)

    def _accepts(self, instance: Instance) -> bool:
        """A stub has no mirrors any more, and sends on what comes for it."""
        records = self._known.get(instance.slot)
        if records is None:
            records = instance.entry.kinds.get(MIRROR.name, ())
        return any(record["output"] == ACCEPT for record in records)

    def _refused(self, entry: PortEntry, record: Record) -> str:
        """A port that is nowhere yet may come; anything else is there, or it is a mistake."""
        own = {entry.record["network"], *entry.record["trunk"].values()}
        if record["output"] == "port" and (record["vm"], record["mac"]) == (entry.ref.vm, entry.ref.mac):
            return f"{record['name']}: its output is the port that it mirrors"
        if record["output"] == "network" and record["network"] in own:
            return f"{record['name']}: its output {output_text(record)} is what it mirrors"
        return "" if record["output"] == "port" else self._outputs.obstacle(record)

    def _program(self, slot: int, links: Links | None = None) -> None:
        """What is there already, with the same name, keeps number and counters."""
        records = _mirrors(self._known.get(slot, ()))
        if any(record["snap_bytes"] for record in records):
            self._cutter.make()
        wanted = self._numbered(slot, records)
        end = max(wanted, default=-1) + 1
        for number in range(end):
            key, record = slot * MIRRORS_MAX + number, wanted.get(number)
            if record is None:
                self._mirrors.set(key, np.zeros((), ENTRY))
                self._counts.delete(key)
            else:
                self._write(key, record, self._outputs.find(record, links))
        for number in range(end, MIRRORS_MAX):
            self._mirrors.delete(slot * MIRRORS_MAX + number)
            self._counts.delete(slot * MIRRORS_MAX + number)
        self._enable(slot, bool(records))
        if not any(record["snap_bytes"] for known in self._known.values() for record in known):
            self._cutter.remove()

    def _numbered(self, slot: int, records: Sequence[Record]) -> dict[int, Record]:
        here = _numbers(self._mirrors, slot)
        kept = {here[_digest(record["name"])] for record in records if _digest(record["name"]) in here}
        free = iter(number for number in range(MIRRORS_MAX) if number not in kept)
        numbered: dict[int, Record] = {}
        for record in records:
            number = here.get(_digest(record["name"]))
            numbered[next(free) if number is None else number] = record
        return numbered

    def _write(self, key: int, record: Record, output: Output) -> None:
        there, entry = self._mirrors.get(key), _entry(record, output)
        told = output.output != C.MIRROR_PORT or output.remote != NOWHERE
        if not told and there is not None and (there["id"], there["mark"]) == (entry["id"], entry["mark"]):
            entry["remote"] = there["remote"]  # an agent that starts has not been told yet where the port is
        if there is None or there["name"] != entry["name"] or key not in self._counts:
            self._counts.set(key, np.zeros((), MIRROR_COUNT))
        if there is None or there.tobytes() != entry.tobytes():
            self._mirrors.set(key, entry)

    def _enable(self, slot: int, on: bool) -> None:
        self._parts.words.feature(slot, add=C.FEATURE_MIRROR if on else 0, drop=C.FEATURE_MIRROR)

    def clear(self, slot: int) -> None:
        with self._lock:
            self._known.pop(slot, None)
            self._program(slot)

    # ---- what is around ----

    def start(self) -> None:
        self._names.restore()
        self._cutter.tidy()
        self.changed()

    def changed(self) -> None:
        with self._lock:
            mirrored = [slot for slot, records in self._known.items() if _mirrors(records)]
            links = devices.links() if mirrored else {}
            for slot in mirrored:
                self._program(slot, links)

    def placed(self, place: Place) -> None:
        self._outputs.placed(place)
        self._replaced(place.mac)

    def unplaced(self, network: str, mac: str) -> None:
        self._outputs.forget(network, mac)

    def _replaced(self, mac: str) -> None:
        with self._lock:
            for slot, records in self._known.items():
                if any(record["mac"] == mac for record in records):
                    self._program(slot)

    def obstacles(self, records: Sequence[Record]) -> list[str]:
        return [why for record in records if (why := self._outputs.obstacle(record))]

    # ---- what is counted ----

    def dump(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        totals = self._totals(instance)
        return [{**record, **_counted(totals[record["name"]])} for record in records]

    def counted(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        totals = self._totals(instance)
        return [{"name": record["name"], **_counted(totals[record["name"]])} for record in records]

    def account(self, instance: Instance, records: Sequence[Record]) -> None:
        before = instance.entry.carried.get(MIRROR.name, {})
        there = {record["name"] for record in instance.entry.kinds.get(MIRROR.name, ())}
        amounts = {one["name"]: [one.get(field, 0) for field in MIRROR.accounting] for one in records}
        carried = {name: amount for name, amount in {**before, **amounts}.items() if name in there}
        if carried != before:
            instance.entry = instance.entry.with_carried(MIRROR.name, carried)
            self._parts.ledger.save_carried(instance.entry)

    def _totals(self, instance: Instance) -> Counts:
        with self._lock:
            return mirror_totals(self._mirrors, self._counts, instance.entry)


def _mirrors(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["output"] != ACCEPT]


def _counted(amounts: Sequence[int]) -> Record:
    return dict(zip(MIRROR.accounting, amounts, strict=True))


def _entry(record: Record, output: Output) -> Entry:
    entry: Entry = np.zeros((), ENTRY)
    for field in ("output", "target", "vid", "id", "mark"):
        entry[field] = getattr(output, field)
    entry["remote"] = np.frombuffer(output.remote, ">u4")
    entry["directions"] = _DIRECTIONS[record["direction"]]
    entry["snap"], entry["name"] = record["snap_bytes"], _digest(record["name"])
    entry["filtered"] = bool(record["vlans"])
    for vlan in record["vlans"]:
        entry["vlans"][vlan // 64] |= np.uint64(1 << vlan % 64)
    return entry
