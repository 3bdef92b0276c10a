"""Whole snapshots: header, sections, trailer; and what other versions of them do to a reader."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from datapath.registry import KINDS
from datapath.state.kind import Column, Kind, Nature, Table
from migrator.errors import Corrupt, Incompatible, SnapshotError
from migrator.snapshot import Header, KindInfo, SnapshotReader, Tally, decode_section, encode_table, snapshot
from tests.contract.samples import MAC, sample
from tests.unit.strategies import joined, same
from tests.unit.test_snapshot_hostile import HEADER, TABLES, WHOLE, fields_of, objects, seal

OTHER_MAC = "02:00:00:00:00:02"
FDB = KINDS["fdb"]


def test_header_and_summary() -> None:
    reader = SnapshotReader(io.BytesIO(WHOLE["zstd"]))
    assert reader.header == HEADER
    assert len(list(reader)) == 4
    summary = reader.summary
    assert summary.counts == {(MAC, "port"): 1, (MAC, "acl"): 5, (MAC, "fdb"): 4, (MAC, "conntrack"): 6}
    assert (summary.tally.sections, summary.tally.records, summary.skipped) == (4, 16, {})


def test_an_empty_snapshot_is_one() -> None:
    reader = SnapshotReader(io.BytesIO(b"".join(snapshot(Header("vm", "a", "dummy", {}), []))))
    assert list(reader) == []


def test_the_magic_and_the_format_come_first() -> None:
    """Readers of any version find them there: that can never change."""
    assert WHOLE["none"][1:34] == b"\xa5magic\xb4vm-netstate-snapshot\xa6format"[:33]


@pytest.mark.parametrize(("port", "kind"), [(OTHER_MAC, "fdb"), (MAC, "conntrack")])
def test_what_the_header_does_not_announce_is_not_written(port: str, kind: str) -> None:
    header = Header("vm", "a", "dummy", {"fdb": KindInfo(1)}, (MAC,))
    with pytest.raises(SnapshotError, match="announce"):
        list(snapshot(header, [(port, sample(kind, 1))]))


def test_what_the_header_does_not_announce_is_not_read() -> None:
    parts = objects(WHOLE["none"])
    header = fields_of(parts[0])
    for changed in ({**header, "ports": [OTHER_MAC]}, {**header, "kinds": {"fdb": {"version": 1}}}):
        with pytest.raises(Corrupt, match="announce"):
            list(SnapshotReader(io.BytesIO(seal(changed) + b"".join(parts[1:]))))


def test_streams_are_read_and_written_in_bounded_memory() -> None:
    count, tables = 20_000, 40
    part = sample("conntrack", count)

    def many() -> Iterator[tuple[str, Table]]:
        for number in range(tables):
            ports = np.full(count, number, dtype="<u2")
            yield MAC, Table("conntrack", columns={**(part.columns or {}), "rport": ports}, port_time_ns=1)

    header = Header("vm", "a", "dummy", {"conntrack": KindInfo(1)}, (MAC,))
    stream = _Pipe(snapshot(header, many(), codec="none"))
    tracemalloc.start()
    try:
        read = sum(section.count for section in SnapshotReader(stream))  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == count * tables
    assert stream.size > 70 << 20
    assert peak < 16 << 20


class _Pipe:
    """A stream that makes its bytes when they are read."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._rest, self.size = parts, b"", 0

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (part := next(self._parts, None)) is not None:
            self._rest += part
            self.size += len(part)
        given, self._rest = self._rest[:size], self._rest[size:]
        return given


# ---- other versions ----


def older(kind: Kind, *names: str) -> Kind:
    """The kind as it was before these columns."""
    return dataclasses.replace(kind, columns={n: c for n, c in kind.columns.items() if n not in names})


def test_missing_optional_columns_have_their_defaults() -> None:
    old = older(FDB, "age_ns", "moves")
    table = Table("fdb", columns={n: a for n, a in (sample("fdb", 5).columns or {}).items() if n in old.columns})
    (raw,) = encode_table(table, MAC, kinds={"fdb": old})
    decoded = decode_section(raw).table
    assert decoded is not None and decoded.columns is not None
    assert decoded.columns["moves"].tolist() == [0] * 5
    assert decoded.columns["mac"].tobytes() == (table.columns or {})["mac"].tobytes()


def test_defaults_that_are_not_zero() -> None:
    new = dataclasses.replace(FDB, columns={**FDB.columns, "n": Column("<u4", 7), "b": Column("V3", b"abc")})
    (raw,) = encode_table(sample("fdb", 2), MAC)
    decoded = decode_section(raw, kinds={"fdb": new}).table
    assert decoded is not None and decoded.columns is not None
    assert decoded.columns["n"].tolist() == [7, 7]
    assert decoded.columns["b"].tobytes() == b"abcabc"


def test_unknown_columns_are_skipped() -> None:
    (raw,) = encode_table(sample("fdb", 5), MAC)
    decoded = decode_section(raw, kinds={"fdb": older(FDB, "moves")}).table
    assert decoded is not None and decoded.columns is not None
    assert set(decoded.columns) == set(FDB.columns) - {"moves"}


def test_unknown_and_missing_fields_of_records() -> None:
    acl = KINDS["acl"]
    new = dataclasses.replace(
        acl, fields={**acl.fields, "comment": (str,), "tags": (list,)}, defaults={"comment": "", "tags": []}
    )
    (raw,) = encode_table(sample("acl", 2), MAC)
    newer = decode_section(raw, kinds={"acl": new}).table
    assert newer is not None and newer.records is not None
    assert [(r["comment"], r["tags"]) for r in newer.records] == [("", [])] * 2
    assert newer.records[0]["tags"] is not newer.records[1]["tags"]
    (raw,) = encode_table(newer, MAC, kinds={"acl": new})
    decoded = decode_section(raw).table
    assert decoded is not None
    assert same(decoded, sample("acl", 2))


def test_unknown_fields_of_a_section_are_ignored() -> None:
    (raw,) = encode_table(sample("fdb", 5), MAC)
    decoded = decode_section(seal({**fields_of(raw), "colour": "blue"})).table
    assert decoded is not None
    assert same(decoded, sample("fdb", 5))


def test_an_older_version_of_a_kind_is_read_and_a_newer_one_refused() -> None:
    (raw,) = encode_table(sample("fdb", 5), MAC)
    newer = {"fdb": dataclasses.replace(FDB, version=2)}
    assert decode_section(raw, kinds=newer).version == 1
    (raw,) = encode_table(sample("fdb", 5), MAC, kinds=newer)
    with pytest.raises(Incompatible, match="fdb version 2; this host knows 1"):
        decode_section(raw)


VLANS = Kind("vlans", 1, Nature.LIVE, key=("vid",), required=False, columns={"vid": Column("<u2")})


def with_vlans(kind: Kind) -> bytes:
    table = Table("vlans", columns={"vid": np.arange(9, dtype="<u2")})
    kinds = {**KINDS, "vlans": kind}
    parts = objects(WHOLE["none"])
    header, trailer = fields_of(parts[0]), fields_of(parts[-1])
    header["kinds"]["vlans"] = {"version": 1} if kind.required else {"version": 1, "optional": True}
    sections = [*parts[1:-1], *encode_table(table, MAC, kinds=kinds)]
    tally = Tally()
    for section in sections:
        tally.add(section)
    trailer |= {"sections": 5, "records": 25, "bytes": tally.bytes, "sections_digest": tally.digest}
    trailer["counts"]["vlans"] = 9
    return seal(header) + b"".join(sections) + seal(trailer)


def test_an_unknown_optional_kind_is_skipped_and_reported() -> None:
    reader = SnapshotReader(io.BytesIO(with_vlans(VLANS)))
    assert [section.kind for section in reader] == ["port", "acl", "fdb", "conntrack"]
    assert reader.summary.skipped == {"vlans": 9}


def test_an_unknown_required_kind_is_refused_before_any_section() -> None:
    with pytest.raises(Incompatible, match="vlans"):
        SnapshotReader(io.BytesIO(with_vlans(dataclasses.replace(VLANS, required=True))))


@pytest.mark.parametrize("damage", [b"", b"\xa6digest\xc4\x04abcd"], ids=["sealed", "sealed otherwise"])
def test_a_newer_format_is_refused_by_name(damage: bytes) -> None:
    parts = objects(WHOLE["none"])
    newer = seal({**fields_of(parts[0]), "format": 2})
    if damage:
        newer = newer[:-25] + damage
    with pytest.raises(Incompatible, match="snapshot format 2; this reader knows 1") as caught:
        SnapshotReader(io.BytesIO(newer + b"".join(parts[1:])))
    assert caught.value.hint


def test_parts_of_one_kind_come_back_in_order() -> None:
    header = Header("vm", "a", "dummy", {"acl": KindInfo(1)}, (MAC, OTHER_MAC))
    first, second = sample("acl", 9000), sample("acl", 3)
    raw = b"".join(snapshot(header, [(MAC, first), (OTHER_MAC, second)]))
    sections = list(SnapshotReader(io.BytesIO(raw)))
    assert same(joined([s.table for s in sections if s.table and s.port == MAC]), first)
    assert same(joined([s.table for s in sections if s.table and s.port == OTHER_MAC]), second)


def test_all_tables_come_back() -> None:
    read = [section.table for section in SnapshotReader(io.BytesIO(WHOLE["zstd"])) if section.table]
    assert all(same(a, b) for a, b in zip(read, TABLES, strict=True))
