# SPDX-License-Identifier: GPL-2.0-only
"""Tables of the ebpf driver at size and under traffic."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from datapath.errors import NotReady
from datapath.provider import Event
from datapath.state.conntrack import CONNTRACK, STATES
from datapath.state.kind import Columns, Op, Table

from .driver_lab import Guest, Host, hosts, rules, wait_until

COUNT = 100_000
NUMBERS = [{"direction": "to", "protocol": "udp"}]


@pytest.fixture
def host() -> Iterator[Host]:
    with hosts(1) as made:
        yield made[0]


def connections(count: int, seed: int = 1) -> Columns:
    """Random connections of a guest, all different."""
    dice = np.random.default_rng(seed)
    columns: Columns = {}
    for name, column in CONNTRACK.columns.items():
        dtype = np.dtype(column.dtype)
        columns[name] = np.frombuffer(dice.bytes(count * dtype.itemsize), dtype)
    numbers = np.zeros((count, 16), np.uint8)
    numbers[:, 10:12] = 0xFF
    numbers[:, 12:] = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 4)
    columns["raddr"] = numbers.view("V16").reshape(count)
    columns["type"], columns["from"] = np.zeros(count, "u1"), np.zeros(count, "u1")
    columns["flags"] = columns["flags"] & 0x0F
    columns["window_flags"] = columns["window_flags"] & 0x1F
    for name in ("window_scale_from", "window_scale_to", "window_ignored_scale"):
        columns[name] = columns[name] & 0x0F
    columns["window_ignored_next"] = columns["window_ignored_next"] & 0x7FFF
    columns["state"] = dice.choice(np.array(sorted(STATES.values()), "u1"), count)
    columns["age_ns"] = dice.integers(0, 10**12, count, np.uint64)
    for name in ("packets_from", "packets_to", "bytes_from", "bytes_to"):
        columns[name] = columns[name] >> np.uint64(2)
    return columns


def joined(tables: list[Table]) -> Columns:
    """Columns of tables of one op, put together."""
    parts = [table.columns or {} for table in tables]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def by_key(columns: Columns) -> dict[bytes, tuple[Any, ...]]:
    """Key -> other columns but age, for comparison."""
    count = len(columns["laddr"])
    keys = [b"".join(parts) for parts in zip(*(_bytes(columns[name], count) for name in CONNTRACK.key), strict=True)]
    names = [name for name in CONNTRACK.columns if name in columns and name not in (*CONNTRACK.key, "age_ns")]
    rows = zip(*(columns[name].tolist() for name in names), strict=True)
    return dict(zip(keys, rows, strict=True))


def _bytes(column: np.ndarray, count: int) -> list[bytes]:
    raw = np.ascontiguousarray(column).view(np.uint8).reshape(count, -1)
    return [row.tobytes() for row in raw]


def staged(host: Host, **fields: Any) -> Guest:
    made = Guest(host, "10.0.0.1")
    made.record.update({"connections_max": 131_072, **fields})
    host.guests.append(made)
    host.run(lambda: host.driver.stage(made.ref, made.record, made.device))
    return made


def test_a_hundred_thousand_connections_come_back_as_they_went_in(host: Host) -> None:
    guest, given = staged(host), connections(COUNT)
    table = Table(CONNTRACK.name, columns=given, port_time_ns=10**12)
    began = time.perf_counter()
    loaded = host.run(lambda: host.driver.load(guest.ref, table))
    loading = time.perf_counter() - began
    began = time.perf_counter()
    tables = host.run(lambda: list(host.driver.dump(guest.ref, CONNTRACK.name)))
    dumping = time.perf_counter() - began
    assert (loaded.loaded, loaded.rejected) == (COUNT, ())
    got = joined(tables)
    assert by_key(got) == by_key(given)
    assert np.array_equal(np.sort(got["age_ns"]), np.sort(given["age_ns"])), "a staged port's clock stands"
    assert {table.port_time_ns for table in tables} == {10**12}
    print(f"load {COUNT / loading:,.0f}/s, dump {COUNT / dumping:,.0f}/s")


def test_a_full_table_says_what_it_refused(host: Host) -> None:
    guest = staged(host, connections_max=1000)
    loaded = host.run(lambda: host.driver.load(guest.ref, Table(CONNTRACK.name, columns=connections(1500))))
    assert loaded.loaded == 1000
    assert loaded.rejected == (("the connection table is full", 500),)


def test_what_is_missing_in_no_drain(host: Host) -> None:
    """Dump and drains while connections come, put together, are what is there in the end."""
    guest, peer = host.guest("10.0.0.1", NUMBERS), host.guest("10.0.0.2")
    stop = threading.Event()

    def connect() -> None:
        ports = itertools.cycle(range(1024, 61_024))
        with peer.socket(socket.SOCK_DGRAM) as sender:
            while not stop.is_set():
                sender.sendto(b"x", (guest.address, next(ports)))

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        host.run(lambda: host.driver.track(guest.ref))
        records: dict[bytes, tuple[Any, ...]] = {}
        for table in host.run(lambda: list(host.driver.dump(guest.ref, CONNTRACK.name))):
            _apply(records, table)
        drains = 0
        deadline = time.monotonic() + 30
        while drains < 20 or len(records) < 5_000:
            assert time.monotonic() < deadline, f"{len(records)} connections after {drains} drains"
            _drain(host, guest, records)
            drains += 1
    finally:
        host.run(lambda: host.driver.quiesce(guest.ref))
        stop.set()
        thread.join(20)
    _drain(host, guest, records)
    tables = host.run(lambda: list(host.driver.dump(guest.ref, CONNTRACK.name)))
    there: dict[bytes, tuple[Any, ...]] = {}
    for table in tables:
        _apply(there, table)
    assert len(there) >= 5_000
    assert records == there


def _drain(host: Host, guest: Guest, records: dict[bytes, tuple[Any, ...]]) -> None:
    for table in host.run(lambda: host.driver.drain(guest.ref)):
        if table.kind == CONNTRACK.name:
            _apply(records, table)


def _apply(records: dict[bytes, tuple[Any, ...]], table: Table) -> None:
    columns = dict(table.columns or {})
    for name in ("packets_from", "packets_to", "bytes_from", "bytes_to"):  # not carried by drains
        columns.pop(name, None)
    changed = by_key(columns)
    if table.op is Op.DELETE:
        for key in changed:
            records.pop(key, None)
    else:
        records.update(changed)


def test_a_table_grows_and_shrinks_in_place_under_traffic(host: Host) -> None:
    guest, peer = host.guest("10.0.0.1", NUMBERS), host.guest("10.0.0.2")
    received: list[bytes] = []
    with guest.socket(socket.SOCK_DGRAM) as receiver, peer.socket(socket.SOCK_DGRAM) as sender:
        receiver.bind((guest.address, 9000))
        sender.sendto(b"0", (guest.address, 9000))
        received.append(receiver.recv(16))
        stop, sent = threading.Event(), [1]

        def send() -> None:
            while not stop.wait(0.0005):
                sender.sendto(str(sent[0]).encode(), (guest.address, 9000))
                sent[0] += 1

        thread = threading.Thread(target=send)
        thread.start()
        try:
            for size in (200_000, 300):
                record = {**guest.record, "connections_max": size}
                host.run(lambda record=record: host.driver.update(guest.ref, record))  # type: ignore[misc]
        finally:
            stop.set()
            thread.join(20)
        while len(received) < sent[0]:
            received.append(receiver.recv(16))
    assert received == [str(number).encode() for number in range(sent[0])]
    (table,) = host.run(lambda: list(host.driver.dump(guest.ref, CONNTRACK.name)))
    assert table.columns is not None and table.columns["packets_to"].sum() == sent[0]
    assert host.run(lambda: host.driver.port(guest.ref)).committed


def test_a_table_does_not_shrink_below_what_is_in_it(host: Host) -> None:
    guest = staged(host)
    host.run(lambda: host.driver.load(guest.ref, Table(CONNTRACK.name, columns=connections(2000))))
    with pytest.raises(NotReady, match="more than 1000"):
        host.run(lambda: host.driver.update(guest.ref, {**guest.record, "connections_max": 1000}))
    tables = host.run(lambda: list(host.driver.dump(guest.ref, CONNTRACK.name)))
    assert sum(map(len, tables)) == 2000
    assert host.run(lambda: host.driver.port(guest.ref)).record["connections_max"] == 131_072


def test_old_connections_expire_and_a_full_table_alarms(host: Host) -> None:
    guest = host.guest("10.0.0.1", NUMBERS, connections_max=100, timeouts_ms={"udp": 4000})
    peer = host.guest("10.0.0.2")
    with peer.socket(socket.SOCK_DGRAM) as sender:
        for port in range(9000, 9090):
            sender.sendto(b"x", (guest.address, port))

    def alarms() -> list[Event]:
        return [event for event in host.events if event.what == "alarm" and event.ref == guest.ref]

    wait_until(lambda: bool(alarms()), "the table alarms")
    assert alarms()[0].data["connections_max"] == 100
    wait_until(lambda: host.run(lambda: list(host.driver.dump(guest.ref, CONNTRACK.name))) == [], "all expire")


@pytest.mark.alone
def test_ten_thousand_rules_are_in_force_in_time(host: Host) -> None:
    guest = host.guest("10.0.0.1")
    many = rules(
        *(
            {"direction": "to", "protocol": "tcp", "ports": [[n, n + 3]], "remote": [f"10.{n >> 8}.{n & 255}.0/24"]}
            for n in range(10_000)
        )
    )
    began = time.perf_counter()
    host.run(lambda: host.driver.load(guest.ref, Table("acl", records=many)))
    assert time.perf_counter() - began < 10
    print(f"10,000 rules in {time.perf_counter() - began:.2f} s")
    (table,) = host.run(lambda: list(host.driver.dump(guest.ref, "acl")))
    assert len(table) == 10_000
