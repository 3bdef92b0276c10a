"""Targets: filters of watches, what an agent tells a watcher, and what an operator declares of a kind at a port."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import yaml

from datapath.errors import Error
from datapath.registry import KINDS
from datapath.state import flow_export, mirror, qos, remap, sampling
from datapath.state.check import checked_records
from datapath.state.kind import Op, Record, Table
from migrator._pb import migrator_pb2 as pb
from migrator.cli.kinds import _checked as checked
from migrator.config import DOCUMENTS, kind_records
from migrator.documents import read_value
from migrator.errors import ConfigInvalid
from migrator.inspect import rows
from migrator.snapshot import decode_section, encode_table
from migrator.watching.compare import identity, told
from migrator.watching.match import filters, parse, shown
from migrator.watching.view import OPS, Update, View
from tests.contract.samples import MAC, keys_of, sample

from .snapshots import resealed
from .target import Target

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
ROWS = 5
FAULTS: dict[str, Callable[[Record], object]] = {
    "qos": qos.fault,
    "sampling": sampling.fault,
    "remap": lambda record: remap.problems([record]),
}
"""What drivers refuse of a record whose types are right: a document must not come to it."""
_OF_KINDS = [DOCUMENTS[name] for name in sorted(DOCUMENTS)]


# ---- filters ----


def watch_filter(data: bytes) -> None:
    """Refused, or it says of each row of a table whether it holds, and its opposite says the opposite."""
    first, *lines = data.decode(errors="replace").split("\n")
    kinds = [name for name in first.split(",") if name in KINDS] or ["conntrack"]
    with suppress(ConfigInvalid):
        matches = [parse(line) for line in lines]
        assert [parse(str(match)) for match in matches] == matches, "reads otherwise than it is written"
        for name, wanted in filters(kinds, matches).items():
            table = sample(name, ROWS)
            mask = wanted.mask(table)
            assert mask.shape == (len(table),) and mask.dtype == np.bool_
            if len(matches) == 1:
                (match,) = matches
                other = parse(f"{match.field}{'' if match.negated else '!'}={','.join(match.values)}")
                assert (filters([name], [other])[name].mask(table) != mask).all()


def filter_lines() -> Iterator[bytes]:
    for name, kind in KINDS.items():
        record = next(iter(rows(sample(name, 1))))
        fields = [field for field in (*identity(kind), *told(kind)) if field in record]
        values = [json.dumps(record[field]).strip('"') for field in fields]
        yield "\n".join([name, *(f"{f}={v}" for f, v in zip(fields, values, strict=True) if v)]).encode()
    for line in (
        *("raddr=10.0.0.0/8", "raddr!=2001:db8::/32,::ffff:10.0.0.1", "lport=1-1024,0x50", "flags!=INBOUND,ASSURED"),
        *("proto=tcp,58", "state=ESTABLISHED", "id=0-18446744073709551615", "lport=-1,18446744073709551616"),
    ):
        yield b"conntrack\n" + line.encode()


# ---- what an agent tells ----


def watch_stream(data: bytes) -> None:
    """Messages, each after its length in two bytes, are refused or make changes that can be printed."""
    view = View(rows)
    with suppress(Error):
        for update in updates(data):
            for change in _changes(view, update):
                assert change.op in OPS
                json.dumps([change.record, change.was])
                assert isinstance(shown(change.record), str)


def _changes(view: View, update: pb.StateUpdate) -> Iterator[object]:
    if update.what == "gone":
        return view.leave(update.vm, update.mac, "h", update.epoch, update.time)
    found = [decode_section(resealed(sealed)).table for sealed in update.sections]
    tables = tuple(table for table in found if table is not None)
    head = (update.what, update.vm, update.mac, update.epoch, update.kind)
    return view.take("h", Update(*head, tables, update.last, update.time))


def updates(data: bytes) -> Iterator[pb.StateUpdate]:
    """What is no message is left out."""
    at = 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2])
        with suppress(Exception):
            yield pb.StateUpdate.FromString(data[at + 2 : at + 2 + size])
        at += 2 + size


def update_streams() -> Iterator[bytes]:
    for kind in KINDS:
        yield _stream(("here", None), *((what, _table(what, kind)) for what in ("whole", "now", "removed", "whole")))
        yield _stream(("here", None), ("now", sample(kind, 1)))
    yield _stream(("here", None), ("whole", sample("qos", 1)), ("gone", None), ("here", None))


def _table(what: str, kind: str) -> Table:
    return keys_of(sample(kind, 2)) if what == "removed" else sample(kind, 3)


def _stream(*parts: tuple[str, Table | None]) -> bytes:
    made = []
    for what, table in parts:
        message = pb.StateUpdate(what=what, vm=VM, mac=MAC, epoch=3, last=True)
        if table is not None:
            message.kind = table.kind
            message.sections.extend(encode_table(table, MAC))
        made.append(message.SerializeToString())
    return b"".join(len(raw).to_bytes(2) + raw for raw in made)


# ---- what is declared at a port ----


def kind_document(data: bytes) -> None:
    """The first byte chooses the kind. Refused, or it gives records that every switch takes, also over RPC and disk."""
    if not data:
        return
    name = sorted(DOCUMENTS)[data[0] % len(DOCUMENTS)]
    with suppress(ConfigInvalid):
        text = checked(name, read_value(data[1:].decode(errors="replace"), "x"))
        assert checked(name, json.loads(text)) == text, "is written otherwise the second time"
        records = checked_records(KINDS[name], Table(name, Op.LOAD, records=kind_records(name, text)))
        for record in records:
            assert not (why := FAULTS.get(name, lambda _: "")(record)), why
        kind = KINDS[name]
        counted = {field: kind.fields[field][0]() for field in (*kind.live, *kind.accounting)}
        records = [{**record, **counted} for record in records]
        table = Table(name, Op.LOAD, records=records)
        again = [decode_section(sealed).table for sealed in encode_table(table, MAC)]
        assert [record for one in again if one is not None for record in one.records or ()] == records
        _endpoints(name, records)


def _endpoints(name: str, records: list[Record]) -> None:
    """Texts that a driver reads once more."""
    for record in records if name == "flow_export" else ():
        for text in record["collectors"]:
            flow_export.endpoint(text)
    for record in records if name == "mirror" else ():
        assert record["output"] == mirror.ACCEPT or mirror.output_text(record)


def kind_documents() -> Iterator[bytes]:
    for name, body in _BODIES:
        choice = bytes([sorted(DOCUMENTS).index(name)])
        yield choice + json.dumps(body).encode()
        yield choice + yaml.safe_dump(body).encode()


_BODIES: tuple[tuple[str, object], ...] = (
    (
        "qos",
        {
            "from": {"rate": "100mbit", "burst": "512KiB", "dscp": "af31"},
            "to": {"mode": "police", "rate": "1.5 gbit/s"},
        },
    ),
    ("qos", {"to": {"priority": 5, "dscp": 46}}),
    (
        "sampling",
        {"rate": 1000, "agent": "10.0.0.1", "sub_agent": 17, "polling": "5s", "header": "64B"}
        | {"collectors": ["192.0.2.9:6343", "2001:db8::9", "[2001:db8::9]:6344"]},
    ),
    (
        "flow_export",
        {"version": "netflow", "collectors": ["192.0.2.1:2055", "[2001:db8::1]:4739"], "source": "10.0.0.1"},
    ),
    (
        "mirror",
        {
            "sessions": [
                {"name": "a", "output": {"device": "mon*"}, "vlans": [0, 20], "snap": "1KiB", "direction": "to"},
                {"name": "b", "output": {"remote": {"address": "192.0.2.7", "vni": 77}}},
                {"name": "c", "output": {"port": f"{VM}/{MAC}"}},
                {"name": "d", "output": {"network": "blue"}},
            ],
            "takes_copies": True,
        },
    ),
    (
        "remap",
        {
            "rules": [
                {"outside": "203.0.113.5", "inside": "10.0.0.5"},
                {
                    "outside": "2001:db8:1::5",
                    "inside": "2001:db8::5",
                    "protocol": "tcp",
                    "outside_port": 8080,
                    "inside_port": 80,
                },
            ]
        },
    ),
)
_MODULES = ("migrator.watching", "migrator.snapshot", "migrator.inspect", "datapath.state", "migrator.config", "yaml")
_NAMES = tuple(name.encode() for kind in KINDS.values() for name in (kind.name, *kind.columns, *kind.fields))
_FIELDS = tuple(name.encode() for one in _OF_KINDS for name in one.model_fields)
TARGETS = (
    Target("watch-filter", watch_filter, filter_lines, _MODULES, (*_NAMES, b"!=", b"0x", b"-", b",", b"/0"), 600),
    Target("watch-stream", watch_stream, update_streams, _MODULES, _NAMES, 16_384),
    Target(
        "kind-document", kind_document, kind_documents, _MODULES, (*_NAMES, *_FIELDS, b"mbit", b"KiB", b"::1%0"), 4096
    ),
)
