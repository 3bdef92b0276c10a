"""A snapshot is hostile input: reading it gives what was written or a typed error, in bounded memory."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from typing import Any

import msgpack
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.state.kind import Op, Table
from migrator.errors import Corrupt, Incompatible, SnapshotError
from migrator.snapshot import OBJECT_BYTES, Header, KindInfo, SnapshotReader, decode_section, encode_table, snapshot
from tests.contract.samples import MAC, sample
from tests.unit.strategies import VALUES, same

KINDS_OF = {"port": KindInfo(1), "acl": KindInfo(1), "fdb": KindInfo(1), "conntrack": KindInfo(1)}
HEADER = Header("6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01", "host-a", "dummy", KINDS_OF, (MAC,), 10, 65_536)
TABLES = [sample("port", 1), sample("acl", 5), sample("fdb", 4), sample("conntrack", 6)]
WHOLE = {codec: b"".join(snapshot(HEADER, [(MAC, t) for t in TABLES], codec=codec)) for codec in ("none", "zstd")}
HEAD = b"\xa6digest\xc4\x10"


def seal(fields: dict[str, Any]) -> bytes:
    """An object with a right digest over wrong contents, as an attacker would make it."""
    return reseal(msgpack.packb({**fields, "digest": bytes(16)}))


def reseal(raw: bytes) -> bytes:
    return raw[:-16] + xxhash.xxh3_128_digest(raw[:-16])


def fields_of(raw: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(raw)
    del fields["digest"]
    return fields


def objects(raw: bytes) -> list[bytes]:
    unpacker, parts, start = msgpack.Unpacker(io.BytesIO(raw)), [], 0
    for _ in unpacker:
        parts.append(raw[start : unpacker.tell()])
        start = unpacker.tell()
    return parts


def read(raw: bytes) -> list[Table]:
    return [section.table for section in SnapshotReader(io.BytesIO(raw)) if section.table]


def is_what_was_written(raw: bytes) -> bool:
    tables = read(raw)
    return len(tables) == len(TABLES) and all(same(a, b) for a, b in zip(tables, TABLES, strict=True))


@pytest.mark.parametrize("codec", WHOLE)
def test_every_byte_matters(codec: str) -> None:
    whole = WHOLE[codec]
    assert is_what_was_written(whole)
    for position in range(len(whole)):
        for bit in (0, 7):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            with pytest.raises(SnapshotError):
                read(bytes(changed))


@pytest.mark.parametrize("codec", WHOLE)
def test_every_length_but_the_whole_is_refused(codec: str) -> None:
    for length in range(len(WHOLE[codec])):
        with pytest.raises(Corrupt):
            read(WHOLE[codec][:length])


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_cut_and_paste(data: st.DataObject) -> None:
    whole = WHOLE[data.draw(st.sampled_from(list(WHOLE)))]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    changed = whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:]
    with contextlib.suppress(SnapshotError):
        assert is_what_was_written(changed)


@given(order=st.permutations(range(len(TABLES) + 2)), drop=st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_sections_cannot_be_dropped_doubled_or_reordered(order: list[int], drop: int) -> None:
    parts = objects(WHOLE["none"])
    chosen = order[drop:]
    try:
        assert is_what_was_written(b"".join(parts[i] for i in chosen))
        assert chosen == sorted(chosen)
    except SnapshotError:
        assert chosen != list(range(len(parts)))


@pytest.mark.parametrize("name", list(fields_of(next(encode_table(TABLES[3], MAC)))))
@given(value=VALUES | st.floats() | st.binary(max_size=64) | st.just(msgpack.Timestamp(1)))
@settings(max_examples=60, deadline=None)
def test_any_field_with_any_value(name: str, value: Any) -> None:
    raw = next(encode_table(TABLES[3], MAC))
    with contextlib.suppress(SnapshotError):
        decode_section(seal({**fields_of(raw), name: value}))


@pytest.mark.parametrize("number", range(4))
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_bytes_under_a_right_digest(number: int, data: st.DataObject) -> None:
    raw = bytearray(next(encode_table(TABLES[number], MAC, codec=data.draw(st.sampled_from(["none", "zstd"])))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 17))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SnapshotError):
        decode_section(reseal(bytes(raw)))


@given(raw=st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    for changed in (raw, reseal(raw + HEAD + bytes(16))):
        with pytest.raises(SnapshotError):
            decode_section(changed)
        with pytest.raises(SnapshotError):
            read(changed)


def with_body(kind: str, body: Any, **changes: Any) -> bytes:
    table = next(t for t in TABLES if t.kind == kind)
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    return seal({**fields_of(next(encode_table(table, MAC))), "body": packed, "size": len(packed), **changes})


def columns(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = msgpack.unpackb(fields_of(next(encode_table(TABLES[2], MAC)))["body"])
    return {**body, **changes}


def twice(raw: bytes, name: str) -> bytes:
    """The map with one entry doubled."""
    fields = msgpack.unpackb(raw)
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(fields) + 1)
    for key, value in [*fields.items(), (name, fields[name])]:
        packer.pack(key)
        packer.pack(value)
    return packer.bytes()


BOMB = zstandard.ZstdCompressor().compress(bytes(200 << 20))
STREAMED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64))
RULE = (TABLES[1].records or [])[0]

FORGED: dict[str, tuple[Any, type[SnapshotError], str]] = {
    "a count of more": (lambda: with_body("fdb", columns(), count=5), Corrupt, "mac"),
    "an immense count": (lambda: with_body("fdb", columns(), count=(1 << 32) - 1), Corrupt, "count"),
    "a negative count": (lambda: with_body("fdb", columns(), count=-1), Corrupt, "count"),
    "more records than counted": (lambda: with_body("acl", [RULE, RULE]), Corrupt, "count"),
    "another dtype": (
        lambda: with_body("fdb", columns(vlan={"dtype": ">u2", "bytes": bytes(8)})),
        Incompatible,
        "vlan",
    ),
    "no dtype": (lambda: with_body("fdb", columns(vlan={"bytes": bytes(8)})), Corrupt, "vlan.dtype"),
    "text for bytes": (
        lambda: with_body("fdb", columns(vlan={"dtype": "<u2", "bytes": "1234"})),
        Corrupt,
        "vlan.bytes",
    ),
    "a list for a column": (lambda: with_body("fdb", columns(vlan=[1, 2, 3, 4])), Corrupt, "vlan"),
    "a short column": (lambda: with_body("fdb", columns(vlan={"dtype": "<u2", "bytes": bytes(7)})), Corrupt, "vlan"),
    "a missing column": (lambda: with_body("fdb", {"vlan": columns()["vlan"]}), Corrupt, "mac"),
    "a column twice": (lambda: with_body("fdb", twice(msgpack.packb(columns()), "mac")), Corrupt, "mac"),
    "a state that is none": (lambda: with_body("conntrack", _bad_state()), Corrupt, "state"),
    "a list of columns": (lambda: with_body("fdb", [1]), Corrupt, "body"),
    "a map of records": (lambda: with_body("acl", {"id": 1}), Corrupt, "body"),
    "a record that is none": (lambda: with_body("acl", [1], count=1), Corrupt, ""),
    "a field of another type": (lambda: with_body("acl", [{**RULE, "log": 1}], count=1), Corrupt, "log"),
    "a bool for a number": (lambda: with_body("acl", [{**RULE, "id": True}], count=1), Corrupt, "id"),
    "an action that is none": (lambda: with_body("acl", [{**RULE, "action": "pass"}], count=1), Corrupt, "action"),
    "a missing field": (lambda: with_body("acl", [{"id": 1}], count=1), Corrupt, "action"),
    "bytes in a field": (lambda: with_body("acl", [{**RULE, "remote": [b"a"]}], count=1), Corrupt, "remote"),
    "a float in a field": (lambda: with_body("acl", [{**RULE, "ports": [0.5]}], count=1), Corrupt, "ports"),
    "deep nesting": (lambda: with_body("acl", [{**RULE, "ports": _nested(20)}], count=1), Corrupt, "ports"),
    "immense nesting": (lambda: with_body("acl", b"\x91" * 900_000), Corrupt, ""),
    "lists of immense length": (lambda: with_body("acl", b"\xdd\xff\xff\xff\xff" * 1000), Corrupt, ""),
    "lists of allowed length, nested": (lambda: with_body("acl", b"\xdd\x00\x00\x40\x00" * 1000), Corrupt, ""),
    "maps of allowed length, nested": (lambda: with_body("acl", b"\xdf\x00\x00\x40\x00\xa1a" * 1000), Corrupt, ""),
    "text that is not UTF-8": (lambda: with_body("acl", b"\x91\x81\xa2id\xa2\xff\xfe", count=1), Corrupt, ""),
    "a key that is no text": (lambda: with_body("acl", [{**RULE, "ports": [{1: 2}]}], count=1), Corrupt, ""),
    "bytes behind the body": (lambda: with_body("fdb", msgpack.packb(columns()) + b"\0"), Corrupt, ""),
    "an empty body": (lambda: with_body("fdb", b""), Corrupt, ""),
    "a zstd bomb": (lambda: with_body("fdb", BOMB, codec="zstd", size=1 << 19), Corrupt, "body"),
    "a zstd bomb that says so": (lambda: with_body("fdb", BOMB, codec="zstd", size=200 << 20), Corrupt, "size"),
    "zstd of unknown size": (lambda: with_body("fdb", STREAMED, codec="zstd", size=64), Corrupt, "body"),
    "no zstd": (lambda: with_body("fdb", b"abcd", codec="zstd", size=64), Corrupt, "body"),
    "another codec": (lambda: with_body("fdb", columns(), codec="lz4"), Incompatible, "codec"),
    "another size": (lambda: with_body("fdb", columns(), size=3), Corrupt, "body"),
    "another operation": (lambda: with_body("fdb", columns(), op="add"), Corrupt, "op"),
    "no MAC": (lambda: with_body("fdb", columns(), port="02:00:00:00:00:0G"), Corrupt, "port"),
    "a MAC and more": (lambda: with_body("fdb", columns(), port=MAC + "\n"), Corrupt, "port"),
    "a negative time": (lambda: with_body("fdb", columns(), port_time_ns=-1), Corrupt, "port_time_ns"),
    "a time of 64 bits": (lambda: with_body("fdb", columns(), port_time_ns=1 << 63), Corrupt, "port_time_ns"),
    "a version of nothing": (lambda: with_body("fdb", columns(), version=0), Corrupt, "version"),
    "another object": (lambda: with_body("fdb", columns(), object="header"), Corrupt, "object"),
    "no map": (lambda: reseal(b"\x91" + HEAD + bytes(16)), Corrupt, ""),
    "too long an object": (lambda: with_body("fdb", bytes(OBJECT_BYTES)), Corrupt, ""),
}


def _bad_state() -> dict[str, Any]:
    body: dict[str, Any] = msgpack.unpackb(fields_of(next(encode_table(TABLES[3], MAC)))["body"])
    return {**body, "state": {"dtype": "u1", "bytes": bytes([3, 3, 99, 3, 3, 3])}}


def _nested(depth: int) -> list[Any]:
    return [_nested(depth - 1)] if depth else []


@pytest.mark.parametrize("name", FORGED)
def test_forged_sections_are_refused_where_they_are_wrong(name: str) -> None:
    make, error, field = FORGED[name]
    with pytest.raises(error) as caught:
        decode_section(make(), number=7, offset=4096)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert (caught.value.section, caught.value.offset) == (7, 4096)
    assert str(caught.value).startswith("section 7, byte 4096")


def test_errors_in_a_file_say_which_section_and_byte() -> None:
    parts = objects(WHOLE["none"])
    parts[3] = with_body("fdb", columns(vlan={"dtype": "<u2", "bytes": b""}))
    with pytest.raises(Corrupt) as caught:
        read(b"".join(parts))
    assert caught.value.section == 2
    assert caught.value.offset == sum(map(len, parts[:3]))
    assert caught.value.field == "vlan"


def test_a_trailer_that_lies_is_refused() -> None:
    parts = objects(WHOLE["none"])
    right = fields_of(parts[-1])
    for name, value in right.items():
        if name != "object":
            wrong = {**value, "fdb": 5} if isinstance(value, dict) else value + 1
            with pytest.raises(Corrupt) as caught:
                read(b"".join(parts[:-1]) + seal({**right, name: wrong}))
            assert caught.value.field == name


@pytest.mark.parametrize("extra", [b"\0", b"garbage", b"\xc1", bytes(3 << 20)])
def test_trailing_garbage_is_refused(extra: bytes) -> None:
    with pytest.raises(Corrupt):
        read(WHOLE["none"] + extra)


def test_two_snapshots_in_one_file_are_refused() -> None:
    with pytest.raises(Corrupt, match="behind the trailer"):
        read(WHOLE["none"] * 2)


def test_a_file_that_is_no_snapshot_is_named_so() -> None:
    with pytest.raises(Corrupt, match="no snapshot") as caught:
        read(b"#!/bin/sh\necho hello\n")
    assert caught.value.hint


def test_accounting_needs_its_keys() -> None:
    raw = with_body("conntrack", {"packets_to": {"dtype": "<u8", "bytes": bytes(48)}}, op=str(Op.ACCOUNT))
    with pytest.raises(Corrupt) as caught:
        decode_section(raw)
    assert caught.value.field == "laddr"


LIMITED = """
import resource, sys
from tests.unit.test_snapshot_hostile import FORGED, decode_section, read, WHOLE
from migrator.errors import SnapshotError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
made = [make() for make, _, _ in FORGED.values()]
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for raw in made:
    for reading in (decode_section, read):
        try:
            reading(raw)
        except SnapshotError:
            pass
for raw in (b"\\xc6\\xff\\xff\\xff\\xff", b"\\x91" * 10**6, b"\\xdd\\xff\\xff\\xff\\xff" * 10**5, b"\\xc1" * 10**6):
    try:
        read(WHOLE["none"][:200] + raw)
    except SnapshotError:
        pass
print("bounded")
"""


def test_forged_input_is_read_in_bounded_memory() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "bounded", done.stderr[-2000:]
