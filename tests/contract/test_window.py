# SPDX-License-Identifier: GPL-2.0-only
"""Kind `window` of the ebpf driver: real programs, one connection, and what stays of its windows whatever happens."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.drivers.ebpf import syscall
from datapath.provider import PortRef
from datapath.state.kind import Table
from datapath.state.window import WindowDocument
from tests.bpf import frames
from tests.bpf.harness import sk_buff
from tests.contract.hosts import Host, ebpf_switch, inside
from tests.contract.samples import MAC

GUEST, PEER, PEER_MAC = "10.0.0.5", "192.0.2.9", "02:00:00:00:00:99"
SYN, RST, ACK = 2, 4, 16
ISN = (1000, 2_000_000_000)
FAR = 1 << 30
FROM, TO = 0, 1


@pytest.fixture
def host() -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    with ebpf_switch() as made, inside(made):
        yield made


@pytest.fixture
def other() -> Iterator[Host]:
    with ebpf_switch() as made:
        yield made


def rules() -> Table:
    blank = {"protocol": "any", "remote": [], "ports": [], "icmp": [], "action": "allow", "log": False}
    both = [{"id": n, "direction": way, "priority": n, **blank} for n, way in enumerate(("from", "to"), start=1)]
    return Table("acl", records=both)


def open_port(host: Host, epoch: int = 1) -> PortRef:
    port = host.stage(epoch, antispoof=False, trunk={})
    host.driver.load(port, rules())
    host.driver.commit(port)
    host.driver.open(port)
    return port


def check(host: Host, port: PortRef, how: str = "strict") -> None:
    host.driver.load(port, Table("window", records=WindowDocument(check=how).records()))  # type: ignore[arg-type]


def send(host: Host, port: PortRef, direction: int, flags: int, ahead: int, acks: int = 1, length: int = 0) -> bool:
    """One segment through the port's program. Does it pass? Where the guest's go to is another question."""
    sides = ((GUEST, 443), (PEER, 50_000))
    (source, sport), (target, dport) = sides[direction], sides[1 - direction]
    numbers = ((ISN[direction] + ahead) % (1 << 32), (ISN[1 - direction] + acks) % (1 << 32))
    body = struct.pack("!HHIIBBHHH", sport, dport, *numbers, 5 << 4, flags, 60_000, 0, 0) + bytes(length)
    macs = (MAC, PEER_MAC) if direction else (PEER_MAC, MAC)
    frame = frames.ethernet(*macs, frames.IPV4, frames.ipv4(source, target, frames.TCP, body))
    pins = [pin for pin in Path(host.options["bpffs"]).rglob("to_port" if direction else "from_port") if pin.is_file()]
    program, passed = syscall.obj_get(pins[0]), f"packets_{('from', 'to')[direction]}"
    before = host.driver.port(port).counters[passed]
    try:
        context = ctypes.create_string_buffer(sk_buff(host.driver.port(port).ifindex))
        syscall.prog_run(program, frame, ctx=ctypes.addressof(context), ctx_size=192, repeat=1)
    finally:
        os.close(program)
    return host.driver.port(port).counters[passed] > before


def connect(host: Host, port: PortRef) -> None:
    assert send(host, port, TO, SYN, 0, 0)
    assert send(host, port, FROM, SYN | ACK, 0)
    assert send(host, port, TO, ACK, 1)
    assert send(host, port, TO, ACK, 1, length=500)


def outside(host: Host, port: PortRef) -> list[int]:
    (table,) = host.driver.dump(port, "window")
    (record,) = table.records or ()
    return [record["outside_from"], record["outside_to"]]


def test_a_forged_segment_is_dropped_while_it_is_asked_for(host: Host) -> None:
    port = open_port(host)
    check(host, port)
    connect(host, port)
    assert not send(host, port, TO, ACK, FAR)
    assert not send(host, port, FROM, RST, FAR)
    assert outside(host, port) == [1, 1]
    assert host.driver.port(port).drops["window"] == 2
    check(host, port, "count")
    assert send(host, port, TO, ACK, FAR)
    assert outside(host, port) == [1, 2]
    check(host, port)
    assert not send(host, port, TO, ACK, FAR), "it was followed all the time"
    host.empty()


def test_what_passed_while_nobody_looked_is_not_checked_afterwards(host: Host) -> None:
    port = open_port(host)
    check(host, port)
    connect(host, port)
    (table,) = host.driver.dump(port, "window")
    host.driver.load(port, Table("window", op=table.op.DELETE, records=[{"protocol": "tcp"}]))
    assert send(host, port, TO, ACK, FAR)
    check(host, port)
    assert outside(host, port) == [0, 0]
    assert send(host, port, TO, ACK, FAR)
    assert send(host, port, TO, ACK, 501, length=400)
    host.empty()


def test_windows_outlive_the_agent_and_the_layout_of_the_maps(host: Host) -> None:
    port = open_port(host)
    check(host, port)
    connect(host, port)
    assert not send(host, port, TO, ACK, FAR)
    host.restart()
    assert send(host, port, TO, ACK, 501, length=500)
    assert not send(host, port, TO, ACK, FAR)
    host.driver.stop()
    host.options["slots"] *= 2
    host.take_over()
    assert outside(host, port) == [0, 2]
    assert not send(host, port, FROM, ACK, 1, acks=1002), "nobody has sent that"
    assert send(host, port, FROM, ACK, 1, acks=1001)
    assert outside(host, port) == [1, 2]
    host.empty()


def test_the_destination_knows_the_last_segment(host: Host, other: Host) -> None:
    """What changes a window alone comes once, when the port has stopped; what it counted comes at settle."""
    port = open_port(host)
    check(host, port)
    connect(host, port)
    assert not send(host, port, TO, ACK, FAR)
    host.driver.track(port)
    tables = [table for kind in ("window", "acl", "conntrack") for table in host.driver.dump(port, kind)]
    assert send(host, port, TO, ACK, 501, length=700)
    assert host.driver.drain(port) == [], "it would keep a copy from coming to its end"
    host.driver.hold(port)
    host.driver.quiesce(port)
    last = host.driver.drain(port)
    assert [table.kind for table in last if table.columns is not None] == ["conntrack"]
    with inside(other):
        arrived = other.stage(2, antispoof=False, trunk={})
        for table in [*tables, *last]:
            assert not other.driver.load(arrived, table).rejected
        other.driver.commit(arrived)
        other.driver.open(arrived)
        assert not send(other, arrived, FROM, ACK, 1, acks=1202), "nobody has sent that"
        assert send(other, arrived, FROM, ACK, 1, acks=1201)
        assert not send(other, arrived, TO, RST, FAR)
        assert send(other, arrived, TO, ACK, 1201, length=100)
        for table in host.driver.settle(port):
            other.driver.load(arrived, table)
        assert outside(other, arrived) == [1, 2]
        other.empty()
    host.empty()


def test_a_rollback_goes_on_where_it_was(host: Host) -> None:
    port = open_port(host)
    check(host, port)
    connect(host, port)
    host.driver.track(port)
    host.driver.hold(port)
    host.driver.quiesce(port)
    host.driver.drain(port)
    host.driver.resume(port)
    host.driver.untrack(port)
    assert send(host, port, TO, ACK, 501, length=100)
    assert not send(host, port, TO, ACK, FAR)
    host.empty()
