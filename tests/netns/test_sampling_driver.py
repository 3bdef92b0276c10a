# SPDX-License-Identifier: GPL-2.0-only
"""Sampling by the driver alone: segments, an agent that starts again, a move that is taken back, collectors out of
reach, several at once."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.errors import LoadRejected
from datapath.state.kind import Op, Record, Table
from datapath.state.sampling import SamplingDocument
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
    sample(host, vm, collector, polling=1)
    send(vm, peer, 200)
    all_told(host, vm, collector)
    before = record(host, vm)
    host.run(host.driver.stop)
    send(vm, peer, 100)
    host.driver = EbpfDriver()
    host.start()
    send(vm, peer, 100)
    wait_until(lambda: record(host, vm)["pool"] >= before["pool"] + 200, "frames are counted")
    wait_until(lambda: collector.flows() >= before["flow_samples"] + 50, "samples are told")  # 100 of 200, 7 sigma
    all_told(host, vm, collector)
    assert_continuous(collector.told())
    assert record(host, vm)["age_ns"] > before["age_ns"]


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
