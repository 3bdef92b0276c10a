# SPDX-License-Identifier: GPL-2.0-only
"""Sampling by the ebpf driver alone: what two ports may not both be, and a takeover of the maps."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute

from datapath.errors import LoadRejected
from datapath.provider import PortRef
from datapath.state.kind import Record, Table
from datapath.state.sampling import SamplingDocument
from tests.bpf.frames import BROADCAST, ethernet
from tests.contract.hosts import Host, ebpf_host, inside
from tests.contract.samples import MAC
from tests.sflow import Datagram, read

OTHER = "02:00:00:00:00:02"


@pytest.fixture
def host() -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces and bpf(2)")
    with ebpf_host() as made, inside(made):
        with IPRoute() as route:
            route.link("set", index=1, state="up")
        yield made


@pytest.fixture
def collector(host: Host) -> Iterator[socket.socket]:  # noqa: ARG001
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        yield made


def sample(host: Host, port: PortRef, collector: socket.socket, agent: str = "192.0.2.77") -> None:
    written = {"rate": 2, "agent": agent, "sub_agent": 7, "polling": 0}
    document = SamplingDocument(**written, collectors=(f"127.0.0.1:{collector.getsockname()[1]}",))
    host.driver.load(port, Table("sampling", records=document.records()))


def record(host: Host, port: PortRef) -> Record:
    """All that was sampled has been told then."""
    (table,) = host.driver.dump(port, "sampling")
    (found,) = table.records or ()
    return found


def told(collector: socket.socket) -> list[Datagram]:
    found = []
    while select.select([collector], [], [], 0)[0]:
        found.append(read(collector.recv(65536)))
    return found


def test_two_ports_are_not_one_sub_agent(host: Host, collector: socket.socket) -> None:
    one, other = host.stage(), host.stage(mac=OTHER)
    sample(host, one, collector)
    with pytest.raises(LoadRejected, match=f"sub-agent 7 of 192.0.2.77 is port {MAC}"):
        sample(host, other, collector)
    sample(host, other, collector, agent="192.0.2.78")
    following = host.stage(epoch=2)
    sample(host, following, collector)  # the same port as it comes back
    host.empty()


def test_maps_of_another_size_take_the_numbers_along(host: Host, collector: socket.socket) -> None:
    port = host.stage(antispoof=False, trunk={}, network="blue")
    host.driver.open(port)
    sample(host, port, collector)
    frame = bytes(10) + ethernet(BROADCAST, MAC, 0x88B5, bytes(46))
    assert host.driver.inject(port, [frame] * 100, judged=False) == 100
    host.wait_until(lambda: record(host, port)["pool"] == 100, "frames pass")
    before, first = record(host, port), told(collector)
    host.driver.stop()
    host.options["slots"] *= 2
    host.take_over()
    after = record(host, port)
    assert after["age_ns"] > before["age_ns"]
    assert {**after, "age_ns": 0, "counters": {}} == {**before, "age_ns": 0, "counters": {}}
    assert after["counters"] == before["counters"], "what the old maps had counted is carried"
    host.driver.inject(port, [frame] * 100, judged=False)
    host.wait_until(lambda: record(host, port)["pool"] == 200, "frames pass")
    flows = [flow.sequence for one in first + told(collector) for flow in one.flows]
    assert flows == list(range(1, record(host, port)["flow_samples"] + 1))
    assert len(flows) > len([flow for one in first for flow in one.flows]) > 0
    host.empty()
