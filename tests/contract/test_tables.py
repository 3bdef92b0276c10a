"""Tables: load and dump are each other's inverse, malformed input leaves no trace, nothing is dropped in silence."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from datapath.errors import LoadRejected, UnsupportedKind
from datapath.provider import Driver, PortRef
from datapath.registry import KINDS
from datapath.state.conntrack import STATES
from datapath.state.kind import Nature, Op, Table
from tests.contract.hosts import Host
from tests.contract.samples import ages, keys_of, normal, port_record, sample

COUNTS = {
    "port": 1,
    "acl": 200,
    "fdb": 40,
    "conntrack": 5_000,
    "mirror": 8,
    "qos": 2,
    "window": 1,
    "remap": 30,
    "sampling": 1,
    "flow_export": 1,
    "flows": 500,
}
LIVE = [name for name, kind in KINDS.items() if kind.nature & Nature.LIVE]
COLUMNS = [name for name, kind in KINDS.items() if kind.columns]


def dumped(driver: Driver, port: PortRef, kind: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    return normal(list(driver.dump(port, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_dumped(host: Host, kind: str) -> None:
    if kind not in host.driver.kinds():
        pytest.skip(f"driver {host.kind} does not hold kind {kind}")
    made = host.stage()
    table = sample(kind, COUNTS[kind])
    loaded = host.driver.load(made, table)
    assert (loaded.loaded, list(loaded.rejected)) == (COUNTS[kind], [])
    assert dumped(host.driver, made, kind) == normal([table])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dumped_loads_elsewhere(host: Host, kind: str) -> None:
    """The destination of a move dumps what the source dumped."""
    source, destination = host.stage(epoch=1), host.stage(epoch=2)
    host.driver.load(source, sample(kind, COUNTS[kind]))
    for table in host.driver.dump(source, kind):
        host.driver.load(destination, table)
    assert dumped(host.driver, destination, kind) == dumped(host.driver, source, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dump_of_a_new_port_is_empty(host: Host, kind: str) -> None:
    made = host.stage()
    records = dumped(host.driver, made, kind)
    assert len(records) == (1 if kind == "port" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_dumped_tables_are_of_their_kind(host: Host, kind: str) -> None:
    made = host.stage()
    host.driver.load(made, sample(kind, COUNTS[kind]))
    for table in host.driver.dump(made, kind):
        assert (table.kind, table.op) == (kind, Op.LOAD)
        assert table.port_time_ns >= 0
        if KINDS[kind].columns:
            expected = {name: np.dtype(column.dtype) for name, column in KINDS[kind].columns.items()}
            assert {name: array.dtype for name, array in (table.columns or {}).items()} == expected


@pytest.mark.parametrize("kind", [*LIVE, "acl"])
def test_loading_again_replaces_and_adds_nothing(host: Host, kind: str) -> None:
    made = host.stage()
    table = sample(kind, COUNTS[kind])
    for _ in range(2):
        host.driver.load(made, table)
    assert dumped(host.driver, made, kind) == normal([table])


@pytest.mark.parametrize("kind", [*LIVE, "acl"])
def test_deleting_by_key(host: Host, kind: str) -> None:
    made = host.stage()
    whole, some = sample(kind, 20), sample(kind, 8)
    host.driver.load(made, whole)
    for _ in range(2):  # deleting what is gone is no error
        host.driver.load(made, keys_of(some))
        left = {key: value for key, value in normal([whole]).items() if key not in normal([some])}
        assert dumped(host.driver, made, kind) == left


def test_big_tables_in_parts(host: Host) -> None:
    made = host.stage(connections_max=200_000)
    whole = sample("conntrack", 100_000)
    for start in range(0, 100_000, 7_000):
        host.driver.load(made, part(whole, start, start + 7_000))
    tables = list(host.driver.dump(made, "conntrack"))
    keys = [key for table in tables for key in _keys(table)]
    assert len(keys) == 100_000
    assert set(keys) == set(_keys(whole))


def _keys(table: Table) -> list[bytes]:
    columns = table.columns or {}
    raw = np.concatenate([columns[n].view("u1").reshape(len(table), -1) for n in ("raddr", "lport", "rport")], axis=1)
    keys: list[bytes] = np.ascontiguousarray(raw).view(f"V{raw.shape[1]}").ravel().tolist()
    return keys


def test_what_does_not_fit_is_counted_by_reason(host: Host) -> None:
    made = host.stage(connections_max=1_000)
    loaded = host.driver.load(made, sample("conntrack", 1_500))
    assert loaded.loaded + sum(count for _, count in loaded.rejected) == 1_500
    assert loaded.rejected and all(reason and count > 0 for reason, count in loaded.rejected)
    assert len(dumped(host.driver, made, "conntrack")) == loaded.loaded


@pytest.mark.parametrize("opened", [False, True], ids=["staged", "open"])
def test_what_comes_late_replaces_nothing(host: Host, opened: bool) -> None:
    """A guest that had to begin without its connections: those that it has begun since are newer."""
    made = host.stage()
    newer, whole = part(sample("conntrack", 300), 0, 40), sample("conntrack", 300)
    own = Table("conntrack", columns={**(newer.columns or {}), "id": np.arange(1, 41, dtype="<u8")}, port_time_ns=1)
    if opened:
        host.driver.commit(made)
        host.driver.open(made)
    host.driver.load(made, own)
    late = replace(whole, op=Op.FILL)
    loaded = [host.driver.load(made, late) for _ in range(2)]
    assert [(one.loaded, list(one.rejected)) for one in loaded] == [(260, []), (0, [])]
    there = dumped(host.driver, made, "conntrack")
    expected = {**normal([whole]), **normal([own])}
    assert {key: value for key, value in there.items() if key in normal([own])} == normal([own])
    assert there.keys() == expected.keys()


def test_what_comes_late_and_does_not_fit_is_counted(host: Host) -> None:
    made = host.stage(connections_max=1_000)
    host.driver.commit(made)
    host.driver.open(made)
    loaded = host.driver.load(made, replace(sample("conntrack", 1_500), op=Op.FILL))
    assert loaded.loaded + sum(count for _, count in loaded.rejected) == 1_500
    assert loaded.rejected and len(dumped(host.driver, made, "conntrack")) == loaded.loaded


def _changed(kind: str, **columns: Any) -> Table:
    good = sample(kind, 10)
    return Table(kind, columns={**(good.columns or {}), **columns}, port_time_ns=good.port_time_ns)


def _without(kind: str, name: str) -> Table:
    return Table(kind, columns={n: a for n, a in (sample(kind, 10).columns or {}).items() if n != name})


def _rule(**changes: Any) -> Table:
    good = list(sample("acl", 3).records or ())
    return Table("acl", records=[*good, {**good[0], "id": 99, **changes}])


MALFORMED: dict[str, Callable[[], Table]] = {
    "conntrack: a short column": lambda: _changed("conntrack", id=np.ones(9, "<u8")),
    "conntrack: another dtype": lambda: _changed("conntrack", id=np.ones(10, "<u4")),
    "conntrack: another byte order": lambda: _changed("conntrack", lport=np.ones(10, ">u2")),
    "conntrack: no key": lambda: _without("conntrack", "raddr"),
    "conntrack: no id": lambda: _without("conntrack", "id"),
    "conntrack: no such state": lambda: _changed("conntrack", state=np.full(10, 77, "u1")),
    "conntrack: records": lambda: Table("conntrack", records=[{"id": 1}]),
    "conntrack: delete without a key": lambda: Table("conntrack", Op.DELETE, columns={"lport": np.ones(3, "<u2")}),
    "fdb: to fill": lambda: replace(sample("fdb", 10), op=Op.FILL),
    "acl: to fill": lambda: replace(sample("acl", 10), op=Op.FILL),
    "fdb: a short column": lambda: _changed("fdb", vlan=np.ones(9, "<u2")),
    "fdb: no key": lambda: _without("fdb", "mac"),
    "acl: columns": lambda: Table("acl", columns={"id": np.ones(3, "<u4")}),
    "acl: a direction that is none": lambda: _rule(direction="up"),
    "acl: an action that is none": lambda: _rule(action="pass"),
    "acl: a field of another type": lambda: _rule(priority="high"),
    "acl: a missing field": lambda: Table("acl", records=[{"id": 1}]),
    "port: a field of another type": lambda: Table("port", records=[port_record(mtu="big")]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tables_are_refused_whole(host: Host, name: str) -> None:
    made = host.stage()
    kind = name.split(":")[0]
    if kind != "port":
        host.driver.load(made, sample(kind, 4))
    before = dumped(host.driver, made, kind)
    with pytest.raises(LoadRejected) as caught:
        host.driver.load(made, MALFORMED[name]())
    assert kind in str(caught.value)
    assert dumped(host.driver, made, kind) == before


def test_kinds_that_are_not_held_are_named(host: Host) -> None:
    made = host.stage()
    with pytest.raises(UnsupportedKind, match="teapot"):
        host.driver.load(made, Table("teapot", records=[{}]))
    with pytest.raises(UnsupportedKind, match="teapot"):
        list(host.driver.dump(made, "teapot"))


# ---- the clock ----


@pytest.mark.parametrize("opened", [False, True], ids=["staged", "opened"])
@pytest.mark.parametrize("kind", LIVE)
def test_ages_go_on_from_where_they_were(host: Host, kind: str, opened: bool) -> None:
    made = host.stage()
    table = sample(kind, 10)
    start = time.monotonic_ns()
    host.driver.load(made, table)
    if opened:
        host.driver.open(made)
    got = ages(list(host.driver.dump(made, kind)))
    took = time.monotonic_ns() - start
    for key, age in ages([table]).items():
        assert age <= got[key] <= age + took + 20_000_000  # clocks in the kernel tick in steps of some milliseconds


def test_the_clock_goes_on_when_the_port_opens(host: Host) -> None:
    made = host.stage()
    host.driver.load(made, sample("conntrack", 1))
    host.driver.open(made)
    (table,) = host.driver.dump(made, "conntrack")
    assert 0 <= table.port_time_ns - sample("conntrack", 1).port_time_ns < 30_000_000_000


def test_a_staged_ports_clock_stands(host: Host) -> None:
    made = host.stage()
    host.driver.load(made, sample("conntrack", 1))
    times = {table.port_time_ns for _ in range(3) for table in host.driver.dump(made, "conntrack")}
    assert times == {sample("conntrack", 1).port_time_ns}


# ---- changes ----


def merged(tables: list[Table], drained: list[Table]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What a destination has that loaded a dump and then the drained changes."""
    records = normal(tables)
    for table in drained:
        if table.op is Op.DELETE:
            for key in _key_rows(table):
                records.pop(key, None)
        else:
            records.update(normal([table]))
    return records


def _key_rows(table: Table) -> list[tuple[Any, ...]]:
    lists = [(table.columns or {})[name].tolist() for name in KINDS[table.kind].key]
    return list(zip(*lists, strict=True))


def test_a_dump_and_its_drains_are_complete(host: Host) -> None:
    made = host.stage()
    driver = host.driver
    driver.load(made, sample("conntrack", 3_000))
    driver.open(made)
    driver.track(made)
    driver.track(made)  # idempotent: forgets no change
    first = list(driver.dump(made, "conntrack"))
    changed = _changed_state(sample("conntrack", 500), "LAST_ACK")
    driver.load(made, changed)
    driver.load(made, keys_of(part(sample("conntrack", 3_000), 1_000, 1_100)))  # not changed before
    driver.load(made, keys_of(part(changed, 100, 200)))  # changed, then gone
    drained = driver.drain(made)
    driver.load(made, sample("conntrack", 50))
    driver.quiesce(made)
    drained += driver.drain(made)
    assert {table.kind for table in drained} == {"conntrack"}
    assert {table.op for table in drained} == {Op.LOAD, Op.DELETE}
    assert merged(first, drained) == dumped(driver, made, "conntrack")
    assert sum(map(len, drained)) == 650
    assert driver.drain(made) == []


def part(table: Table, start: int, end: int) -> Table:
    """Some of a table's records."""
    columns = {name: array[start:end] for name, array in (table.columns or {}).items()}
    return Table(table.kind, table.op, columns=columns, port_time_ns=table.port_time_ns)


def _changed_state(table: Table, state: str) -> Table:
    columns = {**(table.columns or {}), "state": np.full(len(table), STATES[state], "u1")}
    return Table(table.kind, columns=columns, port_time_ns=table.port_time_ns)


def test_untracked_ports_give_no_changes(host: Host) -> None:
    made = host.stage()
    host.driver.open(made)
    host.driver.track(made)
    host.driver.load(made, sample("conntrack", 5))
    host.driver.untrack(made)
    host.driver.untrack(made)
    host.driver.load(made, sample("conntrack", 9))
    host.driver.track(made)
    assert host.driver.drain(made) == []


# ---- accounting ----


def _counts(driver: Driver, port: PortRef) -> dict[tuple[Any, ...], Any]:
    counted = [name for name, column in KINDS["conntrack"].columns.items() if column.accounting]
    rows = dumped(driver, port, "conntrack")
    return {key: tuple(int(dict(row)[name]) for name in counted) for key, row in rows.items()}


def _settled(host: Host) -> tuple[PortRef, PortRef, list[Table]]:
    """A source that was settled, the destination, and what settle gave."""
    source = host.stage(epoch=1)
    host.driver.load(source, sample("conntrack", 300))
    host.driver.load(source, sample("acl", 20))
    host.driver.open(source)
    host.driver.quiesce(source)
    destination = host.stage(epoch=2)
    for kind in host.driver.kinds():
        for table in host.driver.dump(source, kind):
            host.driver.load(destination, table)
    return source, destination, list(host.driver.settle(source))


def test_settle_gives_what_was_counted(host: Host) -> None:
    _, _, accounts = _settled(host)
    assert {table.op for table in accounts} == {Op.ACCOUNT}
    assert sum(len(table) for table in accounts if table.kind == "conntrack") == 300
    kinds = {table.kind for table in accounts}
    assert kinds <= {name for name, kind in KINDS.items() if kind.nature & Nature.ACCOUNTING}
    assert "port" in kinds


def test_accounting_assigned_twice_does_no_harm(host: Host) -> None:
    source, destination, accounts = _settled(host)
    expected = _counts(host.driver, source)
    hits = dumped(host.driver, source, "acl")
    for _ in range(3):
        for table in accounts:
            loaded = host.driver.load(destination, table)
            assert not loaded.rejected
    host.driver.settled(destination)
    assert _counts(host.driver, destination) == expected
    assert dumped(host.driver, destination, "acl") == hits


def test_accounting_of_what_ended_meanwhile_is_no_error(host: Host) -> None:
    _, destination, accounts = _settled(host)
    host.driver.load(destination, keys_of(sample("conntrack", 120)))
    for table in accounts:
        host.driver.load(destination, table)
    host.driver.settled(destination)
    assert len(_counts(host.driver, destination)) == 180


def test_accounting_is_of_a_connection_and_not_of_its_key(host: Host) -> None:
    """The guest closed a connection and opened one between the same ends: it is another one."""
    _, destination, accounts = _settled(host)
    again = part(sample("conntrack", 300), 0, 40)
    columns = {**(again.columns or {}), "id": np.arange(1, 41, dtype="<u8")}
    for name, column in KINDS["conntrack"].columns.items():
        if column.accounting:
            columns[name] = np.full(40, 3, dtype=column.dtype)
    new = Table("conntrack", columns=columns, port_time_ns=again.port_time_ns)
    host.driver.load(destination, keys_of(part(sample("conntrack", 300), 0, 80)))
    host.driver.load(destination, new)
    for table in accounts:
        host.driver.load(destination, table)
    host.driver.settled(destination)
    counts = _counts(host.driver, destination)
    assert {key: counts[key] for key in normal([new])} == dict.fromkeys(normal([new]), (3, 3, 3, 3))
    assert len(counts) == 260


def test_accounting_after_the_port_opened(host: Host) -> None:
    source, destination, accounts = _settled(host)
    expected = _counts(host.driver, source)
    host.driver.purge(source)
    host.driver.commit(destination)
    host.driver.open(destination)
    for table in accounts:
        host.driver.load(destination, table)
    host.driver.settled(destination)
    assert _counts(host.driver, destination) == expected
