"""Sections: what goes in comes out, for every kind; nothing that is not a table gets in."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datapath.registry import KINDS
from datapath.state.kind import Column, Kind, Nature, Op, Table
from migrator.errors import SnapshotError
from migrator.snapshot import SECTION_BYTES, Tally, decode_section, encode_table
from tests.contract.samples import MAC, SAMPLES, sample
from tests.unit.strategies import MACS, joined, same, table


def test_every_kind_has_a_sample() -> None:
    assert set(SAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(data=st.data(), port=MACS, number=st.integers(0, 1 << 31), codec=st.sampled_from(["none", "zstd"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_round_trip(kind: Kind, data: st.DataObject, port: str, number: int, codec: str) -> None:
    given_table = data.draw(table(kind))
    sections = [decode_section(raw) for raw in encode_table(given_table, port, number, codec=codec)]
    if not len(given_table):
        assert sections == []
        return
    assert all((s.kind, s.port, s.round, s.op) == (kind.name, port, number, given_table.op) for s in sections)
    assert same(joined([s.table for s in sections if s.table]), given_table)


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize(("kind", "count"), [("conntrack", 50_000), ("fdb", 50_000), ("acl", 12_000)])
def test_big_tables_are_cut_into_sections(kind: str, count: int, codec: str) -> None:
    whole = sample(kind, count)
    raw = list(encode_table(whole, MAC, codec=codec))
    assert len(raw) > 1
    assert max(map(len, raw)) <= SECTION_BYTES
    sections = [decode_section(part) for part in raw]
    assert sum(section.count for section in sections) == count
    assert same(joined([section.table for section in sections if section.table]), whole)


def test_the_sender_and_the_receiver_tally_alike() -> None:
    sent, received = Tally(), Tally()
    whole = sample("conntrack", 30_000)
    sent.records += len(whole)
    raw = list(encode_table(whole, MAC))
    for part in raw:
        sent.add(part)
        received.add_section(decode_section(part))
    assert vars_of(sent) == vars_of(received)
    other = Tally()
    for part in reversed(raw):
        other.add(part)
    assert other.digest != sent.digest


def vars_of(tally: Tally) -> tuple[int, int, int, int]:
    return tally.sections, tally.records, tally.bytes, tally.digest


def test_columns_of_any_stride_are_taken() -> None:
    columns = {name: np.repeat(array, 2)[::2] for name, array in (sample("conntrack", 100).columns or {}).items()}
    (raw,) = encode_table(Table("conntrack", columns=columns, port_time_ns=5), MAC)
    decoded = decode_section(raw).table
    assert decoded is not None
    assert same(decoded, Table("conntrack", columns=columns, port_time_ns=5))


def _without(table: Table, name: str) -> Table:
    return Table(table.kind, table.op, columns={n: a for n, a in (table.columns or {}).items() if n != name})


BAD: dict[str, Any] = {
    "another kind": lambda: Table("vlans", records=[]),
    "records for columns": lambda: Table("conntrack", records=[{}]),
    "columns for records": lambda: Table("acl", columns={}),
    "a missing column": lambda: _without(sample("conntrack", 3), "id"),
    "an unknown column": lambda: Table("fdb", columns={**(sample("fdb", 1).columns or {}), "x": np.zeros(1, "u1")}),
    "a wrong dtype": lambda: Table("fdb", columns={**(sample("fdb", 1).columns or {}), "moves": np.zeros(1, "<u8")}),
    "another byte order": lambda: Table(
        "fdb", columns={**(sample("fdb", 1).columns or {}), "vlan": np.zeros(1, ">u2")}
    ),
    "different lengths": lambda: Table("fdb", columns={**(sample("fdb", 2).columns or {}), "vlan": np.zeros(1, "<u2")}),
    "a missing field": lambda: Table("port", records=[{"mac": MAC}]),
    "an unknown field": lambda: Table("acl", Op.ACCOUNT, records=[{"id": 1, "color": 2}]),
    "a wrong type": lambda: Table("acl", Op.ACCOUNT, records=[{"id": True}]),
    "bytes in a record": lambda: Table("port", Op.ACCOUNT, records=[{"mac": MAC, "counters": {"a": b""}}]),
    "a float in a record": lambda: Table("port", Op.ACCOUNT, records=[{"mac": MAC, "counters": {"a": 1.5}}]),
    "a huge integer": lambda: Table("acl", Op.ACCOUNT, records=[{"id": 1 << 64}]),
    "a key that is no text": lambda: Table("port", Op.ACCOUNT, records=[{"mac": MAC, "counters": {1: 1}}]),
    "too long a list": lambda: Table("acl", records=[{**(sample("acl", 1).records or [])[0], "remote": [""] * 20_000}]),
    "too big a record": lambda: Table("port", Op.ACCOUNT, records=[{"mac": "x" * SECTION_BYTES}]),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_no_table_is_not_written(bad: Any) -> None:
    with pytest.raises(SnapshotError):
        list(encode_table(bad(), MAC))


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(SnapshotError, match="lz77"):
        list(encode_table(sample("fdb", 1), MAC, codec="lz77"))


@pytest.mark.alone
def test_encoding_and_decoding_loop_over_no_entries() -> None:
    """Budget: 2 M entries/s to bytes, well above 1 M/s back. A loop over entries in Python reaches 0.5 M/s at best."""
    whole = sample("conntrack", 200_000)
    best = {"encode": 0.0, "decode": 0.0}
    for _ in range(3):
        start = time.perf_counter()
        raw = list(encode_table(whole, MAC))
        encoded = time.perf_counter()
        for part in raw:
            decode_section(part)
        decoded = time.perf_counter()
        best["encode"] = max(best["encode"], len(whole) / (encoded - start))
        best["decode"] = max(best["decode"], len(whole) / (decoded - encoded))
    assert best["encode"] > 2_000_000
    assert best["decode"] > 1_500_000


def test_bytes_per_connection() -> None:
    """Budget without what few connections have: 110 bytes raw, 25 compressed without what is only counted."""
    every = sample("conntrack", 100_000).columns or {}
    few = {name for name in every if name == "label" or name.startswith("window_")}
    whole = Table("conntrack", columns={name: array for name, array in every.items() if name not in few})
    counted = {name for name, column in KINDS["conntrack"].columns.items() if column.accounting}
    live = Table("conntrack", columns={name: a for name, a in (whole.columns or {}).items() if name not in counted})
    assert sum(map(len, encode_table(whole, MAC))) / len(whole) <= 110
    assert sum(map(len, encode_table(live, MAC, codec="zstd"))) / len(whole) <= 25


WIDE = Kind("wide", 1, Nature.LIVE, key=("key",), columns={"key": Column("<u4"), "data": Column("V255")})


def test_sections_stay_within_their_size_whatever_the_columns() -> None:
    columns = {"key": np.arange(20_000, dtype="<u4"), "data": np.zeros(20_000, "V255")}
    raw = list(encode_table(Table("wide", columns=columns), MAC, kinds={"wide": WIDE}))
    assert max(map(len, raw)) <= SECTION_BYTES
    assert sum(decode_section(part, kinds={"wide": WIDE}).count for part in raw) == 20_000
