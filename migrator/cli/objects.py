"""Changes of the coordinator's objects, as `migrator watch` filters and tells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context
from migrator.cli.reacting import Told
from migrator.table import plain

SORTS = ("network", "address-set", "policy", "port", "place", "migration", "host")
_SCALAR = (str, int, float, bool)


@dataclass
class _Known:
    """Objects that have been seen, and the VM of each. `all`: from the snapshot on, so that it knows what is new."""

    all: bool
    vms: dict[tuple[str, str], str] = field(default_factory=dict)

    def take(self, change: pb.Change) -> tuple[str, str]:
        """The operation, and the VM that the object is of."""
        key = (change.sort, change.name)
        new = key not in self.vms
        vm = self.vms.get(key, "") if change.removed else _vm(change)
        if change.removed:
            self.vms.pop(key, None)
            return "removed", vm
        self.vms[key] = vm
        return "added" if new and self.all else "changed", vm


def _vm(change: pb.Change) -> str:
    object_ = getattr(change, change.sort.replace("-", "_"))
    return str(getattr(object_, "vm", ""))


def objects(context: Context, request: pb.WatchRequest, *, vm: str, name: str) -> Iterator[Told]:
    """`vm`: uuid or name of a VM, `name`: of objects, with wildcards; "" all. The end of the snapshot comes always."""
    known, uuids, names = _Known(not request.from_revision), {vm.lower()}, dict[str, str]()
    if vm:
        uuids |= {port.vm for port in context.coordinator.Show(pb.Empty()).ports if port.name == vm}
    for change in context.coordinator.Watch(request, timeout=None):
        if change.snapshot_end:
            yield Told("current", "", plain(change), partial(line, change), snapshot=True, end=True)
            continue
        op, of = known.take(change)
        if change.sort == "port" and not change.removed:
            names[of] = change.port.name
            if vm and change.port.name == vm:
                uuids.add(of)
        if change.sort == "port" and not of:
            of = change.name.partition("/")[0]
        if (vm and of not in uuids) or (name and not fnmatchcase(change.name, name)):
            continue
        yield _told(change, op, of, names.get(of, ""))


def _told(change: pb.Change, op: str, vm: str, name: str) -> Told:
    body = plain(change)
    record = body.get(change.sort.replace("-", "_"), {})
    head: dict[str, object] = {"op": op, "sort": change.sort, "object": change.name, "vm": vm, "name": name}
    head |= {"revision": change.revision, "host": record.get("host", "")}
    scalar = {name_: value for name_, value in record.items() if isinstance(value, _SCALAR)}
    parts: dict[str, Mapping[str, Any]] = {"": head, "RECORD_": scalar}
    return Told(op, change.sort, {**body, "op": op}, partial(line, change), parts, snapshot=change.snapshot)


def line(change: pb.Change) -> str:
    """A change in one line."""
    if change.snapshot_end:
        return f"{change.revision}\tsnapshot ends"
    what = "removed" if change.removed else "is" if change.snapshot else "changed"
    return f"{change.revision}\t{change.sort} {change.name} {what}{_detail(change)}"


def _detail(change: pb.Change) -> str:
    if change.removed:
        return ""
    match change.sort:
        case "port":
            return f": at {change.port.host}"
        case "place":
            return f": at {change.place.host}, epoch {change.place.epoch}"
        case "migration":
            m = change.migration
            return f": {m.source} to {m.destination}, {m.phase} {m.outcome}, {m.entries} entries"
        case "host":
            return ": connected" if change.host.connected else ": gone"
        case _:
            return ""
