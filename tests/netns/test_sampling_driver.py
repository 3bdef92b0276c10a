# SPDX-License-Identifier: GPL-2.0-only
"""Sampling by the driver alone: segments, an agent that starts again, a move that is taken back, collectors out of
reach, several at once."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.drivers.ebpf.sampling import SamplingTable
from datapath.errors import LoadRejected
from datapath.state.kind import Op, Record, Table
from datapath.state.sampling import SamplingDocument
from tests.killed_exporter import AFTER, BEFORE, killed
from tests.sflow import Datagram, read

from .driver_lab import Guest, Host, shelf, wait_until
from .sflow_rig import assert_continuous, four_sigma

FCS = 4
DOCUMENT: dict[str, Any] = {"rate": 2, "agent": "192.0.2.77", "sub_agent": 7, "polling": 0}


class Collector:
    """A socket at a host's loopback."""

    def __init__(self, host: Host, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = host.socket(socket.SOCK_DGRAM, family)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.socket.bind((address, 0))
        self.socket.setblocking(False)
        port = self.socket.getsockname()[1]
        self.name = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._got: list[Datagram] = []

    def told(self) -> list[Datagram]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._got.append(read(self.socket.recv(65536)))
        return self._got

    def flows(self) -> int:
        return sum(len(one.flows) for one in self.told())


@pytest.fixture
def host() -> Iterator[Host]:
    with shelf.lend(1) as made:
        yield made[0]


@pytest.fixture
def collector(host: Host) -> Iterator[Collector]:
    made = Collector(host)
    yield made
    made.socket.close()


def sample(host: Host, guest: Guest, *collectors: Collector, **fields: Any) -> None:
    document = SamplingDocument.model_validate({**DOCUMENT, "collectors": [one.name for one in collectors], **fields})
    host.run(lambda: host.driver.load(guest.ref, Table("sampling", records=document.records())))


def record(host: Host, guest: Guest) -> Record:
    (table,) = host.run(lambda: list(host.driver.dump(guest.ref, "sampling")))
    (found,) = table.records or ()
    return found


def send(one: Guest, other: Guest, count: int, size: int = 100) -> None:
    with one.socket(socket.SOCK_DGRAM) as made:
        for _ in range(count):
            made.sendto(bytes(size), (other.address, 9))


def all_told(host: Host, guest: Guest, collector: Collector) -> None:
    wait_until(lambda: collector.flows() >= record(host, guest)["flow_samples"] > 0, "samples are told")


def each_is_told(host: Host, guest: Guest, collector: Collector, frames: int) -> None:
    """One in one, `frames` of them at least. Which number a sample has is open where two frames pass at once."""

    def told() -> bool:
        pool, number = record(host, guest)["pool"], record(host, guest)["sub_agent"]
        pools = [flow.pool for one in collector.told() if one.sub_agent == number for flow in one.flows]
        return pool >= frames and (len(pools), max(pools)) == (pool, pool)

    wait_until(told, f"{frames} frames and more are told, each once")


def start_again(host: Host) -> None:
    """The next agent on the switch as it is."""
    host.driver = EbpfDriver()
    host.start()


def tell_no_more(host: Host) -> None:
    """Samples stay in the ring until they are asked for."""
    part = host.driver._parts().kinds.part("sampling")
    assert isinstance(part, SamplingTable)
    part._ending = True
    os.eventfd_write(part._wake, 1)
    part._thread.join(10)
    assert not part._thread.is_alive()


def test_segments_are_sampled_as_they_are_on_a_wire(host: Host, collector: Collector) -> None:
    """A guest whose kernel leaves segmentation to the switch."""
    vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    sample(host, vm, collector, rate=4)
    with peer.socket(socket.SOCK_STREAM) as listener, vm.socket(socket.SOCK_STREAM) as client:
        listener.bind((peer.address, 5001))
        listener.listen()
        client.connect((peer.address, 5001))
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(10)
            for _ in range(40):  # less than a second's limit of samples
                client.sendall(bytes(60_000))
                left = 60_000
                while left:
                    left -= len(accepted.recv(left))
    all_told(host, vm, collector)
    now = record(host, vm)
    status = host.run(lambda: host.driver.port(vm.ref))
    assert now["pool"] == status.counters["packets_from"] + status.counters["packets_to"]
    assert now["drops"] == 0
    flows = [flow for one in collector.told() for flow in one.flows]
    four_sigma(4 * len(flows), now["pool"], 4 * now["pool"])
    tcp = [flow for flow in flows if flow.header[12:14] == b"\x08\x00" and flow.header[23] == 6]
    assert max(flow.frame_length for flow in tcp) == 14 + 1500 + FCS
    sequences = []
    for flow in tcp:
        (length,) = struct.unpack_from("!H", flow.header, 16)
        assert flow.frame_length - FCS == max(14 + length, len(flow.header))
        if flow.input == DOCUMENT["sub_agent"] and length == 1500:
            sequences.append(struct.unpack_from("!I", flow.header, 38)[0])
    assert len(sequences) == len(set(sequences)) > 100, "each segment has a sequence number of its own"


def test_an_agent_that_starts_again_goes_on(host: Host, collector: Collector) -> None:
    """What passes while none runs waits in the ring for the next one."""
    vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    sample(host, vm, collector, polling=1, rate=1)
    send(vm, peer, 200)
    all_told(host, vm, collector)
    before = record(host, vm)
    host.run(host.driver.stop)
    send(vm, peer, 100)
    start_again(host)
    send(vm, peer, 100)
    each_is_told(host, vm, collector, before["pool"] + 200)
    assert_continuous(collector.told())
    assert record(host, vm)["drops"] == 0
    assert record(host, vm)["age_ns"] > before["age_ns"]


def test_an_agent_that_is_killed_in_a_datagram_leaves_a_gap_of_one(host: Host, collector: Collector) -> None:
    """With what it noted and did not send nothing is missing, and nothing comes twice."""
    vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    sample(host, vm, collector, rate=1)
    lost: list[Datagram] = []
    for when in (AFTER, BEFORE, BEFORE, AFTER):
        send(vm, peer, 100)
        host.run(host.driver.stop)
        send(vm, peer, 100)
        lost += map(read, host.run(partial(killed, host.options, when, 1)))
        start_again(host)
    send(vm, peer, 100)
    host.run(host.driver.stop)
    told = collector.told()
    assert len(lost) == 2
    assert {one.sequence for one in told}.isdisjoint(one.sequence for one in lost)
    assert_continuous(sorted([*told, *lost], key=lambda one: one.sequence))
    start_again(host)


def test_what_waits_of_a_sub_agent_is_not_told_by_the_next_one(host: Host, collector: Collector) -> None:
    """Its samples are still in the ring when its port, or another one in the same slot, is sampled anew."""
    vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    sample(host, vm, collector, rate=1)
    tell_no_more(host)
    send(vm, peer, 50)
    host.run(lambda: host.driver.load(vm.ref, Table("sampling", Op.DELETE, records=[{"sub_agent": 7}])))
    sample(host, vm, collector, rate=1, sub_agent=8)
    send(vm, peer, 50)
    each_is_told(host, vm, collector, 50)


def test_a_move_that_is_taken_back_leaves_no_trace(host: Host, collector: Collector) -> None:
    vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    sample(host, vm, collector)
    send(vm, peer, 100)
    host.run(lambda: host.driver.hold(vm.ref))
    host.run(lambda: host.driver.quiesce(vm.ref))
    stopped = record(host, vm)
    assert collector.flows() == stopped["flow_samples"] > 0, "all are told when the port has stopped"
    assert {**record(host, vm), "age_ns": 0} == {**stopped, "age_ns": 0}
    host.run(lambda: host.driver.resume(vm.ref))
    send(vm, peer, 100)
    all_told(host, vm, collector)
    assert_continuous(collector.told())


def test_every_collector_is_told_the_same(host: Host, collector: Collector) -> None:
    other = Collector(host, "::1")
    try:
        vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
        sample(host, vm, collector, other)
        send(vm, peer, 100)
        all_told(host, vm, collector)
        wait_until(lambda: other.flows() == collector.flows(), "both are told")
        assert other.told() == collector.told()
    finally:
        other.socket.close()


def test_a_collector_out_of_reach_is_named(host: Host, collector: Collector) -> None:
    vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    away = "203.0.113.9"
    document = SamplingDocument.model_validate({**DOCUMENT, "collectors": [collector.name, away]})
    host.run(lambda: host.driver.load(vm.ref, Table("sampling", records=document.records())))
    need = host.run(lambda: host.driver.describe([vm.ref]))
    found = host.run(lambda: host.driver.probe(need))
    assert len(found) == 1
    assert f"Collector {away} (UDP port 6343)" in found[0]
    send(vm, peer, 100)  # the one that is there gets all of it
    all_told(host, vm, collector)
    assert_continuous(collector.told())
    assert record(host, vm)["unsent"] == len(collector.told())


def test_a_change_of_the_rate_keeps_the_numbers_and_another_sub_agent_begins(host: Host, collector: Collector) -> None:
    vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    sample(host, vm, collector)
    send(vm, peer, 100)
    all_told(host, vm, collector)
    sample(host, vm, collector, rate=1)
    before = record(host, vm)
    send(vm, peer, 100)
    all_told(host, vm, collector)
    assert_continuous(collector.told())
    assert collector.told()[-1].flows[-1].rate == 1
    assert record(host, vm)["pool"] >= before["pool"] + 100
    with pytest.raises(LoadRejected, match="one sub-agent"):
        sample(host, vm, collector, sub_agent=8)
    host.run(lambda: host.driver.load(vm.ref, Table("sampling", Op.DELETE, records=[{"sub_agent": 7}])))
    assert host.run(lambda: list(host.driver.dump(vm.ref, "sampling"))) == []
    told = len(collector.told())
    send(vm, peer, 50)
    sample(host, vm, collector, sub_agent=8)
    send(vm, peer, 50)
    all_told(host, vm, collector)
    assert_continuous(collector.told()[told:])
    assert record(host, vm)["pool"] == 50
